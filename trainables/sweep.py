"""A sweep: Ray Tune searches one recipe's space; every trial has the same budget of train seconds.

Successive halving (ASHA) looks at validation losses at fixed fractions of the budget, on the budget's clock. Results
are rows in sweep.jsonl, written as trials end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from cggr_ray.race import RaceSpec, Trial
from cggr_ray.recipe import load_recipe
from cggr_ray.schema import RUNS_FOLDER, SUMMARY_FILE, SWEEP_FILE, TOKENS_SEEN, TRAIN_SECONDS, VAL_LOSS
from cggr_ray.telemetry.tracker import Row
from search_spaces import Space
from trainables.cluster import cluster
from trainables.driver import OnRow, Rows, trainable
from trainables.scaling import place

# Rungs of successive halving: the first at this fraction of the budget, each next at twice the one before.
FIRST_RUNG, REDUCTION = 0.125, 2
# The core stops itself at its budget; the scheduler must not stop it first and lose the final validation.
NEVER = 1_000_000


class SweepRows(tune.Callback):
    """Appends a row to sweep.jsonl for every trial that ends: its values, how it ended, its last validation."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: TuneTrial, **_: Any) -> None:
        summary = self._folder / RUNS_FOLDER / trial.trial_id / SUMMARY_FILE
        self._write(trial, json.loads(summary.read_text())["status"] if summary.is_file() else "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: TuneTrial, **_: Any) -> None:
        self._write(trial, "failed")

    def _write(self, trial: TuneTrial, status: str) -> None:
        last = trial.last_result or {}
        row = {"trial_id": trial.trial_id, "status": status, "values": trial.config["values"]}
        row |= {name: last.get(name) for name in (TRAIN_SECONDS, TOKENS_SEEN, VAL_LOSS)}
        with (self._folder / SWEEP_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def sweep_spec(spec: RaceSpec) -> RaceSpec:
    """The race's specification with a validation at every rung."""
    rungs, at = [], FIRST_RUNG
    while at < 1:
        rungs.append(at)
        at *= REDUCTION
    return replace(spec, milestones=tuple(rungs))


def sweep_trial(spec: RaceSpec, recipe_name: str, values: Mapping[str, Any], trial_id: str, folder: Path) -> Trial:
    """The trial of one draw. A part that is replaced whole comes before the keys inside it."""
    ordered = dict(sorted(values.items(), key=lambda item: item[0].count(".")))
    changed = {**spec.values, **spec.arms.get(recipe_name, {}), **ordered}
    recipe = spec.at_own_rate(recipe_name, load_recipe(recipe_name).with_values(changed))
    where, data = (folder / RUNS_FOLDER / trial_id).resolve(), (folder / "data").resolve()
    seed = spec.seeds[0]
    return Trial(trial_id, recipe, seed, spec.of_arm(recipe_name, seed), str(where), str(data), changed)


def run_sweep(
    spec: RaceSpec,
    space: Space,
    folder: Path,
    trials: int,
    seed: int,
    early_stopping: bool,
    executor: str,
    address: str | None,
    on_row: OnRow = lambda row: None,
) -> None:
    """Draws `trials` configurations at random and runs them, each under the budget of `spec`."""
    # Nested trials that are stopped early give their GPU back only with the dashboard on.
    with cluster(address, dashboard=early_stopping and executor == "train") as resources:
        placement = place(spec.device, resources)
        storage, spec = (folder / "ray").resolve(), sweep_spec(spec)

        def trial_of(config: dict[str, Any]) -> dict[str, Any]:
            trial_id = tune.get_context().get_trial_id()
            return sweep_trial(spec, space.recipe, config["values"], trial_id, folder).to_plain()

        tune.Tuner(
            trainable(executor, placement, storage / "trainers", trial_of),
            param_space={"values": space.domains()},
            tune_config=tune.TuneConfig(
                num_samples=trials,
                search_alg=BasicVariantGenerator(random_state=seed, max_concurrent=placement.concurrent),
                scheduler=successive_halving(spec.budget_seconds) if early_stopping else FIFOScheduler(),
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=str(storage),
                verbose=0,
                callbacks=[Rows(on_row), SweepRows(folder)],
            ),
        ).fit()


def successive_halving(budget_seconds: float) -> ASHAScheduler:
    """ASHA on the budget's own clock: after each rung only the better half goes on."""
    return ASHAScheduler(
        time_attr=TRAIN_SECONDS,
        metric=VAL_LOSS,
        mode="min",
        grace_period=FIRST_RUNG * budget_seconds,  # type: ignore[arg-type]
        max_t=NEVER,
        reduction_factor=REDUCTION,
    )


def best_rows(folder: Path, most: int = 5) -> list[Row]:
    """The rows of sweep.jsonl with the lowest validation loss, of trials that used their whole budget."""
    lines = (folder / SWEEP_FILE).read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["status"] == "finished" and row[VAL_LOSS] is not None]
    return sorted(rows, key=lambda row: float(row[VAL_LOSS]))[:most]
