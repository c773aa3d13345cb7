"""What runs where the GPU is: the Ray-free core with a reporter of the place it runs in.

The core is imported by the process that trains, when it does: the drivers of trials need none of it. A configuration
holds `trial`, and of a sweep's trial `searched`: whether its milestones are saved before they are reported. Memory that
runs out in such a trial is a result; a full disk interrupts the sweep.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cggr_ray.workers import Workers

Row = dict[str, Any]


def train_worker(config: dict[str, Any]) -> None:
    """The `train_loop_per_worker` of a TorchTrainer with workers: reports to Ray Train, which takes the rows of
    worker 0 and waits until all have reported."""
    import ray.train.torch

    from cggr_ray.workers import Group

    group = Group(ray.train.torch.get_device()) if config["trial"]["race"]["workers"] > 1 else None
    run(config, lambda row: ray.train.report(scalars(row)), group)


def train_in_process(config: dict[str, Any]) -> None:
    """The same for a TorchTrainer without workers, inside a Tune trial: there only Tune takes reports."""
    from ray import tune

    assert tune.get_context().get_trial_id(), "no Tune trial takes the reports"
    run(config, lambda row: tune.report(scalars(row)))


def run(config: dict[str, Any], report: Callable[[Row], None], group: Workers | None = None) -> None:
    """Runs a trial to its end, or to where the race is stopped: then it has no summary, and goes on another time."""
    from cggr_ray.files import DiskFullError
    from cggr_ray.loop import run_race
    from cggr_ray.race import Trial
    from cggr_ray.run_mirror import mirrored
    from cggr_ray.schema import UNMIRRORED
    from cggr_ray.stopping import StopFile, StoppedError, stop_file
    from cggr_ray.workers import ALONE

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    trial, searched = Trial.from_plain(config["trial"]), config.get("searched")
    workers, asked, last = group or ALONE, StopFile(stop_file(Path(trial.folder))), Row()
    try:
        with mirrored(trial, workers) as mirror:
            race = partial(run_race, trial, report, stop=lambda: asked() or mirror.asks_to_stop(), workers=workers)
            if searched is None:
                race()
            else:
                last = out_of_memory(partial(race, saved=searched["saved"])) or {}
        if workers.first(mirror.failure is not None):
            last[UNMIRRORED] = mirror.failure or ""
        if last:
            report({"trial": trial.trial_id, **last})
    except StoppedError as stopped:
        logging.info("%s", stopped)
    except DiskFullError as error:
        if searched is None:
            raise
        report({"trial": trial.trial_id, "status": "interrupted", "message": str(error)})


def out_of_memory(train: Callable[[], object]) -> Row | None:
    """Runs a function; where memory does not suffice, what is told to the search: how much was asked for."""
    from cggr_ray.out_of_memory import FAILURES, asked_mib, is_out_of_memory

    try:
        train()
    except FAILURES as error:
        if not is_out_of_memory(error):
            raise
        return {"status": "out_of_memory", "peak_memory_mib": asked_mib(str(error)), "message": str(error)}
    return None


def scalars(row: Row) -> Row:
    """What Ray carries of a row: numbers and names."""
    return {name: value for name, value in row.items() if isinstance(value, int | float | str)}
