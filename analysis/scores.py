"""Losses and evaluation scores at equal time and at equal tokens, milestone by milestone.

A milestone may carry scores `eval/<task>/<measure>`, of which more is better, with the number of questions
`eval/<task>/n` and the ends of an interval over questions, `<score>_low` and `<score>_high`. One score of each task is
judged at the end of the budget, like losses, in pairs of one seed and all tasks together; the others, and those before
the end, are figures without a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.frames import IDENTITY, Race
from analysis.judging import Quantity, judge, weighed
from analysis.measures import equal_tokens, finished_runs, loss_at_tokens
from analysis.stats import mean_interval
from cggr_ray.schema import EVAL, FRACTION, STEP, TRAIN_SECONDS, VAL_LOSS

PREFIX = f"{EVAL}/"
QUESTIONS = "n"
# What a task says about its answers beside how many were right.
DESCRIPTIONS = (QUESTIONS, "valid", "truncated", "disagreements")
# The measure of a task that is judged: the first of these that it has.
PRIMARY = ("verified", "strict", "avg_at_n", "accuracy")
ENDS = ("_low", "_high")
TOKEN_PARTS = (0.25, 0.5, 0.75, 1.0)


def score_names(race: Race) -> list[str]:
    """The scores that any milestone of the race carries."""
    columns = [str(name) for name in race.milestones.columns if str(name).startswith(PREFIX)]
    scores = [name for name in columns if name.rsplit("/", 1)[1] not in DESCRIPTIONS]
    return [name for name in scores if not (name.endswith(ENDS) and name.rsplit("_", 1)[0] in scores)]


def primary_scores(race: Race) -> list[str]:
    """The score of each task that is judged; none of a task without any of PRIMARY."""
    names = score_names(race)
    found = [[f"{task}/{measure}" for measure in PRIMARY if f"{task}/{measure}" in names] for task in task_names(race)]
    return [own[0] for own in found if own]


def task_names(race: Race) -> list[str]:
    """The tasks that were asked, as `eval/<task>`; one without a question answered in time has no score."""
    columns = [str(name) for name in race.milestones.columns if str(name).startswith(PREFIX)]
    return list(dict.fromkeys(name.rsplit("/", 1)[0] for name in columns))


def questions_of(score: str) -> str:
    """The column with the number of questions behind a score."""
    return f"{score.rsplit('/', 1)[0]}/{QUESTIONS}"


def marks(race: Race) -> list[float]:
    """Fractions of the budget at which the race's milestones lie; the end alone where no specification names any."""
    named = race.spec.get("spec", {}).get("milestones", ())
    return sorted({*(float(mark) for mark in named), 1.0})


def marked_milestones(race: Race) -> pd.DataFrame:
    """Milestones of finished runs with the `mark` they belong to: the last one at or before them."""
    every = race.milestones[race.milestones["trial_id"].isin(finished_runs(race)["trial_id"])].sort_values(STEP)
    known = np.array([-math.inf, *marks(race)])
    at = known[np.searchsorted(known, every[FRACTION].to_numpy(float) + 1e-9, side="right") - 1]
    return every.assign(mark=at).drop_duplicates(["trial_id", "mark"], keep="last")


def at_marks(race: Race, metric: str = VAL_LOSS) -> pd.DataFrame:
    """One row a recipe and milestone: the metric at equal time; columns as of `_against_baseline`, `at` in seconds.

    A mark that a long step of every run passed over has no row.
    """
    rows = marked_milestones(race)
    tables = []
    for mark in marks(race) if metric in rows.columns else []:
        here = rows[rows["mark"] == mark]
        values, at = here.set_index(list(IDENTITY))[metric], float(here[TRAIN_SECONDS].mean())
        tables += [_against_baseline(race, values, mark, at)] if len(here) else []
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def at_tokens(race: Race, metric: str = VAL_LOSS, parts: Sequence[float] = TOKEN_PARTS) -> pd.DataFrame:
    """One row a recipe and part of the tokens that every finished run has read: the metric, interpolated there."""
    rows = race.milestones[race.milestones["trial_id"].isin(finished_runs(race)["trial_id"])]
    if metric not in rows.columns or rows.empty:
        return pd.DataFrame()
    positions = {part: part * equal_tokens(race) for part in parts}
    tables = [_against_baseline(race, loss_at_tokens(rows, at, metric), part, at) for part, at in positions.items()]
    return pd.concat(tables, ignore_index=True)


def score_claims(race: Race) -> pd.DataFrame:
    """The verdicts of `analysis.judging.judge` on the primary scores at the end, with `supported` as of `weighed`."""
    samples, uneven = {}, set()
    for score in primary_scores(race):
        quantity = Quantity(score.removeprefix(PREFIX), "", +1, "better", "worse")
        final, asked = at_the_end(race, score), at_the_end(race, questions_of(score))
        for recipe in (name for name in race.recipes if name != race.baseline):
            seeds = [seed for name, seed in final if name == recipe and (race.baseline, seed) in final]
            pairs = [((recipe, seed), (race.baseline, seed)) for seed in seeds]
            samples[recipe, quantity] = np.array([final[own] - final[base] for own, base in pairs])
            if asked and any(asked[own] != asked[base] for own, base in pairs):
                uneven.add((recipe, quantity.name))
    return weighed(race, judge(samples), uneven)


def final_scores(race: Race) -> pd.DataFrame:
    """One row a finished run and score at its last milestone: `value`, `questions`, and `low`, `high` where known."""
    rows = []
    for milestone in _last(race).to_dict("records"):
        for score in score_names(race):
            row = {name: milestone[name] for name in IDENTITY} | {"score": score, "value": milestone[score]}
            row["questions"] = milestone.get(questions_of(score), math.nan)
            rows.append(row | {end[1:]: milestone.get(f"{score}{end}", math.nan) for end in ENDS})
    return pd.DataFrame(rows)


def final_answers(race: Race) -> pd.DataFrame:
    """One row a finished run and task at its last milestone: DESCRIPTIONS of its answers, NaN where it says nothing."""
    rows = []
    for milestone in _last(race).to_dict("records"):
        for task in task_names(race):
            row = {name: milestone[name] for name in IDENTITY} | {"task": task.removeprefix(PREFIX)}
            rows.append(row | {name: milestone.get(f"{task}/{name}", math.nan) for name in DESCRIPTIONS})
    return pd.DataFrame(rows)


def unequal_questions(race: Race) -> list[str]:
    """Scores whose runs answered different numbers of questions at the end: a time cap cut some of them short."""
    last = _last(race)
    names = [name for name in score_names(race) if questions_of(name) in last.columns]
    return [name for name in names if last[questions_of(name)].dropna().nunique() > 1]


def at_the_end(race: Race, metric: str) -> dict[tuple[str, int], float]:
    """A metric of every finished run at the end, by recipe and seed; empty where no milestone carries it."""
    last = _last(race)
    if metric not in last.columns:
        return {}
    keys = zip(last["recipe"], last["seed"], strict=True)
    return {(str(recipe), int(seed)): float(value) for (recipe, seed), value in zip(keys, last[metric], strict=True)}


def _last(race: Race) -> pd.DataFrame:
    rows = marked_milestones(race)
    return rows[rows["mark"] == 1.0].sort_values("trial_id")


def _against_baseline(race: Race, values: pd.Series, mark: float, at: float) -> pd.DataFrame:
    """One row a recipe: `mark`, where it lies (`at`), `value` over `seeds`, `difference` to the baseline over `pairs`.

    Both with half widths.
    """
    rows = []
    names, seeds = (values.index.get_level_values(name) for name in IDENTITY[1:])
    by_run = {(str(name), int(seed)): float(v) for name, seed, v in zip(names, seeds, values, strict=True)}
    base = {seed: value for (recipe, seed), value in by_run.items() if recipe == race.baseline}
    for recipe in race.recipes:
        own = {seed: value for (name, seed), value in by_run.items() if name == recipe}
        row: dict[str, object] = {"recipe": recipe, "mark": mark, "at": at, "seeds": len(own)}
        row["value"], row["value_half_width"] = mean_interval(own.values())
        pairs = [own[seed] - base[seed] for seed in own if seed in base and recipe != race.baseline]
        row["pairs"] = len(pairs)
        row["difference"], row["difference_half_width"] = mean_interval(pairs)
        rows.append(row)
    return pd.DataFrame(rows)
