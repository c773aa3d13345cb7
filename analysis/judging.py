"""What a race shows and what it does not: one verdict an arm and quantity, no stronger than its seeds allow.

Three quantities are judged, each as paired differences to the baseline: the final loss (equal time), tokens/s and the
speed-up to a common loss; ratios as logarithms. Final loss and tokens/s of all arms are one family: Holm's correction
keeps the chance that a race without any difference claims one at 5 %. The speed-up asks nearly what the loss does, so
it is corrected over the arms alone and claimed only where the final loss is, to the same side: it takes no share of the
5 %. Scores of evaluations are a family of their own. Where a race set its seconds, a fixed time a step, it measured no
speed: the final loss is judged alone, and needs no correction for what was not asked.

A verdict is withdrawn where its figures would flatter: runs that diverged or failed are missing from them, or the runs
of a pair read other rows, had another budget or ran on another device, or shared a GPU.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.frames import Race
from analysis.measures import FINISHED, comparable_runs, finished_runs, order_check
from analysis.stats import ALPHA, detectable, holm, mean_interval, paired_p, which_test
from analysis.targets import bound_of, curves, speed_ups
from cggr_ray.saying import counted
from cggr_ray.schema import TRAIN_SECONDS, VAL_LOSS

RATIO = "ratio"


@dataclass(frozen=True)
class Quantity:
    """What is judged: `sign` is +1 where more is good; a ratio to the baseline comes as its logarithm.

    One with `after` is claimed only where that quantity is, to the same side.
    """

    name: str
    unit: str
    sign: int
    good: str
    bad: str
    after: str = ""


LOSS = Quantity("final loss", "nats/token", -1, "better", "worse")
SPEED = Quantity("tokens/s", RATIO, +1, "faster", "slower")
TIME = Quantity("speed-up to a common loss", RATIO, +1, "faster", "slower", after=LOSS.name)
QUANTITIES = (LOSS, SPEED, TIME)

# Parts whose recipe is a control: it does by chance, or by plain reading of fewer rows, what others do by a method.
CONTROLS = {
    "rows": ("fewer_rows", "random_rows"),
    "tokens": ("random_tokens",),
    "updates": ("random_blocks", "random_suffix"),
}
NEUTRAL = {"rows": "all_rows", "tokens": "all_tokens", "updates": "full_update"}
# Endings that tell against a recipe; an unfinished run may still end well.
BROKEN = ("diverged", "failed")

Samples = Mapping[tuple[str, Quantity], np.ndarray]
# The side that the mean difference of a recipe and quantity is on, and its corrected p.
Gates = Mapping[tuple[str, str], tuple[int, float]]


def judge(samples: Samples) -> pd.DataFrame:
    """Verdicts on paired differences to the baseline (logarithms for ratios), corrected together.

    Columns: `recipe`, `quantity`, `unit`, `pairs`, `difference` with `low` and `high` of its own 95 % interval (ratios
    as factors), `p`, `p_holm`, `test`, `detectable` (the smallest difference, or change of the factor, that the
    strictest step of the correction finds with a chance of 80 %), `side` (+1 for the arm, -1 against it, 0 no claim)
    and the `verdict` in words. NaN where there is no second pair.
    """
    first = {key: sample for key, sample in samples.items() if not key[1].after}
    then = {key: sample for key, sample in samples.items() if key[1].after}
    rows = _family(first, {})
    gates = {
        (recipe, quantity.name): (_side(quantity, sample), float(str(row["p_holm"])))
        for ((recipe, quantity), sample), row in zip(first.items(), rows, strict=True)
    }
    return pd.DataFrame(rows + _family(then, gates))


def _family(samples: Samples, gates: Gates) -> list[dict[str, object]]:
    """The rows of one family; `gates` holds what has to be claimed before."""
    comparisons = max(1, sum(len(sample) > 1 and not np.isnan(sample).any() for sample in samples.values()))
    raw = [paired_p(sample, comparisons) for sample in samples.values()]
    rows = []
    for ((recipe, quantity), sample), p, corrected in zip(samples.items(), raw, holm(raw), strict=True):
        if quantity.after:
            corrected = max(corrected, _gate(gates[recipe, quantity.after], _side(quantity, sample)))
        mean, half = mean_interval(sample)
        side = _side(quantity, sample) if corrected <= ALPHA else 0
        seen = detectable(sample, ALPHA / comparisons)
        low, middle, high = mean - half, mean, mean + half
        if quantity.unit == RATIO:
            low, middle, high, seen = (float(value) for value in (*np.exp([low, middle, high]), np.expm1(seen)))
        row: dict[str, object] = {"recipe": recipe, "quantity": quantity.name, "unit": quantity.unit}
        row |= {"pairs": len(sample), "difference": middle, "low": low, "high": high, "p": p, "p_holm": corrected}
        row |= {"test": which_test(len(sample), comparisons), "detectable": seen, "side": side}
        rows.append(row | {"verdict": _words(quantity, sample, side, alone=p <= ALPHA)})
    return rows


def _side(quantity: Quantity, sample: np.ndarray) -> int:
    """+1 where the mean difference is for the arm, -1 where it is against it, 0 without one."""
    mean = mean_interval(sample)[0]
    return 0 if math.isnan(mean) else int(np.sign(mean)) * quantity.sign


def _gate(before: tuple[int, float], side: int) -> float:
    """The p that another quantity adds to a claim of this side: 1 where it is no number or of the other side."""
    other, p = before
    return 1.0 if other != side or math.isnan(p) else p


def _words(quantity: Quantity, sample: np.ndarray, side: int, alone: bool) -> str:
    """The verdict of one row."""
    if len(sample) == 0:
        return "no pair: no verdict"
    if np.isnan(sample).any():
        return "not a number in some pair: no verdict"
    if len(sample) == 1:
        return "one seed: no verdict"
    if side:
        return quantity.good if side > 0 else quantity.bad
    words = f"no difference that {len(sample)} seeds could show"
    return f"{words} (by itself, uncorrected, it would be one)" if alone else words


def differences(race: Race, reference: str | None = None) -> dict[tuple[str, Quantity], np.ndarray]:
    """Paired differences of every other recipe to the reference (the baseline), by recipe and quantity.

    Raises ValueError if a recipe has two finished runs of one seed.
    """
    ref = reference or race.baseline
    runs = comparable_runs(race)
    rates = _by_run(runs, runs["tokens_seen"] / runs["train_seconds"])
    last = race.milestones.sort_values(TRAIN_SECONDS).drop_duplicates("trial_id", keep="last")
    ended = last[last["trial_id"].isin(runs["trial_id"])]
    losses = _by_run(ended, ended[VAL_LOSS]) if VAL_LOSS in ended.columns else {}
    known = curves(race)
    found: dict[tuple[str, Quantity], np.ndarray] = {}
    for recipe in (name for name in race.recipes if name != ref):
        for quantity, values in ((LOSS, losses), (SPEED, rates)):
            seeds = sorted(seed for name, seed in values if name == recipe and (ref, seed) in values)
            pairs = [_difference(quantity, values[recipe, seed], values[ref, seed]) for seed in seeds]
            found[recipe, quantity] = np.array(pairs)
        found[recipe, TIME] = speed_ups(known, recipe, ref)
    return found


def _difference(quantity: Quantity, own: float, reference: float) -> float:
    if quantity.unit != RATIO:
        return own - reference
    return math.log(own / reference) if own > 0 and reference > 0 else math.nan


def _by_run(rows: pd.DataFrame, values: pd.Series) -> dict[tuple[str, int], float]:
    runs = zip(rows["recipe"], rows["seed"], values, strict=True)
    return {(str(recipe), int(seed)): float(value) for recipe, seed, value in runs}


def claims(race: Race) -> pd.DataFrame:
    """The rows of `judge` for a race, ordered by quantity, with `supported` as of `weighed` and `bound`, of a speed-up,
    as of `analysis.targets.bound_of`: a bound from the other side supports nothing.

    Favourable verdicts on loss or time name the controls that the arm was not shown to beat, each by a test of its own
    at 5 %: beating the baseline *and* every control needs no correction for the controls.
    """
    samples = differences(race)
    asked = ((recipe, quantity) for quantity in judged(race) for recipe in race.recipes)
    table = weighed(race, judge({key: samples[key] for key in asked if key in samples}))
    words, bounds, supported = [], [], []
    known = curves(race)
    for row in table.to_dict("records"):
        bound = bound_of(known, row["recipe"], race.baseline) if row["quantity"] == TIME.name else ""
        open_side = row["side"] != 0 and bound in ("?", "≤" if row["side"] > 0 else "≥")
        bounds.append(bound)
        supported.append(row["supported"] and not open_side)
        if open_side:
            row["verdict"] += ", not supported: a first milestone bounds it from the other side"
        for_the_arm = row["side"] > 0 and row["quantity"] != SPEED.name
        controls = unbeaten(race, row["recipe"], TIME if row["quantity"] == TIME.name else LOSS) if for_the_arm else []
        words.append("; ".join([row["verdict"], *controls]))
    return table.assign(verdict=words, bound=bounds, supported=supported) if words else table


def judged(race: Race) -> tuple[Quantity, ...]:
    """The quantities that the race measured."""
    return (LOSS,) if race.stepped else QUANTITIES


def weighed(race: Race, table: pd.DataFrame, uneven: Collection[tuple[str, str]] = ()) -> pd.DataFrame:
    """The rows of `judge` with `supported`, the verdict claims something that holds, and objections among its words.

    `uneven` holds the recipes and quantities of which the runs of a pair were asked different numbers of questions.
    """
    if table.empty or not table["side"].any():
        return table.assign(supported=False)
    checks = order_check(race)
    supported, words = [], []
    for row in table.to_dict("records"):
        against = objections(race, checks, row["recipe"], row["side"]) if row["side"] else []
        if row["side"] and (row["recipe"], row["quantity"]) in uneven:
            against.append("the runs of a pair answered different numbers of questions")
        supported.append(bool(row["side"]) and not against)
        words.append(f"{row['verdict']}, not supported: {', '.join(against)}" if against else row["verdict"])
    return table.assign(verdict=words, supported=supported)


def objections(race: Race, checks: pd.DataFrame, recipe: str, side: int) -> list[str]:
    """What speaks against a claim for the recipe (side +1) or against it (-1): how its runs and the baseline's went.

    `checks` is `analysis.measures.order_check` of the race.
    """
    flattered = recipe if side > 0 else race.baseline
    lost = lost_runs(race, flattered, BROKEN)
    found = [f"{lost} of {flattered}, left out"] if lost else []
    if _read_other_rows(checks, (recipe, race.baseline)):
        found.append("the runs of a pair read other rows")
    pairs = _paired_runs(race, recipe)
    if _other_budgets(pairs):
        found.append("the runs of a pair had other budgets")
    if _other_devices(pairs):
        found.append("the runs of a pair had other devices")
    if _shared_a_gpu(pairs):
        found.append("runs shared a GPU with others")
    return found


def unbeaten(race: Race, recipe: str, quantity: Quantity) -> list[str]:
    """A sentence with the controls that a recipe was not shown to beat in a quantity; empty if there are none."""
    left = []
    for control in controls_of(race, recipe):
        sample = differences(race, control)[recipe, quantity]
        p = paired_p(sample)
        if not (p <= ALPHA and float(sample.mean()) * quantity.sign > 0):
            left.append(control)
    return [f"not shown to beat the control{'s' if len(left) > 1 else ''} {', '.join(left)}"] if left else []


def controls_of(race: Race, recipe: str) -> list[str]:
    """Recipes of the race that do by chance what this one does by a method, and fewer rows for every method."""
    kinds = {name: part_kinds(race, name) for name in race.recipes}
    if is_control(kinds[recipe]):
        return []
    touched = [part for part, kind in kinds[recipe].items() if kind != NEUTRAL[part]]
    found = []
    for name, own in kinds.items():
        parts = [part for part, kind in own.items() if kind in CONTROLS[part]]
        if touched and (set(parts) & set(touched) or "fewer_rows" in own.values()):
            found.append(name)
    return found


def is_control(kinds: Mapping[str, str]) -> bool:
    return any(kind in CONTROLS[part] for part, kind in kinds.items())


def part_kinds(race: Race, recipe: str) -> dict[str, str]:
    """The kinds of a recipe's rows, tokens and updates as its first run that says so has them; empty for old runs."""
    runs = race.runs[race.runs["recipe"] == recipe]
    kinds: dict[str, str] = {}
    for part in NEUTRAL:
        said: list[Any] = [own for own in runs.get(f"parts/{part}", ()) if isinstance(own, dict)]
        if said:
            kinds[part] = str(said[0]["kind"])
    return kinds


def lost_runs(race: Race, recipe: str, endings: tuple[str, ...] | None = None) -> str:
    """How the runs of a recipe that cannot be compared ended, as `1 run diverged`; empty if there are none."""
    status = race.runs.loc[race.runs["recipe"] == recipe, "status"]
    counts = Counter(str(word) for word in status if word != FINISHED and (endings is None or word in endings))
    return ", ".join(f"{counted(count, 'run')} {word}" for word, count in counts.items())


def _read_other_rows(checks: pd.DataFrame, recipes: tuple[str, str]) -> bool:
    own = checks[checks["recipe"].isin(recipes)]
    ids = set(own["trial_id"])
    return any(ids & set(others) for others in own["disagrees_with"])


def _paired_runs(race: Race, recipe: str) -> pd.DataFrame:
    """The finished runs of the recipe and the baseline whose seed the other finished too."""
    runs = finished_runs(race)
    both = runs[runs["recipe"].isin((recipe, race.baseline))]
    return both[both.duplicated("seed", keep=False)]


def _other_budgets(pairs: pd.DataFrame) -> bool:
    """Then the ends of their curves are at no equal time. One race has one; a folder of several may not."""
    return "budget_seconds" in pairs.columns and bool((pairs.groupby("seed")["budget_seconds"].nunique() > 1).any())


def _other_devices(pairs: pd.DataFrame) -> bool:
    if "device/name" not in pairs.columns:
        return False
    used = devices(pairs).groupby(pairs["seed"]).agg(lambda sets: len(set().union(*sets)))
    return bool((used > 1).any())


def _shared_a_gpu(pairs: pd.DataFrame) -> bool:
    """A share of a GPU is as fast as the others on it let it be: its speed and its losses in time are theirs too."""
    return "gpus_per_trial" in pairs.columns and bool((pairs["gpus_per_trial"] < 1).any())


def devices(runs: pd.DataFrame) -> pd.Series:
    """The names of the devices that every run ran on: it may have been moved."""
    earlier = runs["earlier"] if "earlier" in runs.columns else pd.Series(None, index=runs.index, dtype=object)
    names = [
        {
            *([] if pd.isna(last) else [last]),
            *(where["device"] for where in (before if isinstance(before, list) else ())),
        }
        for last, before in zip(runs["device/name"], earlier, strict=True)
    ]
    return pd.Series(names, index=runs.index, dtype=object)
