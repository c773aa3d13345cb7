"""Where a run stands in its budget. Schedules read `Progress.fraction`, never a step count. Standard library only.

The budget is seconds of training: the `train` and `data_wait` ledgers of `clock.RaceClock`.
"""

from __future__ import annotations

from dataclasses import dataclass


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

    `step` only seeds random draws and counts probes; nothing decays by it.
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
