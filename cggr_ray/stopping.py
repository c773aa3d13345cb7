"""Ending a run on request: it writes a checkpoint at the next step boundary and goes on from there another time.

A run asks a `Stop` before every step. In a process of its own that is `Signals`: SIGTERM and Ctrl-C become a request. A
worker of Ray has neither the signals nor the main thread, in which alone Python takes them; it asks a `StopFile`, which
the process writes that did get the signal. A signal to such a worker itself ends it at once, as SIGKILL does, and its
last checkpoint stands.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cggr_ray.schema import STOP_FILE

Stop = Callable[[], bool]

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# How often a file is looked for.
LOOK_SECONDS = 0.5


class StoppedError(Exception):
    """Something ended before its time because it was asked to, and can go on later.

    Args:
        signum: the signal that asked, 0 where it was none.
    """

    def __init__(self, message: str, signum: int = 0) -> None:
        super().__init__(message)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """As a shell has it: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.signum if self.signum else 1


def never() -> bool:
    """The `Stop` of a run that nobody ends early."""
    return False


class Signals:
    """Which signal has asked for the end, 0 so far for none. Called, it says whether one has."""

    def __init__(self) -> None:
        self.signum = 0

    def __call__(self) -> bool:
        return self.signum != 0


@contextmanager
def signals(then: Callable[[], None] = lambda: None) -> Iterator[Signals]:
    """Inside, the first SIGTERM or Ctrl-C is a request, told to `then`; the second ends the process as it did before.

    For the main thread alone: elsewhere Python takes no signals, and raises ValueError.
    """
    found = Signals()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def asked(signum: int, frame: FrameType | None) -> None:
        restore()
        found.signum = signum
        then()

    for number in SIGNALS:
        signal.signal(number, asked)
    try:
        yield found
    finally:
        restore()


class StopFile:
    """Whether a file is there, looked for every `LOOK_SECONDS` at most. NFS may show it a minute later."""

    def __init__(self, path: Path) -> None:
        self._path, self._next, self._there = path, 0.0, False

    def __call__(self) -> bool:
        now = time.monotonic()
        if now >= self._next:
            self._there, self._next = self._path.exists(), now + LOOK_SECONDS
        return self._there


def stop_file(run_folder: Path) -> Path:
    """The file that stops all runs of a race, or of a tuning or a sweep, from the folder of one of its runs."""
    return run_folder.parents[1] / STOP_FILE
