"""The loader: packs rows in a background thread, copies them to the device on a side stream, resumes exactly.

A batch that the step path has not consumed yet does not exist for a checkpoint: the loader's state is that of the last
batch handed out. Its rows are kept on the host until the next one, so that a step which found too little memory can
have them again in smaller micro-batches.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch

from cggr_ray.data.batch import Batch, MicroBatch
from cggr_ray.data.packing import OrderState, PackedRow, RowOrder, RowShape
from cggr_ray.transfer import to_device
from cggr_ray.workers import ALONE, Workers

# How often a step that waits for data looks whether the thread is still there.
ALIVE_SECONDS = 1.0
# A trial keeps the chained hash of its rows at every multiple of this many rows, for comparison with other trials.
ORDER_MARK_ROWS = 64


def micro_batches(
    rows: Sequence[PackedRow], micro_rows: int, shape: RowShape, device: torch.device, before: int = 0
) -> list[MicroBatch]:
    """Rows as micro-batches on `device`, `before` of the step before them. Pinned memory does not block; shapes do not
    depend on data."""
    micros = []
    for index, at in enumerate(range(0, len(rows), micro_rows)):
        group = rows[at : at + micro_rows]
        fields = np.stack([[r.tokens, r.labels, r.positions, r.position_ids] for r in group], axis=1)
        flat = [row * shape.positions + start for row, r in enumerate(group) for start in r.starts]
        starts = np.full(len(group) * shape.segments + 1, len(group) * shape.positions, np.int32)
        starts[: len(flat)] = flat
        moved = to_device(torch.from_numpy(fields), device)
        micros.append(
            MicroBatch(
                tokens_BT=moved[0],
                labels_BT=moved[1],
                positions_BT=moved[2],
                position_ids_BT=moved[3],
                document_starts=to_device(torch.from_numpy(starts), device),
                longest_document=shape.longest,
                labelled_B=np.array([r.labelled for r in group]),
                index=before + index,
                ids_BT=fields[3],
                first=index == 0,
            )
        )
    return micros


Moved = tuple[Batch, torch.cuda.Event | None]


class _Packed(NamedTuple):
    """What the thread makes of a step's rows, and where the order stands after them."""

    rows: list[PackedRow]
    micro_rows: int
    moved: Moved | None
    """None where the device had no memory left while the thread asked for some, beside a step."""
    state: OrderState
    marks: dict[str, str]


class Loader:
    """Hands out one batch a step. Use as a context manager, or call `close`: it owns a thread.

    Every worker packs all rows of a step, so that the order and its hash are those of one worker, and hands out its
    share of them: as many as the others', next to each other, so that micro-batches are those of one worker too.

    Args:
        rows: rows a step, of all workers. micro_rows: rows a forward. state: from `state_dict`, to go on from there.
            prefetch: batches that wait on the device, beside the one that is being packed.
    """

    def __init__(
        self,
        order: RowOrder,
        rows: int,
        micro_rows: int,
        device: torch.device,
        state: dict[str, Any] | None = None,
        prefetch: int = 3,
        workers: Workers = ALONE,
    ) -> None:
        own = rows // workers.size
        self._share, self._rank = slice(workers.rank * own, (workers.rank + 1) * own), workers.rank
        self._order, self._count, self._micro_rows, self._device = order, rows, micro_rows, device
        self._rows: list[PackedRow] = []
        self._state = order.start()
        self.tokens_seen = 0
        self.marks: dict[str, str] = {}
        if state is not None:
            self._state = OrderState(**state["order"])
            self.tokens_seen, self.marks = state["tokens_seen"], dict(state["marks"])
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._stop = threading.Event()
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=prefetch)
        self._thread = threading.Thread(target=self._produce, args=(self._state,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next(self) -> Batch:
        """The next batch, ready on the current stream; blocks while none is packed.

        Raises:
            whatever packing raised in the thread; RuntimeError when the thread is gone.
        """
        item = self._take()
        if isinstance(item, Exception):
            raise item
        self._rows, self._state = item.rows, item.state
        self.marks |= item.marks
        # What had been packed ahead when the micro-batches became smaller is made again.
        moved = item.moved if item.micro_rows == self._micro_rows else None
        batch = self._on_this_stream(*(moved or self._move(item.rows, self._micro_rows)))
        self.tokens_seen += batch.tokens
        return batch

    def smaller(self, micro_rows: int) -> Batch:
        """The last batch once more, in micro-batches of so many rows, as all batches will be from now on."""
        self._micro_rows = micro_rows
        return self._on_this_stream(*self._move(self._rows, micro_rows))

    def _on_this_stream(self, batch: Batch, ready: torch.cuda.Event | None) -> Batch:
        if ready is not None:
            torch.cuda.current_stream(self._device).wait_event(ready)
            for micro in batch.micros:
                for tensor in (micro.tokens_BT, micro.document_starts):
                    tensor.record_stream(torch.cuda.current_stream(self._device))
        return batch

    @property
    def labelled(self) -> int:
        """Labelled positions of the last batch, those of all workers."""
        return sum(row.labelled for row in self._rows)

    @property
    def at(self) -> OrderState:
        """Where the order stands after the last batch handed out."""
        return self._state

    def state_dict(self) -> dict[str, Any]:
        return {"order": asdict(self._state), "tokens_seen": self.tokens_seen, "marks": dict(self.marks)}

    def close(self) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _take(self) -> Any:
        while True:
            try:
                return self._queue.get(timeout=ALIVE_SECONDS)
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    raise RuntimeError("the loader's thread has ended") from None

    def _produce(self, state: OrderState) -> None:
        try:
            while not self._stop.is_set():
                rows, marks = [], {}
                for _ in range(self._count):
                    row, state = self._order.next_row(state)
                    rows.append(row)
                    if state.rows_read % ORDER_MARK_ROWS == 0:
                        marks[str(state.rows_read)] = state.digest
                micro_rows = self._micro_rows
                self._queue.put(_Packed(rows, micro_rows, self._try_to_move(rows, micro_rows), state, marks))
        except (ValueError, OSError, RuntimeError, IndexError, MemoryError) as error:
            self._queue.put(error)

    def _try_to_move(self, rows: list[PackedRow], micro_rows: int) -> Moved | None:
        try:
            return self._move(rows, micro_rows)
        except torch.OutOfMemoryError:
            return None

    def _move(self, rows: list[PackedRow], micro_rows: int) -> Moved:
        own, tokens = rows[self._share], sum(row.real for row in rows)
        pack = (micro_rows, self._order.shape, self._device, self._rank * -(-len(own) // micro_rows))
        if self._stream is None:
            return Batch(tuple(micro_batches(own, *pack)), tokens), None
        with torch.cuda.stream(self._stream):
            batch = Batch(tuple(micro_batches(own, *pack)), tokens)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return batch, ready
