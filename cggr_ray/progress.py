"""Where a run stands in its budget. Schedules read `Progress.fraction`, never a step count. Standard library only.

The budget is seconds of training: the `train` and `data_wait` ledgers of `clock.RaceClock`. `progress.f64` of a run
holds at how many of them every step began: all that a run has from the clock, so that it can be replayed.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True)
class Budget:
    """Seconds of training that a run may use.

    Raises:
        ValueError: when `seconds` is not a positive number.
    """

    seconds: float

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"budget of {self.seconds} seconds; accepted: a positive number of train seconds")

    def spent(self, train_seconds: float) -> bool:
        return train_seconds >= self.seconds


@dataclass(frozen=True)
class Progress:
    """The state that every schedule reads: updates done, budget used, tokens read from the stream.

    `step` only seeds random draws and paces what comes back every so many steps, as probes do; nothing decays by it.
    """

    step: int
    train_seconds: float
    budget_seconds: float
    tokens_seen: int

    @property
    def fraction(self) -> float:
        """Used part of the budget, 0 to 1."""
        return min(1.0, self.train_seconds / self.budget_seconds)


def ramp(fraction: float, start: float, end: float) -> float:
    """0 before `start`, 1 after `end`, linear between; a step at `start` when both are equal."""
    if fraction <= start:
        return 0.0 if fraction < start or end > start else 1.0
    return 1.0 if fraction >= end else (fraction - start) / (end - start)


class ProgressFile:
    """Train seconds at which every step of a run began: float64, little-endian, eight bytes a step.

    Args:
        steps: of the run that goes on; what the file has beyond them is cut off.
    """

    BYTES = 8

    def __init__(self, path: Path, steps: int) -> None:
        self._path, self._new = path, list[float]()
        path.touch()
        os.truncate(path, steps * self.BYTES)

    def add(self, train_seconds: float) -> None:
        self._new.append(train_seconds)

    def flush(self) -> None:
        with self._path.open("ab") as file:
            file.write(struct.pack(f"<{len(self._new)}d", *self._new))
        self._new = []


def read_progress(path: Path) -> list[float]:
    """What a `ProgressFile` wrote.

    Raises:
        ValueError: no such file, a torn one, or seconds that do not rise.
    """
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist; accepted: a run that kept when its steps began")
    content = path.read_bytes()
    if len(content) % ProgressFile.BYTES:
        raise ValueError(f"{str(path)!r} has {len(content)} bytes; accepted: {ProgressFile.BYTES} a step")
    began = list(struct.unpack(f"<{len(content) // ProgressFile.BYTES}d", content))
    if not all(0 <= before < after < float("inf") for before, after in pairwise(began)):
        raise ValueError(f"{str(path)!r} holds seconds that do not rise; accepted: when one step after the other began")
    return began
