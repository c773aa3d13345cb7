"""What a race says about its recipes, as pure functions on frames.

Per-run measures are read off the milestones by linear interpolation; over seeds they become a mean with the half width
of a Student t interval. Differences are paired by seed: both runs of a pair saw the same rows in the same order, so
what the seed does to both cancels. Losses in nats/token, times in train seconds, memory in MiB. Whether a difference is
more than chance is said in `analysis.judging`.

Only finished runs are compared: the last loss of a run that stopped early is not a loss at equal time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.frames import IDENTITY, Race
from analysis.stats import mean_interval
from cggr_ray.schema import FRACTION, GRAD_NORM, LEDGERS, TOKENS_SEEN, TRAIN_SECONDS, VAL_LOSS

FINISHED = "finished"
RUN_KEYS = list(IDENTITY)
# Per-run measures that `comparison` turns into a mean and a half width over seeds.
MEASURES = (
    "final_loss",
    "loss_difference",
    "loss_at_equal_tokens",
    "seconds_to_baseline_loss",
    "tokens_seen",
    "tokens_per_second",
    "steps",
    "peak_memory_mib",
)
# Columns of the runs frame, one a source.
EPOCHS = "epochs/"
PAIRED = ("loss_difference", "seconds_to_baseline_loss")
# The part of the budget over which `saturation` looks at the slope.
LAST_PART = 0.25
# The part of the budget before `stability` looks, and how many of its medians a gradient norm is far beyond.
FIRST_PART, FAR = 0.1, 10.0


def loss_at_time(milestones: pd.DataFrame, seconds: float, metric: str = VAL_LOSS) -> pd.Series:
    """The metric of every run at `seconds` of training; NaN outside what the run's milestones span."""
    return _per_run(milestones, metric, lambda rows: _interpolate(rows, TRAIN_SECONDS, metric, seconds))


def loss_at_tokens(milestones: pd.DataFrame, tokens: float, metric: str = VAL_LOSS) -> pd.Series:
    """The metric of every run after `tokens` tokens seen; NaN outside what the run's milestones span."""
    return _per_run(milestones, metric, lambda rows: _interpolate(rows, TOKENS_SEEN, metric, tokens))


def time_to_loss(milestones: pd.DataFrame, target: float | Mapping[int, float], metric: str = VAL_LOSS) -> pd.Series:
    """Train seconds until every run first reaches `target` (one number, or one a seed); NaN if it never does."""

    def seconds(rows: pd.DataFrame) -> float:
        goal = target.get(int(rows["seed"].iloc[0]), math.nan) if isinstance(target, Mapping) else target
        return _first_crossing(rows, metric, goal)

    return _per_run(milestones, metric, seconds)


def run_measures(race: Race, metric: str = VAL_LOSS) -> pd.DataFrame:
    """One row a finished run with its MEASURES; paired ones are NaN without a baseline run of the same seed.

    `seconds_to_baseline_loss` is when the run reaches the final loss of its seed's baseline.
    Raises ValueError if a recipe has two runs of one seed: a pair would be ambiguous.
    """
    runs = comparable_runs(race)
    milestones = race.milestones[race.milestones["trial_id"].isin(runs["trial_id"])]
    final = _per_run(milestones, metric, lambda rows: float(rows[metric].iloc[-1]))
    base = _by_seed(final, race.baseline)
    reached = time_to_loss(milestones, base, metric)
    tokens = equal_tokens(race)
    table = runs[RUN_KEYS].reset_index(drop=True)
    index = pd.MultiIndex.from_frame(table)
    table["paired"] = table["seed"].isin(list(base))
    table["final_loss"] = final.reindex(index).to_numpy()
    table["loss_difference"] = table["final_loss"] - table["seed"].map(base)
    table["loss_at_equal_tokens"] = loss_at_tokens(milestones, tokens, metric).reindex(index).to_numpy()
    table["seconds_to_baseline_loss"] = reached.reindex(index).to_numpy()
    table["tokens_seen"] = runs["tokens_seen"].to_numpy()
    table["tokens_per_second"] = (runs["tokens_seen"] / runs["train_seconds"]).to_numpy()
    table["steps"] = runs["steps"].to_numpy()
    table["peak_memory_mib"] = runs["peak_memory_mib"].to_numpy()
    return table


def comparison(race: Race, metric: str = VAL_LOSS) -> pd.DataFrame:
    """One row a recipe, the baseline first: counts, then every measure with its `_half_width` over seeds.

    `seeds` counts finished runs and `runs` all of them; `pairs` those with a baseline of the same seed, `reached` the
    pairs that got to the baseline's final loss. Its seconds are NaN unless every pair got there. The peak of memory is
    that of the `measured` runs whose device said it: not to have been asked is no outcome of a run.
    """
    measured = run_measures(race, metric)
    rows = []
    for recipe in race.recipes:
        own = measured[measured["recipe"] == recipe]
        pairs = own[own["paired"]]
        row: dict[str, object] = {
            "recipe": recipe,
            "seeds": len(own),
            "runs": int((race.runs["recipe"] == recipe).sum()),
            "pairs": len(pairs),
            "reached": int(pairs["seconds_to_baseline_loss"].notna().sum()),
        }
        row["measured"] = int(own["peak_memory_mib"].notna().sum())
        for name in MEASURES:
            sample = (pairs if name in PAIRED else own)[name]
            known = sample.dropna() if name == "peak_memory_mib" else sample
            row[name], row[f"{name}_half_width"] = mean_interval(known)
        rows.append(row)
    return pd.DataFrame(rows)


def saturation(race: Race, metric: str = VAL_LOSS) -> pd.DataFrame:
    """One row a recipe: `change` of the metric over the last quarter of its seconds, and the slope `per_minute`.

    Both are means over `seeds` with `_half_width`. The change is that from the interpolated metric at three quarters to
    the last, so it needs a milestone before; below zero a loss still fell: another budget could rank otherwise.
    """
    rows = []
    milestones = race.milestones[race.milestones["trial_id"].isin(finished_runs(race)["trial_id"])]
    change = _per_run(milestones, metric, lambda own: _late_change(own, metric)[0])
    minutes = _per_run(milestones, metric, lambda own: _late_change(own, metric)[1] / 60)
    recipe_of = change.index.get_level_values("recipe")
    for recipe in race.recipes:
        own, slopes = change[recipe_of == recipe], (change / minutes)[recipe_of == recipe]
        row: dict[str, object] = {"recipe": recipe, "seeds": len(own)}
        row["change"], row["change_half_width"] = mean_interval(own)
        row["per_minute"], row["per_minute_half_width"] = mean_interval(slopes)
        rows.append(row)
    return pd.DataFrame(rows)


def _late_change(rows: pd.DataFrame, metric: str) -> tuple[float, float]:
    """Change of the metric over the last part of a run, and the train seconds it took."""
    end = float(rows[TRAIN_SECONDS].iloc[-1])
    start = (1 - LAST_PART) * end
    return float(rows[metric].iloc[-1]) - _interpolate(rows, TRAIN_SECONDS, metric, start), end - start


def finished_runs(race: Race) -> pd.DataFrame:
    """The rows of the runs frame that can be compared, with the summary's columns present even if all are empty."""
    wanted = ("tokens_seen", "train_seconds", "steps", "peak_memory_mib")
    missing = {name: math.nan for name in wanted if name not in race.runs.columns}
    return race.runs[race.runs["status"] == FINISHED].assign(**missing)


def comparable_runs(race: Race) -> pd.DataFrame:
    """The finished runs; ValueError if a recipe has two of one seed: a pair would be ambiguous."""
    runs = finished_runs(race)
    twice = runs.duplicated(["recipe", "seed"], keep=False)
    if twice.any():
        raise ValueError(f"runs {sorted(runs.loc[twice, 'trial_id'])}; accepted: one run a recipe and seed")
    return runs


def epochs(race: Race) -> dict[str, dict[str, float]]:
    """How often the finished runs of each recipe that has some read each source, on average."""
    names = [str(name) for name in race.runs.columns if str(name).startswith(EPOCHS)]
    passes = finished_runs(race).groupby("recipe")[names].mean()
    return {
        str(recipe): {str(name).removeprefix(EPOCHS): float(value) for name, value in row.items()}
        for recipe, row in zip(passes.index, passes.to_dict("records"), strict=True)
    }


def equal_tokens(race: Race) -> float:
    """The most tokens that every finished run has seen: the smallest of their last milestones, NaN without any."""
    ids = finished_runs(race)["trial_id"]
    finished = race.milestones[race.milestones["trial_id"].isin(ids)]
    return float(finished.groupby("trial_id")[TOKENS_SEEN].max().min()) if len(finished) else math.nan


def stability(race: Race) -> pd.DataFrame:
    """One row a run: the norm of its gradients before clipping, as logged after the first tenth of the budget.

    `median` and `largest` of them, `far`, the share beyond ten medians, and `skipped_steps`, which had no finite one.
    """
    logged = race.steps.reindex(columns=["trial_id", FRACTION, GRAD_NORM]).dropna()
    norms = logged[logged[FRACTION] > FIRST_PART].groupby("trial_id")[GRAD_NORM]
    by_run = pd.DataFrame({"median": norms.median(), "largest": norms.max()})
    by_run["far"] = norms.agg(lambda own: float((own > FAR * own.median()).mean()))
    table = race.runs.reindex(columns=[*RUN_KEYS, "status", "skipped_steps"])
    return table.join(by_run, on="trial_id")


def ledger_check(race: Race) -> pd.DataFrame:
    """Per run with a summary: whether its eight ledgers add up to the wall clock, and how far it overran the budget.

    `difference_percent` is (ledgers - wall) / wall; `overrun_steps` is the overrun in lengths of the last step.
    """
    wanted = ("wall_seconds", "overrun_seconds", "last_step_seconds")
    runs = race.runs.assign(**{name: math.nan for name in wanted if name not in race.runs.columns})
    runs = runs[runs["wall_seconds"].notna()].reset_index(drop=True)
    table = runs[[*RUN_KEYS, "status"]].copy()
    ledgers = runs[[f"ledger/{name}" for name in LEDGERS]].astype(float)
    table["ledger_seconds"] = ledgers.sum(axis=1, min_count=len(LEDGERS))
    table["wall_seconds"] = runs["wall_seconds"]
    table["difference_percent"] = 100 * (table["ledger_seconds"] - table["wall_seconds"]) / table["wall_seconds"]
    table["overrun_seconds"] = runs["overrun_seconds"]
    table["last_step_seconds"] = runs["last_step_seconds"]
    table["overrun_steps"] = runs["overrun_seconds"] / runs["last_step_seconds"]
    return table


def order_check(race: Race) -> pd.DataFrame:
    """Per run with a summary: whether it read the same rows as every other run of its data seed.

    A mark is a hash of the first so many rows, and is compared where another run has a mark at the same count.
    `disagrees_with` lists the trials with another hash; `agree` is missing where there was nothing to compare.
    """
    runs = race.runs.assign(**{name: None for name in ("order", "data_seed") if name not in race.runs.columns})
    known: list[dict[Any, Any]] = [run for run in runs.to_dict("records") if isinstance(run["order"], dict)]
    rows = []
    for run in known:
        peers = [peer for peer in known if _same_data(run, peer)]
        shared = {mark for mark in run["order"] for peer in peers if mark in peer["order"]}
        others = [
            str(peer["trial_id"])
            for peer in peers
            if any(mark in peer["order"] and peer["order"][mark] != run["order"][mark] for mark in shared)
        ]
        verdict = (not others) if shared else pd.NA
        rows.append([*(run[key] for key in ("trial_id", "recipe", "seed", "data_seed")), len(shared), others, verdict])
    columns = ["trial_id", "recipe", "seed", "data_seed", "marks_compared", "disagrees_with", "agree"]
    return pd.DataFrame(rows, columns=columns).astype({"agree": "boolean"})


def _same_data(run: Mapping[Any, Any], peer: Mapping[Any, Any]) -> bool:
    return bool(peer["trial_id"] != run["trial_id"] and peer["data_seed"] == run["data_seed"])


def _by_seed(values: pd.Series, recipe: str) -> dict[int, float]:
    """A per-run measure of one recipe, by seed."""
    own = values[values.index.get_level_values("recipe") == recipe]
    return dict(zip(own.index.get_level_values("seed"), own, strict=True))


def _per_run(milestones: pd.DataFrame, metric: str, measure: Callable[[pd.DataFrame], float]) -> pd.Series:
    """`measure` of each run's milestones in order of train time, indexed by trial id, recipe and seed."""
    if len(milestones) and metric not in milestones.columns:
        accepted = [str(name) for name in milestones.columns if str(name).startswith(("val/", "eval/"))]
        raise ValueError(f"metric {metric!r}; accepted: {', '.join(accepted) or 'none, the milestones hold no metric'}")
    groups = {key: measure(rows.sort_values(TRAIN_SECONDS)) for key, rows in milestones.groupby(RUN_KEYS, sort=False)}
    index = pd.MultiIndex.from_tuples(list(groups), names=RUN_KEYS)
    return pd.Series(list(groups.values()), index=index, name=metric, dtype=float)


def _interpolate(rows: pd.DataFrame, position: str, metric: str, at: float) -> float:
    known = rows[[position, metric]].dropna()
    if known.empty:
        return math.nan
    return float(np.interp(at, known[position], known[metric], left=math.nan, right=math.nan))


def _first_crossing(rows: pd.DataFrame, metric: str, goal: float) -> float:
    known = rows[[TRAIN_SECONDS, metric]].dropna()
    return first_crossing(known[TRAIN_SECONDS].to_numpy(float), known[metric].to_numpy(float), goal)


def first_crossing(times: np.ndarray, losses: np.ndarray, goal: float) -> float:
    """Where the line through (times, losses) first comes down to `goal`; NaN if it never does."""
    below = np.flatnonzero(losses <= goal)
    if len(below) == 0:
        return math.nan
    after = int(below[0])
    if after == 0:
        return float(times[0])
    part = (losses[after - 1] - goal) / (losses[after - 1] - losses[after])
    return float(times[after - 1] + part * (times[after] - times[after - 1]))
