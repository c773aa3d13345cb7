"""Plans: how a step with a route is executed. A plan runs the forward, asks for the route where its router can see
enough, and returns what the objective needs.

    Dense     ordinary forward and backward; the route only weighs the loss: the exact gradient of the selected loss
    KeptRows  layers below the decision leave all rows, layers above it kept rows alone; backward on kept rows. Called
              `after` where the model's own loss decides (all layers are below), `before` where a router does
    TwoPass   the first forward leaves keys and values alone; the kept rows are computed again, with gradient
    Skip      kept positions alone pass the middle layers, attending to one another; the loss is of all positions

Dropped positions are constants in KeptRows and TwoPass; `layers.Detach` says of what. Token filtering of the backward
pass: arXiv 2502.00340; random layerwise dropping: arXiv 2211.11586. Differs from 2502.00340: rows are never saved and
then filtered where the decision comes first, and attention's backward runs on kept queries by construction.
Shapes: B rows of T positions, N = B T, D width, K kept slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from cggr_ray.data.batch import MicroBatch
from cggr_ray.models.adapter import Adapter, Stream
from cggr_ray.models.attention import Documents
from cggr_ray.routing.route import TokenRoute
from cggr_ray.schema import KEPT_LOSS, SKIP_LOSS
from cggr_ray.sparse.block import Rotary
from cggr_ray.sparse.kept import Kept, kept_rows
from cggr_ray.sparse.layers import Detach, SparseLayers, Trace


@dataclass(frozen=True)
class Seen:
    """What a router sees: hidden states after its layers, and what the last norm makes of them. No gradient."""

    hidden_ND: Tensor
    final_ND: Tensor
    head_VD: Tensor


Decide = Callable[[Seen | None], TokenRoute | None]
"""None keeps everything, which is the plan `Dense` alone."""


@dataclass(frozen=True)
class Planned:
    """A forward under a plan: the stream and the route by which the objective reads it (None: every position)."""

    stream: Stream
    route: TokenRoute | None
    statistics: dict[str, Tensor]
    whole: Callable[[], Seen] | None = None
    """What a router would see behind all layers, of all positions, where the plan has run them, or nearly."""


class Plan(Protocol):
    LOSS: str
    """The schema's name of the loss that a step under this plan reports."""

    def forward(self, micro: MicroBatch, reads: int, decide: Decide) -> Planned:
        """`reads`: layers that the router wants to have run before it decides; 0 shows it nothing."""
        ...


class Dense:
    """The ordinary forward and backward. Without a route it is full training."""

    LOSS = KEPT_LOSS

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def forward(self, micro: MicroBatch, reads: int, decide: Decide) -> Planned:
        adapter, documents = self.adapter, self.adapter.documents(micro)
        hidden, below = adapter.enter(micro, documents, reads or None)
        trunk = Trunk(adapter, hidden)
        middle = max(below, reads)
        hidden = adapter.run_layers(hidden, micro.positions_BT, documents, slice(below, middle), trunk)
        route = decide(seen(adapter, hidden.detach().flatten(0, 1)) if reads else None)
        hidden = adapter.run_layers(hidden, micro.positions_BT, documents, slice(middle, None), trunk)
        stream = adapter.finish(hidden, trunk.hidden_BTD)
        whole = partial(seen, adapter, hidden.detach().flatten(0, 1))
        return Planned(stream, route, route.statistics if route else {}, whole)


class Trunk:
    """Keeps what enters the last layer: a `visit` of `Adapter.run_layers`, for plans that run it on all positions."""

    def __init__(self, adapter: Adapter, hidden_BTD: Tensor) -> None:
        self.hidden_BTD, self._at = hidden_BTD, len(adapter.layers) - 2

    def __call__(self, hidden_BTD: Tensor, layer: int) -> None:
        if layer == self._at:
            self.hidden_BTD = hidden_BTD


@torch.no_grad()
def seen(adapter: Adapter, hidden_ND: Tensor) -> Seen:
    return Seen(hidden_ND, adapter.final_norm(hidden_ND), adapter.head_VD.detach())


@torch.no_grad()
def seen_after(adapter: Adapter, micro: MicroBatch, num_layers: int) -> Seen:
    """What a router sees behind the first layers, by a forward of their own."""
    documents, first = adapter.documents(micro), slice(0, num_layers)
    hidden = adapter.run_layers(adapter.embed(micro), micro.positions_BT, documents, first)
    return seen(adapter, hidden.flatten(0, 1))


class KeptRows:
    """Backward on kept rows alone."""

    LOSS = KEPT_LOSS

    def __init__(self, adapter: Adapter, detach: Detach) -> None:
        self.adapter = adapter
        self.layers = SparseLayers(adapter.device, detach, adapter.checkpointing)

    def forward(self, micro: MicroBatch, reads: int, decide: Decide) -> Planned:
        run = Rows(self.adapter, self.layers, micro)
        run.cross(reads)
        traces = {i: run.capture(i) for i in range(run.first, reads)}
        route = run.keep(decide(seen(self.adapter, run.hidden_ND) if reads else None))
        run.cross(run.first)
        run.enter()
        for i, trace in traces.items():
            traces[i] = trace.rows(run.slots.index_K)
        last = len(self.adapter.layers) - 1
        for i in range(run.first, last + 1):
            run.replay(i, traces.pop(i) if i in traces else run.lend(i) if i == last else run.capture(i))
        return run.finish(route)


class TwoPass:
    """The least memory: nothing but what is lent survives the first forward."""

    LOSS = KEPT_LOSS

    def __init__(self, adapter: Adapter, detach: Detach) -> None:
        self.adapter = adapter
        self.layers = SparseLayers(adapter.device, detach, adapter.checkpointing)

    def forward(self, micro: MicroBatch, reads: int, decide: Decide) -> Planned:
        run, layers = Rows(self.adapter, self.layers, micro), len(self.adapter.layers)
        assert reads == layers, "the first forward is the whole model's"
        run.cross(run.first)
        traces = {i: run.capture(i, products=False) for i in range(run.first, layers)}
        route = run.keep(decide(seen(self.adapter, run.hidden_ND)))
        run.enter()
        for i, trace in traces.items():
            run.replay(i, trace)
        return run.finish(route)


class Rows:
    """One micro-batch on its way through the layers: all rows without gradient, then the kept rows with it."""

    def __init__(self, adapter: Adapter, layers: SparseLayers, micro: MicroBatch) -> None:
        self.adapter, self.layers, self.micro = adapter, layers, micro
        self.documents = adapter.documents(micro)
        with torch.no_grad():
            hidden = adapter.embed(micro)
            rotary = adapter.family.rotary(hidden, micro.positions_BT)
        self.rotary: dict[str, Rotary] = {
            kind: (cos.flatten(0, 1), sin.flatten(0, 1)) for kind, (cos, sin) in rotary.items()
        }
        self.hidden_ND = hidden.flatten(0, 1)
        self.kept: Kept | None = None
        self.hidden_KD: Tensor
        self.first = adapter.first_active
        self._through = 0
        self._entering_ND: Tensor | None = None

    @property
    def slots(self) -> Kept:
        """Those of the kept rows, once there are any."""
        assert self.kept is not None, "nothing has been kept yet"
        return self.kept

    def rotary_of(self, layer: int) -> Rotary:
        kind = self.adapter.shapes[layer].rotary
        return None if kind is None else self.rotary[kind]

    def cross(self, layers: int) -> None:
        """Runs all rows up to so many layers, of those below the first that learns: they leave nothing behind."""
        span, micro = slice(self._through, min(layers, self.first)), self.micro
        if span.start >= span.stop:
            return
        if span.start == 0:
            hidden, _ = self.adapter.enter(micro, self.documents, span.stop)
        else:
            hidden = self.hidden_ND.unflatten(0, micro.tokens_BT.shape)
            hidden = self.adapter.run_layers(hidden, micro.positions_BT, self.documents, span)
        self.hidden_ND, self._through = hidden.flatten(0, 1), span.stop
        if span.stop == self.first:
            self._entering_ND = self.hidden_ND

    def capture(self, layer: int, products: bool = True) -> Trace:
        """Runs the next layer on all rows. Leaves the kept rows' products, or everybody's while nobody is chosen."""
        assert layer == self._through
        shape, weights = self.adapter.shapes[layer], self.adapter.family.weights(layer)
        index = None if self.kept is None else self.kept.index_K
        self.hidden_ND, trace = self.layers.capture(
            shape, weights, self.hidden_ND, self.rotary_of(layer), self.documents, index, products
        )
        self._through += 1
        return trace

    def lend(self, layer: int) -> Trace:
        """Of the next layer, no more than what kept rows need of the others."""
        assert layer == self._through
        shape, weights = self.adapter.shapes[layer], self.adapter.family.weights(layer)
        return self.layers.lend(shape, weights, self.hidden_ND, self.rotary_of(layer))

    def keep(self, route: TokenRoute | None) -> TokenRoute:
        """From here on there are kept rows."""
        assert route is not None, "a plan for kept rows, and no route"
        micro = self.micro
        index = route.flat_index(micro.tokens_BT.numel() // len(route.index_BK))
        self.start(index, route.filled_BK.flatten())
        return route

    def start(self, index: Tensor, filled: Tensor) -> None:
        """From here on there are kept slots."""
        self.kept = kept_rows(index, filled, self.micro, self.adapter.shapes, self.rotary)

    def enter(self) -> None:
        """What of the kept slots enters the first layer that learns: their embeddings, with gradient, or a constant."""
        if self._entering_ND is not None:
            self.hidden_KD, self._entering_ND = self._entering_ND.index_select(0, self.slots.index_K), None
            return
        flat = (
            x.flatten().index_select(0, self.slots.index_K) for x in (self.micro.tokens_BT, self.micro.positions_BT)
        )
        self.hidden_KD = self.adapter.embed_tokens(*flat)

    def replay(self, layer: int, trace: Trace) -> None:
        """Runs a layer on the kept rows, with gradient."""
        shape, weights = self.adapter.shapes[layer], self.adapter.family.weights(layer)
        self.hidden_KD = self.layers.replay(shape, weights, self.hidden_KD, self.rotary_of(layer), self.slots, trace)

    def finish(self, route: TokenRoute) -> Planned:
        hidden_KD = self.adapter.final_norm(self.hidden_KD)
        stream = Stream(hidden_KD, self.adapter.head_VD, self.slots.index_K)
        return Planned(stream, route, route.statistics, self._whole)

    def _whole(self) -> Seen:
        for layer in range(self._through, len(self.adapter.layers)):
            self.capture(layer, products=False)
        return seen(self.adapter, self.hidden_ND)


class Skip:
    """Kept positions alone pass the layers between the first `entry` and the last `exit`; the rest rejoin behind them.

    Kept positions keep their place for the rotary embedding and see the kept positions of their document. Differs from
    arXiv 2211.11586: one draw serves all middle layers. A sliding window counts kept keys.
    """

    LOSS = SKIP_LOSS

    def __init__(self, adapter: Adapter, entry: int, exit: int) -> None:
        if entry < 0 or exit < 0 or entry + exit >= len(adapter.layers):
            raise ValueError(f"skip after {entry} and before the last {exit} of {len(adapter.layers)} layers; "
                             "accepted: at least one layer between")  # fmt: skip
        self.adapter, self.entry, self.exit = adapter, entry, exit

    def forward(self, micro: MicroBatch, reads: int, decide: Decide) -> Planned:
        adapter, documents = self.adapter, self.adapter.documents(micro)
        assert reads in (0, self.entry)
        hidden = adapter.run_layers(adapter.embed(micro), micro.positions_BT, documents, slice(0, self.entry))
        route = decide(seen(adapter, hidden.detach().flatten(0, 1)) if reads else None)
        assert route is not None, "a plan for kept rows, and no route"
        middle = slice(self.entry, len(adapter.layers) - self.exit)
        index = route.flat_index(micro.tokens_BT.shape[1])
        kept = hidden.flatten(0, 1).index_select(0, index).unflatten(0, route.index_BK.shape)
        positions = micro.positions_BT.gather(1, route.index_BK)
        kept = adapter.run_layers(kept, positions, among_kept(documents, route, micro), middle)
        # An empty slot repeats a position: it is written behind the end, and dropped there.
        target = torch.where(route.filled_BK.flatten(), index, micro.tokens_BT.numel())
        padded = torch.cat((hidden.flatten(0, 1), hidden.new_zeros(1, hidden.shape[-1])))
        joined = padded.index_copy(0, target, kept.flatten(0, 1))[:-1].view_as(hidden)
        trunk = Trunk(adapter, joined)
        joined = adapter.run_layers(joined, micro.positions_BT, documents, slice(middle.stop, None), trunk)
        return Planned(adapter.finish(joined, trunk.hidden_BTD if self.exit else None), None, route.statistics)


def among_kept(documents: Documents, route: TokenRoute, micro: MicroBatch) -> Documents:
    """The documents of the rows that consist of kept slots alone. A document of which nothing is kept has length 0."""
    rows, slots = route.index_BK.shape
    index = route.flat_index(micro.tokens_BT.shape[1])
    starts = torch.searchsorted(index, documents.starts.long(), out_int32=True)
    own_start = index - micro.positions_BT.flatten().index_select(0, index)
    first = torch.searchsorted(index, own_start).view(rows, slots)
    offset = torch.arange(rows, device=index.device).unsqueeze(1) * slots
    # The empty slots of a row lengthen its last document, which the kernel must be told.
    return Documents(starts, slots, first - offset)
