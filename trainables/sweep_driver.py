"""From a sweep to Ray Tune, which places its trials and carries their reports. It remembers nothing that matters: after
a kill a new experiment is made from the sweep's own history, and Tune's pickled state is never read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search import Searcher
from ray.tune.stopper import CombinedStopper

from cggr_ray.mirror import NO_MIRROR, Unmirrored
from cggr_ray.stopping import Stop, never
from trainables.cluster import cluster
from trainables.driver import FAILURES, OnRow, fit, trainable, unmirrored
from trainables.history import History
from trainables.scaling import place, place_growing
from trainables.schedulers import own_id, replay
from trainables.settings import SweepSpec
from trainables.stopping import stoppable
from trainables.sweep import Sweep


class Unwritten:
    """Tune writes what it is given to disk; this is not, as the sweep's history is."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Draws(Unwritten, Searcher):
    """Gives Tune the trials of a sweep, at most `concurrent` of them at a time, and none once it is to end."""

    def __init__(self, sweep: Sweep, concurrent: int, stop: Stop = never) -> None:
        super().__init__()
        self._sweep, self._concurrent, self._stop = sweep, concurrent, stop

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        if len(self._sweep.running) >= self._concurrent:
            return None
        drawn = None if self._stop() else self._sweep.next()
        if drawn is None:
            return None if self._sweep.running else Searcher.FINISHED
        return {"trial_id": drawn.trial_id, "trial": self._sweep.trial(drawn).to_plain()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Told by `Reports`, which knows why."""

    def save(self, checkpoint_path: str) -> None:
        """There is nothing beside the sweep's history."""


class Reports(Unwritten, tune.Callback):
    """Tells a sweep what its trials report and how they end."""

    def __init__(self, sweep: Sweep, on_row: OnRow) -> None:
        self._sweep, self._on_row = sweep, on_row
        self._stopped: set[str] = set()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: TuneTrial, result: dict[str, Any], **_: Any
    ) -> None:
        if "trial" in result:
            self._sweep.report(result)
            if not unmirrored(result):
                self._on_row(result)
        if result.get("done"):
            self._stopped.add(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: TuneTrial, **_: Any) -> None:
        self._sweep.ended(own_id(trial), trial.last_result or {}, trial.trial_id in self._stopped)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: TuneTrial, **_: Any) -> None:
        lines = Path(trial.error_file).read_text().strip().splitlines() if trial.error_file else []
        self._sweep.failed(own_id(trial), lines[-1] if lines else "its process died")


class OwnBudget(Unwritten, tune.Stopper):
    """Cuts trials when the sweep's own budget is used up."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return self._sweep.cuts(result)

    def stop_all(self) -> bool:
        return False


def run_sweep(
    spec: SweepSpec,
    folder: Path,
    history: History,
    executor: str,
    address: str | None,
    growing: int | None = None,
    on_row: OnRow = lambda row: None,
    mirror: Unmirrored = NO_MIRROR,
) -> bool:
    """Runs a sweep, or what is left of it, until it is complete or its own budget is used up; returns False where
    something has interrupted it before.

    Args:
        growing: trials with a GPU side by side, where the cluster starts machines for them; else as many as there is
            room for.

    Raises:
        ValueError: the resources of a trial are not there, or another version wrote its checkpoint; before anything
            starts.
        StoppedError: SIGTERM or Ctrl-C; what ran has been saved.
    """
    search = spec.search
    saved, scheduler = search.scheduler.parks, search.scheduler.build(spec.race.budget_seconds)
    # First, or what a trial did while no sweep ran would make that time one of the sweep's.
    history.session()
    sweep = Sweep(spec, folder, history, mirror)
    sweep.stopped_before(replay(scheduler, history.events))

    # Nested trials that are stopped early give their GPU back only with the dashboard on.
    with cluster(address, dashboard=executor == "train") as machines, stoppable(folder) as ending:
        gpus = search.gpus_per_trial
        placement = place_growing(gpus, growing) if growing else place(spec.race.device, machines, gpus_per_trial=gpus)
        session, storage = f"session-{time.time_ns()}", (folder / "ray").resolve()

        def work_of(config: dict[str, Any]) -> dict[str, Any]:
            return {"trial": config["trial"], "searched": {"saved": saved}}

        tuner = tune.Tuner(
            trainable(executor, placement, storage / session, work_of),
            tune_config=tune.TuneConfig(
                num_samples=sweep.most_runs,
                search_alg=Draws(sweep, placement.concurrent, ending.asked),
                scheduler=scheduler,
            ),
            run_config=tune.RunConfig(
                name=session,
                storage_path=str(storage),
                verbose=0,
                callbacks=[Reports(sweep, on_row), ending],
                stop=CombinedStopper(OwnBudget(sweep), ending),
                failure_config=FAILURES,
            ),
        )
        fit(tuner)
    sweep.tidy()
    mirror.fetch_runs()
    return sweep.complete
