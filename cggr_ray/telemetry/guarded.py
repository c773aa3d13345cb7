"""A tracker that is not ours, kept away from training: what it raises is said once, and it is asked nothing more.

W&B and TensorBoard raise whatever their libraries, servers and file formats come up with. So every family of errors
that Python has for what can go wrong in other people's code is caught here, at this one edge. What ends a process
(Ctrl-C, SystemExit) and MemoryError are not among them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from cggr_ray.telemetry.tracker import Row, Tracker

FAILURES: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError, LookupError, NameError),
    *(OSError, RuntimeError, StopIteration, SyntaxError, TypeError, ValueError, Warning),
)

log = logging.getLogger(__name__)


class Guarded:
    """A tracker until it fails: from then on rows are dropped, after one warning.

    Args:
        name: in the warning. opener: imports the tracker's library too.
    """

    def __init__(self, name: str, opener: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        self._attempt(lambda: setattr(self, "_tracker", opener()))

    def log(self, row: Row) -> None:
        if (tracker := self._tracker) is not None:
            self._attempt(lambda: tracker.log(row))

    def finish(self, summary: Row) -> None:
        if (tracker := self._tracker) is not None:
            self._attempt(lambda: tracker.finish(summary))

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except FAILURES as error:
            self._tracker = None
            log.warning("%s has failed, the run goes on without it: %r", self._name, error)
