"""Packing documents into rows of T positions: which documents, in which order, and what a row looks like.

The order is a pure function of the data seed: blocks of documents are drawn from the mixture, packed by best fit
(longest first), and their rows shuffled. A document longer than a row is cut into pieces that overlap by one token, so
that every transition is trained once. Pieces never see each other: positions restart and attention stays inside.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cggr_ray.data.batch import IGNORE
from cggr_ray.data.store import TokenStore

BLOCK_ROWS = 128


class Piece(NamedTuple):
    """Tokens [start, stop) of a source's stream; `masked` of its labels, from the left, are part of a prompt."""

    source: int
    start: int
    stop: int
    masked: int

    @property
    def positions(self) -> int:
        return self.stop - self.start - 1


class RowShape(NamedTuple):
    """What all rows of a dataset have in common, so that batches of them have one shape and one graph."""

    positions: int
    most_documents: int
    """Pieces in a row, padding not counted."""
    longest: int
    """Positions of the longest document in a row; attention is launched for no longer one."""

    @property
    def segments(self) -> int:
        """Most starts a row can have: its pieces, and its padding in segments of `longest`."""
        return self.most_documents + -(-self.positions // self.longest)


class PackedRow(NamedTuple):
    """One row: int64 arrays of T, the starts of its documents, and its labelled and real (not padding) positions."""

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    position_ids: np.ndarray
    starts: list[int]
    labelled: int
    real: int


def cut(store: TokenStore, source: int, document: int, row_tokens: int, mask_prompt: bool) -> list[Piece]:
    """The pieces of one document, each of at most `row_tokens` positions."""
    start, stop = int(store.offsets[document]), int(store.offsets[document + 1])
    prompt = start + int(store.prompts[document]) if mask_prompt else start
    pieces = []
    for at in range(start, stop - 1, row_tokens):
        end = min(at + row_tokens + 1, stop)
        masked = min(max(prompt - at - 1, 0), end - at - 1)
        if masked < end - at - 1:
            pieces.append(Piece(source, at, end, masked))
    return pieces


def best_fit(lengths: Sequence[int], capacity: int, most: int) -> list[list[int]]:
    """Indices of `lengths` in bins of `capacity`, at most `most` in each: best fit, longest first, ties by index."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(room, (lengths[index], -1))
        if at == len(room):
            bins.append([index])
            left, number = capacity - lengths[index], len(bins) - 1
        else:
            free, number = room.pop(at)
            bins[number].append(index)
            left = free - lengths[index]
        if left > 0 and len(bins[number]) < most:
            bisect.insort(room, (left, number))
    return bins


def fill_row(pieces: Sequence[Piece], stores: Sequence[TokenStore], shape: RowShape) -> PackedRow:
    """The arrays of one row; what the pieces leave is padding, documents of their own without labels."""
    width = shape.positions
    tokens, positions = np.zeros(width, np.int64), np.zeros(width, np.int64)
    labels, ids = np.full(width, IGNORE, np.int64), np.full(width, -1, np.int64)
    bases = np.cumsum([0, *(len(store.tokens) for store in stores)])
    starts, at, labelled = [], 0, 0
    for piece in pieces:
        end = at + piece.positions
        stream = stores[piece.source].tokens[piece.start : piece.stop].astype(np.int64)
        tokens[at:end], labels[at + piece.masked : end] = stream[:-1], stream[1 + piece.masked :]
        positions[at:end] = np.arange(piece.positions)
        ids[at:end] = np.arange(piece.start, piece.stop - 1) + bases[piece.source]
        starts.append(at)
        labelled += piece.positions - piece.masked
        at = end
    starts += range(at, width, shape.longest)
    positions[at:] = np.arange(width - at) % shape.longest
    return PackedRow(tokens, labels, positions, ids, starts, labelled, at)


@dataclass
class OrderState:
    """Where the order of documents stands: enough to go on exactly, small enough for a checkpoint."""

    block: int = 0
    row: int = 0
    draws: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rows_read: int = 0
    digest: str = ""


class RowOrder:
    """The endless sequence of packed rows of a mixture.

    Args:
        stores: one a source. weights: shares of the tokens. max_epochs: per source, None for no limit.
        seed: the data seed, alike for all trials of a race, or of a seed of it.
        longest: positions of the longest document that rows of this shape will hold; a whole row by default.
    Raises:
        ValueError: a source is empty, or all of them are limited.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float],
        max_epochs: Sequence[int | None],
        row_tokens: int,
        mask_prompts: bool,
        seed: int,
        longest: int | None = None,
    ) -> None:
        if any(store.documents == 0 for store in stores):
            raise ValueError("a source has no training documents; accepted: at least one a source")
        if all(limit is not None for limit in max_epochs):
            raise ValueError("every source has max_epochs; accepted: at least one without, to fill the budget")
        self.stores, self.weights, self.max_epochs = stores, weights, max_epochs
        self.mask_prompts, self.seed = mask_prompts, seed
        # Of the source with the shortest documents, since rows may hold nothing else.
        mean = min(store.lengths.mean() for store in stores)
        most = max(4, int(3 * row_tokens / mean))
        self.shape = RowShape(row_tokens, most, min(longest or row_tokens, row_tokens))
        self._block: tuple[tuple[int, tuple[int, ...]], list[list[Piece]], OrderState] | None = None
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}

    def start(self) -> OrderState:
        return OrderState(draws=[0] * len(self.stores), tokens=[0] * len(self.stores))

    def next_row(self, state: OrderState) -> tuple[PackedRow, OrderState]:
        """The row at `state`, and the state after it."""
        rows, after = self._rows(state)
        row = fill_row(rows[state.row], self.stores, self.shape)
        digest = hashlib.blake2b(
            bytes.fromhex(state.digest) + row.tokens.tobytes() + row.labels.tobytes(), digest_size=8
        )
        done = state.row + 1 == len(rows)
        base = after if done else state
        return row, OrderState(
            block=base.block,
            row=0 if done else state.row + 1,
            draws=base.draws,
            tokens=base.tokens,
            rows_read=state.rows_read + 1,
            digest=digest.hexdigest(),
        )

    def first_rows(self, count: int) -> list[PackedRow]:
        state, rows = self.start(), []
        for _ in range(count):
            row, state = self.next_row(state)
            rows.append(row)
        return rows

    def epochs(self, state: OrderState) -> list[float]:
        """How often each source was read up to `state`; documents of the block in progress count by its rows."""
        rows, after = self._rows(state)
        part = state.row / len(rows)
        drawn = [before + part * (later - before) for before, later in zip(state.draws, after.draws, strict=True)]
        return [draws / store.documents for draws, store in zip(drawn, self.stores, strict=True)]

    def _rows(self, state: OrderState) -> tuple[list[list[Piece]], OrderState]:
        key = (state.block, tuple(state.draws))
        if self._block is None or self._block[0] != key:
            self._block = (key, *self._draw_block(state))
        return self._block[1], self._block[2]

    def _draw_block(self, state: OrderState) -> tuple[list[list[Piece]], OrderState]:
        draws, tokens = list(state.draws), list(state.tokens)
        pieces: list[Piece] = []
        wanted = BLOCK_ROWS * self.shape.positions
        while wanted > 0:
            source = self._poorest(draws, tokens)
            document = self._document(source, draws[source])
            pieces += (new := cut(self.stores[source], source, document, self.shape.positions, self.mask_prompts))
            draws[source] += 1
            # What is read: a piece that is all prompt, where prompts are masked, is none.
            read = sum(piece.positions for piece in new)
            tokens[source] += read
            wanted -= read
        bins = best_fit([piece.positions for piece in pieces], self.shape.positions, self.shape.most_documents)
        shuffle = np.random.default_rng((self.seed, state.block, 1)).permutation(len(bins))
        rows = [[pieces[i] for i in bins[b]] for b in shuffle]
        return rows, OrderState(block=state.block + 1, draws=draws, tokens=tokens)

    def _poorest(self, draws: list[int], tokens: list[int]) -> int:
        """The source furthest behind its share of tokens, among those with epochs left."""
        open_sources = [
            s for s, limit in enumerate(self.max_epochs) if limit is None or draws[s] < limit * self.stores[s].documents
        ]
        return min(open_sources, key=lambda s: (tokens[s] / self.weights[s], s))

    def _document(self, source: int, draw: int) -> int:
        epoch, at = divmod(draw, self.stores[source].documents)
        known = self._permutations.get(source)
        if known is None or known[0] != epoch:
            generator = np.random.default_rng((self.seed, source, epoch, 2))
            known = self._permutations[source] = (epoch, generator.permutation(self.stores[source].documents))
        return int(known[1][at])
