"""SIGTERM and Ctrl-C while Ray runs trials: each writes a checkpoint and ends, then Ray ends, with no process left.

The signals reach the process that started the trials, and it alone. It writes a file that the trials look for at every
step: in the race's folder, where this is the same one on all nodes, and in its mirror, if it has one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from cggr_ray.schema import STOP_FILE
from cggr_ray.stopping import Signals, StoppedError, signals


class Ending(tune.Callback, tune.Stopper):
    """Ends a Tune run that was asked to, once none of its trials runs any more. Both a callback and a `stop` of it."""

    def __init__(self, asked: Signals) -> None:
        self._asked, self._running = asked, False

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes both to disk; a request is for this process."""
        return {}

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._asked()

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **_: Any) -> None:
        self._running = any(trial.status == TuneTrial.RUNNING for trial in trials)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.asked() and not self._running


@contextmanager
def stoppable(folder: Path) -> Iterator[Ending]:
    """Inside, for a race, a tuning or a sweep in `folder`, the first SIGTERM or Ctrl-C is a request to its trials; the
    second ends the process at once.

    Raises:
        StoppedError: at the end, where one came.
    """
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    file = folder / STOP_FILE
    file.unlink(missing_ok=True)
    try:
        with signals(file.touch) as asked:
            yield Ending(asked)
    finally:
        file.unlink(missing_ok=True)
    if asked():
        name = signal.Signals(asked.signum).name
        raise StoppedError(f"stopped by {name}; --resume {folder} goes on where it was", asked.signum)
