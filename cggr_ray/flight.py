"""Steps in flight: the host is never more than one step ahead of the device, and reads a step's values only once done.

The one synchronisation of the step path: before the host queues step n + 1, step n - 1 has finished. Parts that learn
from measurements get them two steps late, in flight or not, so that a resumed run sees the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cggr_ray.learner import StepRow
from cggr_ray.progress import Progress
from cggr_ray.telemetry.jsonl import plain
from cggr_ray.telemetry.tracker import Row

OBSERVE_DELAY = 2


class Finished(NamedTuple):
    """A finished step: its progress, its values on the host, vectors as lists, a histogram as edges and counts, and the
    train seconds at which it ended."""

    progress: Progress
    values: Row
    train_seconds: float


class Flight:
    """A queue of steps whose values are on their way to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._queue: deque[tuple[StepRow, dict[str, Tensor], Callable[[], float], torch.cuda.Event | None]] = deque()

    def push(self, row: StepRow, ended: Callable[[], float]) -> None:
        """Queues a step's values. `ended`: a mark of the clock behind the step."""
        copies = {name: value.detach().to("cpu", non_blocking=True) for name, value in row.device_values.items()}
        event = None
        if self._cuda:
            event = torch.cuda.Event()
            event.record()
        self._queue.append((row, copies, ended, event))

    def land(self, all_steps: bool) -> list[Finished]:
        """Waits for every step but the newest, or for all of them; returns those that finished, oldest first.

        Without a device there is nothing to wait for, and every step lands at once.
        """
        landed, left = [], 1 if self._cuda and not all_steps else 0
        while len(self._queue) > left:
            row, copies, ended, event = self._queue.popleft()
            if event is not None:
                event.synchronize()
            values: Row = {name: _value(copy, row.edges.get(name)) for name, copy in copies.items()}
            landed.append(Finished(row.progress, values | row.host_values, ended()))
        return landed


class Delayed:
    """Measurements on their way to the parts.

    Args:
        state: that of a checkpoint, where there is one.
    """

    def __init__(self, state: Iterable[tuple[Row, dict[str, Any]]] = ()) -> None:
        self._queue = deque((values, Progress(**progress)) for values, progress in state)

    def add(self, finished: Finished) -> None:
        self._queue.append((finished.values, finished.progress))

    def due(self, steps: int) -> Iterator[tuple[Row, Progress]]:
        """What is old enough after so many steps, oldest first."""
        while self._queue and steps - self._queue[0][1].step >= OBSERVE_DELAY:
            yield self._queue.popleft()

    def state(self) -> list[Any]:
        """For a checkpoint."""
        return [[plain(values), asdict(progress)] for values, progress in self._queue]


def _value(copy: Tensor, edges: list[float] | None) -> float | list[float] | dict[str, list[float]]:
    if edges is not None:
        return {"edges": edges, "counts": copy.tolist()}
    found: float | list[float] = copy.tolist()
    return found
