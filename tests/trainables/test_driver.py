"""What ends an experiment."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from ray.tune.error import TuneError

from trainables.driver import fit


class Experiment:
    """Ends as Tune does: with text, of what a callback has raised, or of nothing else."""

    def __init__(self, raised: Exception | None) -> None:
        self.raised = raised

    def fit(self) -> None:
        try:
            if self.raised:
                raise self.raised
        except OSError as error:
            raise TuneError(f"Traceback ... {error}")  # noqa: B904 - as Tune raises it
        raise TuneError("no trials")


def test_what_a_callback_raises_ends_an_experiment_as_it_is() -> None:
    full: Any = Experiment(OSError(errno.ENOSPC, "No space left on device", "sweep.jsonl"))
    with pytest.raises(OSError) as ended:
        fit(full)
    assert ended.value is full.raised and ended.value.errno == errno.ENOSPC
    other: Any = Experiment(None)
    with pytest.raises(TuneError, match="no trials"):
        fit(other)
