"""The same small sweep for every arm of a race, before it: what runs, what was best, and the race file it leads to.

Every entry of `tuning.values` is one trial of every recipe, on the race's model, data and order, with one validation at
its end: the race in small, with as small a part of its warm-up, or that would be most of a short trial. The lowest loss
of a recipe's finished trials decides; its values become the arm's own in tuned.toml.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import tomli_w

from cggr_ray.codec import read_json
from cggr_ray.paths import arm_name
from cggr_ray.race import RaceSpec, Trial, Tuning, plan_trial, refuse_doubles
from cggr_ray.recipe import Recipe
from cggr_ray.schema import SUMMARY_FILE, TOKENS_SEEN, TRAIN_SECONDS, VAL_LOSS
from cggr_ray.telemetry.tracker import Row
from cggr_ray.tried import at_the_edge


def tuning_of(spec: RaceSpec) -> Tuning:
    """The tuning of a race that has one; ValueError where it has none."""
    if spec.tuning is None:
        raise ValueError(f"race {spec.name!r} has no [tuning]; accepted: a race file with tuning seconds, seed, values")
    return spec.tuning


def plan_tuning(spec: RaceSpec, folder: Path) -> list[Trial]:
    """The trials entry by entry, all recipes of an entry together; `cggr_loss-1` is the first entry's.

    Raises:
        ValueError: the race has no tuning, or an entry does not fit one of its recipes, which is named.
    """
    tuning, trials = tuning_of(spec), []
    for number, values in enumerate(tuning.values):
        changed = spec.with_arms(dict.fromkeys(spec.recipes, values))
        try:
            changed.check()
        except ValueError as error:
            raise ValueError(f"tuning.values[{number}]: {error}") from None
        short = replace(
            changed,
            name=f"{spec.name}-tuning",
            seeds=(tuning.seed,),
            budget_seconds=tuning.seconds,
            milestones=(),
            save_model=False,
            save_heads=False,
            tuning=None,
            evaluation=None,
        )
        part = tuning.seconds / spec.budget_seconds
        planned = [plan_trial(short, name, tuning.seed, str(number + 1), folder) for name in spec.recipes]
        trials += [replace(trial, recipe=with_short_warmup(trial.recipe, part)) for trial in planned]
    refuse_doubles(trials)
    return trials


def with_short_warmup(recipe: Recipe, part: float) -> Recipe:
    """The recipe with a part of its warm-up, which is counted in tokens; all else follows the budget by itself."""
    schedule = recipe.optimizer.schedule
    short = replace(schedule, warmup_tokens=round(part * schedule.warmup_tokens))
    return replace(recipe, optimizer=replace(recipe.optimizer, schedule=short))


def tuning_rows(spec: RaceSpec, trials: Sequence[Trial]) -> list[Row]:
    """One row a trial, in the order of `plan_tuning`: its recipe, its values, how it ended and with which loss."""
    tried = [(name, values) for values in tuning_of(spec).values for name in spec.recipes]
    rows = []
    for (name, values), trial in zip(tried, trials, strict=True):
        file = Path(trial.folder) / SUMMARY_FILE
        summary = read_json(file) if file.is_file() else {"status": "failed"}
        row = {"trial_id": trial.trial_id, "recipe": name, "values": values, "status": summary["status"]}
        rows.append(row | {key: summary.get(key) for key in (VAL_LOSS, TRAIN_SECONDS, TOKENS_SEEN)})
    return rows


def best_rows(rows: Sequence[Row]) -> dict[str, Row]:
    """Each recipe's row of the lowest loss, of its trials that finished with a finite one; the first of equals."""
    best: dict[str, Row] = {}
    for row in rows:
        loss = row[VAL_LOSS]
        if row["status"] == "finished" and loss is not None and math.isfinite(loss):
            best[row["recipe"]] = min(best.get(row["recipe"], row), row, key=lambda r: float(r[VAL_LOSS]))
    return best


def notes(tuning: Tuning, best: Mapping[str, Row]) -> list[str]:
    """A line for each recipe: what was best, and where the optimum may lie beyond what was tried."""
    lines = []
    for name, row in ((arm_name(recipe, best), row) for recipe, row in best.items()):
        lines.append(f"{name}: val/loss {row[VAL_LOSS]:.4f} with {json.dumps(row['values'])}")
        for key, end in at_the_edge(row["values"], tuning.values).items():
            lines.append(f"{name}: {key} = {row['values'][key]} is at the edge, the {end} value tried: "
                         "the optimum may lie beyond")  # fmt: skip
    return lines


def write_tuned(spec: RaceSpec, rows: Sequence[Row], path: Path) -> None:
    """The race's file with each arm's best values; what was tried and how it ended stands above it as comments."""
    tuning, best = tuning_of(spec), best_rows(rows)
    comments = [
        f"Tuned: {len(tuning.values)} trials of {tuning.seconds:g} train seconds for every arm, seed {tuning.seed}.",
        *notes(tuning, best),
        *(f"{row['trial_id']}: {row['status']}" for row in rows if row["status"] != "finished"),
    ]
    # The mirror is the tuning's.
    tuned = replace(spec.with_arms({name: row["values"] for name, row in best.items()}), mirror=None)
    head = "".join(f"# {line}\n" for line in comments)
    path.write_text(f"{head}\n{tomli_w.dumps(tuned.to_plain())}", encoding="utf-8")
