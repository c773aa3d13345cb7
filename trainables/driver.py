"""From trials to Ray Tune: two executors around the same core, first in first out, each trial with its whole budget.

`train`: Ray Train's TorchTrainer with one worker or several, driven by a Tune trial that itself takes no resources.
`inprocess`: a Tune trial that holds the GPU, with a TorchTrainer of zero workers inside: no second process.
Results are read from the trials' own folders; Tune only places them.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import ray.train.torch
from ray import tune
from ray.tune.error import TuneError
from ray.tune.experiment import Trial as TuneTrial

from cggr_ray.files import write_whole
from cggr_ray.schema import FAILURE_FILE, SUMMARY_FILE, UNMIRRORED
from trainables.cluster import cluster
from trainables.scaling import Placement, place
from trainables.stopping import stoppable
from trainables.worker import train_in_process, train_worker

if TYPE_CHECKING:
    from cggr_ray.race import Trial

# A trial that dies is started again twice, and goes on from its checkpoint: by Tune, whichever of its processes it was.
FAILURES = tune.FailureConfig(max_failures=2)

log = logging.getLogger(__name__)

OnRow = Callable[[dict[str, Any]], None]
# What a worker is given, from a Tune configuration: see trainables.worker.
WorkOf = Callable[[dict[str, Any]], dict[str, Any]]


class Rows(tune.Callback):
    """Passes every report on, with the trial's id in it, and says why a trial has failed for good: in its folder too,
    or its race's report would take it for one that may still end well."""

    def __init__(self, on_row: OnRow) -> None:
        self._on_row = on_row

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes its callbacks to disk; the terminal behind this one cannot be written, and need not be."""
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: TuneTrial, result: dict[str, Any], **_: Any
    ) -> None:
        if not unmirrored(result):
            self._on_row(result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: TuneTrial, **_: Any) -> None:
        own = trial.config["trial"]
        lines = Path(trial.error_file).read_text().strip().splitlines() if trial.error_file else []
        message = lines[-1] if lines else "its process died"
        log.warning("%s has failed: %s", own["trial_id"], message)
        folder, which = Path(own["folder"]), {"trial_id": own["trial_id"], "recipe": own["recipe"]["name"]}
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FAILURE_FILE, json.dumps({**which, "seed": own["seed"], "message": message}, indent=1))


def unmirrored(row: dict[str, Any]) -> bool:
    """Whether a report is the last word of a trial whose mirror lacks its end, which is said."""
    if UNMIRRORED in row:
        log.warning("%s: its last upload has failed, its mirror lacks the end of it: %s", row["trial"], row[UNMIRRORED])
    return UNMIRRORED in row


def trainable(executor: str, placement: Placement, storage: Path, work_of: WorkOf) -> Callable[..., Any]:
    """A Tune function with its resources attached."""
    if executor == "inprocess":
        return tune.with_resources(
            lambda config: _in_process(work_of(config)), {k.lower(): v for k, v in placement.resources.items()}
        )
    # The driver of a nested trial must not hold a core that its worker waits for. Holding none, it is given one thread
    # by Ray, so the worker's count is settled here.
    head = tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
    threads = os.environ.get("OMP_NUM_THREADS", str(placement.cpus))
    return tune.with_resources(lambda config: _nested(work_of(config), placement, storage, threads), head)


def run_trials(
    trials: Sequence[Trial], folder: Path, executor: str, address: str | None, on_row: OnRow = lambda row: None
) -> list[str]:
    """Runs trials in their order; returns the ids of those that did not end with a summary.

    What a trial's folder says of an earlier failure is gone when it begins again.

    Raises:
        ValueError: the resources of a trial are not there; before anything starts.
        StoppedError: SIGTERM or Ctrl-C; what ran has been saved.
    """
    # Where the process of a nested trial dies, its worker gives its resources back only with the dashboard on.
    with cluster(address, dashboard=executor == "train") as machines, stoppable(folder) as ending:
        placement = place(trials[0].race.device, machines, trials[0].race.workers)
        for trial in trials:
            (Path(trial.folder) / FAILURE_FILE).unlink(missing_ok=True)
        session = f"session-{time.time_ns()}"
        storage = (folder / "ray").resolve()
        tuner = tune.Tuner(
            trainable(executor, placement, storage / session, lambda config: config),
            param_space={"trial": tune.grid_search([trial.to_plain() for trial in trials])},
            tune_config=tune.TuneConfig(max_concurrent_trials=placement.concurrent),
            run_config=tune.RunConfig(
                name=session,
                storage_path=str(storage),
                verbose=0,
                callbacks=[Rows(on_row), ending],
                stop=ending,
                failure_config=FAILURES,
            ),
        )
        fit(tuner)
    return [trial.trial_id for trial in trials if not (Path(trial.folder) / SUMMARY_FILE).is_file()]


def fit(tuner: tune.Tuner) -> None:
    """Runs an experiment. What a callback raises, as on a full disk, is raised as it is; Tune makes text of it."""
    try:
        tuner.fit()
    except TuneError as error:
        if error.__context__ is None:
            raise
        raise error.__context__ from None


def _in_process(work: dict[str, Any]) -> None:
    ray.train.torch.TorchTrainer(
        train_in_process,
        train_loop_config=work,
        scaling_config=ray.train.ScalingConfig(num_workers=0),
    ).fit()


def _nested(work: dict[str, Any], placement: Placement, storage: Path, threads: str) -> None:
    from ray.tune.integration.ray_train import TuneReportCallback

    ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config=work,
        scaling_config=ray.train.ScalingConfig(
            num_workers=placement.workers, use_gpu=placement.gpus > 0, resources_per_worker=placement.resources
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            # Train resumes a run of the same name: the name is unique to this session and trial.
            name=work["trial"]["trial_id"],
            storage_path=str(storage),
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    ).fit()
