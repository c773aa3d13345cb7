"""The tables of a report that compare: verdicts, milestones, targets, efficiency, profiles, saturation, scores.

Each is Markdown as of `analysis.tables.table`; `[a, b]` is a 95 % interval, `x` a factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd

from analysis.frames import Race
from analysis.judging import RATIO, claims, part_kinds
from analysis.measures import comparison, saturation
from analysis.scores import (
    PREFIX,
    at_marks,
    at_the_end,
    at_tokens,
    final_answers,
    final_scores,
    score_claims,
    score_names,
)
from analysis.stats import mean_interval
from analysis.tables import NONE, figure, table
from analysis.targets import TAUS, efficiency, performance_profile, target_losses, target_times
from cggr_ray.schema import VAL_LOSS

Row = dict[Any, Any]
# What of an efficiency is a bound where it has one.
BOUNDED = ("speed_up", "tokens", "value")


def verdict_table(race: Race) -> str:
    """One row an arm and quantity of `analysis.judging.claims`."""
    headers = ("quantity", *_JUDGED)
    rows = claims(race).to_dict("records")
    return table(headers, [[f"{row['quantity']} ({row['unit']})", *_judged(row, 4)] for row in rows])


def score_table(race: Race) -> str:
    """One row an arm and task at the end of the budget: its judged score, with the baseline's mean."""
    rows = []
    for row in score_claims(race).to_dict("records"):
        ends = at_the_end(race, f"{PREFIX}{row['quantity']}").items()
        mean, half = mean_interval(value for (recipe, _), value in ends if recipe == race.baseline)
        rows.append([str(row["quantity"]), figure(mean, 3, half), *_judged(row, 3)])
    return table(("score", "baseline", *_JUDGED), rows)


_JUDGED = ("arm", "verdict", "difference", "95 % interval", "p (Holm)", "detectable", "pairs")


def _judged(row: Row, digits: int) -> list[str]:
    """The cells under _JUDGED of a row of `judge`."""
    if row["unit"] == RATIO:
        middle, ends = factor(row["difference"]), interval(row["low"], row["high"], 3)
        up = 1 + row["detectable"]
        seen = NONE if math.isnan(up) else f"beyond {factor(up)} or {factor(1 / up)}"
        if row.get("bound"):
            middle, ends, seen = f"{row['bound']} {middle}", NONE, NONE
    else:
        middle, ends = (
            figure(row["difference"], digits, sign=True),
            interval(row["low"], row["high"], digits, sign=True),
        )
        seen = figure(row["detectable"], digits)
    bold = "**" if row["supported"] else ""
    verdict = f"{bold}{row['verdict']}{bold}"
    return [str(row["recipe"]), verdict, middle, ends, p_value(row["p_holm"]), seen, str(row["pairs"])]


def milestones_table(race: Race, metric: str = VAL_LOSS) -> str:
    """One row a recipe, one column a milestone: the metric at equal time, and its difference to the baseline."""
    return _positions(race, at_marks(race, metric), lambda at: f"{at:,.1f} s", 4 if metric == VAL_LOSS else 3)


def tokens_table(race: Race, metric: str = VAL_LOSS) -> str:
    """The same at equal tokens: parts of the most that every finished run has read, where some recipe has figures."""
    rows = at_tokens(race, metric)
    return _positions(race, rows, lambda at: f"{at / 1e6:,.3f} M tokens", 4 if metric == VAL_LOSS else 3)


def _positions(race: Race, rows: pd.DataFrame, label: Callable[[float], str], digits: int) -> str:
    rows = rows[rows.groupby("mark")["value"].transform("count") > 0] if len(rows) else rows
    places: Iterable[float] = rows.drop_duplicates("mark")["at"] if len(rows) else []
    cells: dict[str, list[str]] = {recipe: [] for recipe in race.recipes}
    for row in rows.to_dict("records"):
        spread = row["value_half_width"] if row["recipe"] == race.baseline else math.nan
        text = figure(row["value"], digits, spread)
        against = figure(row["difference"], digits, row["difference_half_width"], sign=True)
        cells[row["recipe"]].append(text if against == NONE else f"{text} ({against})")
    return table(("recipe", *map(label, places)), [[recipe, *own] for recipe, own in cells.items()])


def targets_table(race: Race) -> str:
    """One row a recipe, one column a target loss: seconds to it, and the speed-up against the baseline."""
    cells: dict[str, list[str]] = {recipe: [] for recipe in race.recipes}
    for row in target_times(race).to_dict("records"):
        cells[row["recipe"]].append(_target_cell(row, row["recipe"] == race.baseline))
    headers = ("recipe", *(f"{goal:.4f} nats/token" for goal in target_losses(race)))
    return table(headers, [[recipe, *own] for recipe, own in cells.items()])


def _target_cell(row: Row, is_baseline: bool) -> str:
    ratio = with_interval(row, "speed_up")
    censored = row["reached"] < row["seeds"] or not row["seeds"]
    if censored:
        return f"{row['reached']} of {row['seeds']}" + (f", {ratio}" if row["bound"] else "")
    seconds = f"{row['seconds_bound']} {figure(row['seconds'], 1, row['seconds_half_width'])}".lstrip()
    return seconds if is_baseline or ratio == NONE else f"{seconds}; {ratio}"


def profile_table(race: Race) -> str:
    """One row a recipe: the share of targets x seeds within a factor of the fastest recipe, and the area below it."""
    rows = performance_profile(race).to_dict("records")
    headers = ("recipe", "targets x seeds", *(f"within {tau:g}x" for tau in TAUS), "area")
    return table(
        headers,
        [[row["recipe"], str(row["problems"]), *(figure(row[key], 2) for key in (*TAUS, "area"))] for row in rows],
    )


def efficiency_table(race: Race) -> str:
    """One row an arm: what it takes to the loss it shares with the baseline, and what a kept token is worth.

    Columns without a figure for any arm are left out.
    """
    memory = comparison(race).set_index("recipe")["peak_memory_mib"]
    chance = next((name for name in race.recipes if part_kinds(race, name).get("tokens") == "random_tokens"), None)
    selected = efficiency(race, chance).set_index("recipe") if chance else pd.DataFrame()
    rows = []
    for row in efficiency(race).to_dict("records"):
        recipe, kept = row["recipe"], row["kept"]
        cells = [recipe, figure(row["goal"], 4), with_interval(row, "speed_up"), with_interval(row, "tokens")]
        cells += [figure(kept, 3), with_interval(row, "value", 2), with_interval(row, "break_even", 2)]
        cells += [figure((1 + 2 * kept) / (3 * kept), 2) if kept < 1 else NONE]
        against = selected.loc[recipe].to_dict() if recipe in selected.index else {}
        cells += [with_interval(against, "value", 2) if kept < 1 and against else NONE]
        rows.append([*cells, factor(memory[recipe] / memory[race.baseline])])
    headers = ("arm", "common loss (nats/token)", "speed-up", "token efficiency", "kept", "value of a kept token")
    more = ("break-even", "(1+2r)/(3r)", f"value against {chance or 'chance'}", "peak memory")
    columns = zip((*headers, *more), zip(*rows, strict=True), strict=True)
    shown = [(header, cells) for header, cells in columns if set(cells) != {NONE}]
    return table([header for header, _ in shown], zip(*(cells for _, cells in shown), strict=True))


def saturation_table(race: Race) -> str:
    """One row a recipe: the change of its loss over the last quarter of the budget."""
    rows = []
    for row in saturation(race).to_dict("records"):
        change, half = row["change"], row["change_half_width"]
        words = "one seed" if row["seeds"] == 1 else NONE
        if not math.isnan(half):
            words = "no change shown" if abs(change) <= half else "still falling" if change < 0 else "rising"
        slope = figure(row["per_minute"], 4, row["per_minute_half_width"], sign=True)
        rows.append([row["recipe"], figure(change, 4, half, sign=True), slope, words])
    return table(("recipe", "change (nats/token)", "slope (nats/token per minute)", "at the end"), rows)


def run_scores_table(race: Race) -> str:
    """One row a run: every score at the end with the interval over its questions, and how many these were."""
    scores = [name.removeprefix(PREFIX) for name in score_names(race)]
    cells: dict[str, list[str]] = {}
    for row in final_scores(race).to_dict("records"):
        ends = interval(row["low"], row["high"], 3)
        asked = "" if pd.isna(row["questions"]) else f" (n = {row['questions']:.0f})"
        text = figure(row["value"], 3) + ("" if ends == NONE else f" {ends}") + asked
        cells.setdefault(row["trial_id"], []).append(text)
    return table(("trial", *scores), [[trial, *own] for trial, own in cells.items()])


def answers_table(race: Race) -> str:
    """One row a run and task: what its answers were like at the end, right or wrong."""
    rows = []
    for row in final_answers(race).to_dict("records"):
        counts = [figure(row[name], 0) for name in ("n", "valid")]
        cells = [*counts, figure(100 * row["truncated"], 1), figure(row["disagreements"], 0)]
        rows.append([row["trial_id"], row["task"], *cells])
    headers = ("trial", "task", "questions", "valid solutions", "truncated (%)", "disagreements")
    return table(headers, rows)


def interval(low: float, high: float, digits: int, sign: bool = False) -> str:
    if pd.isna(low) or pd.isna(high):
        return NONE
    return f"[{figure(low, digits, sign=sign)}, {figure(high, digits, sign=sign)}]"


def factor(value: float, digits: int = 3) -> str:
    return NONE if pd.isna(value) else f"{value:,.{digits}f}x"


def with_interval(row: Row, name: str, digits: int = 3) -> str:
    """A factor and its interval where there is one; of a bound there is none."""
    if row.get("bound") and name in BOUNDED and not pd.isna(row[name]):
        return f"{row['bound']} {factor(row[name], digits)}"
    ends = interval(row[f"{name}_low"], row[f"{name}_high"], digits)
    return factor(row[name], digits) + ("" if ends == NONE else f" {ends}")


def p_value(p: float) -> str:
    return NONE if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
