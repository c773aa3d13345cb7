"""What runs where the GPU is: the Ray-free core with a reporter of the place it runs in."""

from __future__ import annotations

import logging
from typing import Any

from cggr_ray.loop import run_race
from cggr_ray.race import Trial
from cggr_ray.telemetry.tracker import Row


def train_worker(config: dict[str, Any]) -> None:
    """The `train_loop_per_worker` of a TorchTrainer with workers: reports to Ray Train."""
    import ray.train

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_race(Trial.from_plain(config["trial"]), lambda row: ray.train.report(scalars(row)))


def train_in_process(config: dict[str, Any]) -> None:
    """The same for a TorchTrainer without workers, inside a Tune trial: there only Tune takes reports."""
    from ray import tune

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    assert tune.get_context().get_trial_id(), "no Tune trial takes the reports"
    run_race(Trial.from_plain(config["trial"]), lambda row: tune.report(scalars(row)))


def scalars(row: Row) -> Row:
    """What Ray carries of a row: numbers and names."""
    return {name: value for name, value in row.items() if isinstance(value, int | float | str)}
