"""RaceClock: every second of a run belongs to exactly one of eight ledgers, so they add up to the wall clock.

`train` and `data_wait` are the budget. Work of a method (router pass, probe, decomposition) is on it; what the race
does for its own sake (evaluation, checkpoints, reporting, warm-up, set-up) is off it. The device is synchronised only
where a switch crosses that edge, so training steps and waits for data never stop the device; when it passed a place
between two steps is read from its own events, afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from cggr_ray.schema import BUDGET_LEDGERS, LEDGERS


def no_device() -> None:
    """The synchroniser of a run without an accelerator."""


class Event(Protocol):
    """A recorded place in a device's queue."""

    def elapsed_time(self, later: Any, /) -> float:
        """Milliseconds until the device passed the later one."""
        ...


class RaceClock:
    """Eight ledgers in seconds, one of them running at any time (`idle` until somebody switches).

    Args:
        synchronise: waits until the device has done its queued work.
        now: a monotonic clock in seconds; tests inject one.
        event: records a place in the device's queue; None where work is done when it is asked for.
    """

    def __init__(
        self,
        synchronise: Callable[[], None] = no_device,
        now: Callable[[], float] = time.perf_counter,
        event: Callable[[], Event] | None = None,
    ) -> None:
        self._synchronise, self._now, self._event = synchronise, now, event
        # The last time that the budget's clock began to run: train seconds then, and the place in the device's queue.
        self._entered: tuple[float, Event] | None = None
        self._seconds = dict.fromkeys(LEDGERS, 0.0)
        self._current = "idle"
        self._since = now()

    def switch(self, ledger: str) -> None:
        """Charges the time since the last switch to the running ledger and starts `ledger`."""
        if ledger not in self._seconds:
            raise ValueError(f"ledger {ledger!r}; accepted: {', '.join(LEDGERS)}")
        crosses = (ledger in BUDGET_LEDGERS) != (self._current in BUDGET_LEDGERS)
        if crosses:
            self._synchronise()
        self._charge()
        self._current = ledger
        if crosses and self._event is not None and ledger in BUDGET_LEDGERS:
            self._entered = self.train_seconds, self._event()

    @contextmanager
    def ledger(self, ledger: str) -> Iterator[None]:
        """Runs the body on `ledger`, then goes back to the ledger that ran before."""
        before = self._current
        self.switch(ledger)
        try:
            yield
        finally:
            self.switch(before)

    def tick(self) -> None:
        """Called once a step. A real clock needs no telling."""

    def mark(self) -> Callable[[], float]:
        """Called while the budget's clock runs, marks the end of all work queued so far. What it returns says, once the
        device has passed that place, at how many train seconds it did."""
        if self._event is None or self._entered is None:
            now = self.train_seconds
            return lambda: now
        (seconds, entered), end = self._entered, self._event()
        return lambda: seconds + entered.elapsed_time(end) / 1000

    @property
    def train_seconds(self) -> float:
        """Seconds of the budget used so far, read without synchronising the device."""
        self._charge()
        return sum(self._seconds[name] for name in BUDGET_LEDGERS)

    @property
    def ledgers(self) -> dict[str, float]:
        """Seconds by ledger, up to now."""
        self._charge()
        return dict(self._seconds)

    def restore(self, ledgers: Mapping[str, float]) -> None:
        """Sets the ledgers to those of a checkpoint."""
        self._charge()
        self._seconds = {name: float(ledgers[name]) for name in LEDGERS}

    def _charge(self) -> None:
        now = self._now()
        self._seconds[self._current] += now - self._since
        self._since = now


class WallClock:
    """Seconds since a run began, with those of its earlier processes, by a clock of its own: what ledgers add up to."""

    def __init__(self) -> None:
        self._began, self._before = time.time(), 0.0

    @property
    def seconds(self) -> float:
        return self._before + time.time() - self._began

    def restore(self, seconds: float) -> None:
        """Adds those of a checkpoint."""
        self._before = seconds


class SteppedClock(RaceClock):
    """A clock that stands still but for `step_seconds` of training a step: same input, same fractions, same result."""

    def __init__(self, step_seconds: float) -> None:
        super().__init__(now=lambda: 0.0)
        self._step_seconds = step_seconds

    def tick(self) -> None:
        self._seconds["train"] += self._step_seconds


class ReplayOverError(RuntimeError):
    """A replay wants to go on where the recorded run had ended."""


class ReplayClock(RaceClock):
    """A clock that says again what it said to a run that is recorded, whatever the steps take now.

    Args:
        began: train seconds at which the steps began. end: those at the end of the run.
    """

    def __init__(self, began: Sequence[float], end: float) -> None:
        super().__init__(now=lambda: 0.0)
        self._times, self._next = (*began, end), 0
        self.tick()

    def tick(self) -> None:
        if self._next == len(self._times):
            raise ReplayOverError(f"the recorded run ended after {len(self._times) - 1} steps")
        self._seconds["train"] = self._times[self._next]
        self._next += 1
