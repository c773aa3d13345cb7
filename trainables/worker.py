"""What runs where the GPU is: the Ray-free core with a reporter of the place it runs in.

The core is imported by the process that trains, when it does: the drivers of trials need none of it.
"""

from __future__ import annotations

import logging
from typing import Any


def train_worker(config: dict[str, Any]) -> None:
    """The `train_loop_per_worker` of a TorchTrainer with workers: reports to Ray Train."""
    import ray.train

    from cggr_ray.loop import run_race
    from cggr_ray.race import Trial

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_race(Trial.from_plain(config["trial"]), lambda row: ray.train.report(scalars(row)))


def train_in_process(config: dict[str, Any]) -> None:
    """The same for a TorchTrainer without workers, inside a Tune trial: there only Tune takes reports."""
    from ray import tune

    from cggr_ray.loop import run_race
    from cggr_ray.race import Trial

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    assert tune.get_context().get_trial_id(), "no Tune trial takes the reports"
    run_race(Trial.from_plain(config["trial"]), lambda row: tune.report(scalars(row)))


def scalars(row: dict[str, Any]) -> dict[str, Any]:
    """What Ray carries of a row: numbers and names."""
    return {name: value for name, value in row.items() if isinstance(value, int | float | str)}
