"""How soon runs get to a loss, and from how many tokens: speed-ups, their price in tokens, performance profiles.

Two recipes are timed to a loss that both reach in every pair: the highest of the best losses of their runs. Swapping
the two leaves it as it is, so neither is favoured; the baseline's own final loss would be: whoever gets there at all
gets there before the baseline's end. A loss met before the first milestone is dated to it, so that a ratio is too near
to 1 rather than too far: it is a bound then, without an interval. With seconds s, tokens read N and kept positions K up
to that loss, each against the reference's,

    speed-up = s_ref / s      value of a kept token v = K_ref / K      break-even = (s / K) / (s_ref / K_ref)

so that speed-up = v / break-even: a kept token must be worth what it costs. A selected token whose v against chance is
1 was not worth selecting. Ratios are averaged over pairs as logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.frames import IDENTITY, Race
from analysis.measures import finished_runs, first_crossing
from analysis.stats import mean_interval
from cggr_ray.schema import ROUTER_KEPT_FRACTION, STEP, TOKENS_SEEN, TRAIN_SECONDS, VAL_LOSS

# Where on the baseline's curves the targets lie, as parts of their seconds.
TARGET_FRACTIONS = (0.4, 0.55, 0.7, 0.85)
# Kinds of the tokens part that choose which positions carry a gradient; a position of others has no one price.
CHOOSING = ("selected_tokens", "random_tokens", "collider")
EVERY_TOKEN = "all_tokens"
TOKENS_PART = "parts/tokens"
# A profile looks at times up to so many times the best recipe's (AlgoPerf, arXiv:2306.07179).
LARGEST_TAU = 4.0
TAUS = (1.0, 1.1, 1.25, 1.5, 2.0, LARGEST_TAU)

Curves = Mapping[tuple[str, int], "Curve"]


@dataclass(frozen=True)
class Curve:
    """The milestones of a finished run at which the metric was measured, in order."""

    trial_id: str
    seconds: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray

    def seconds_to(self, goal: float) -> float:
        """Train seconds until the loss first comes down to `goal`, interpolated; NaN if it never does."""
        return first_crossing(self.seconds, self.losses, goal)

    def has_met_first(self, goal: float) -> bool:
        """Whether the first milestone, behind the start, is at `goal` already: when the run got there is not known."""
        return bool(self.seconds[0] > 0 and self.losses[0] <= goal)

    def best_at(self, fraction: float) -> float:
        """The best loss up to a part of the run's seconds, interpolated; NaN before the first milestone."""
        at = fraction * self.seconds[-1]
        if at < self.seconds[0]:
            return math.nan
        here = float(np.interp(at, self.seconds, self.losses))
        return min(here, *self.losses[self.seconds <= at].tolist())

    def tokens_at(self, seconds: float) -> float:
        """Tokens read by then; NaN for a time that is."""
        return float(np.interp(seconds, self.seconds, self.tokens)) if not math.isnan(seconds) else math.nan


def curves(race: Race, metric: str = VAL_LOSS) -> dict[tuple[str, int], Curve]:
    """The curve of every finished run with milestones, by recipe and seed."""
    known = race.milestones[race.milestones["trial_id"].isin(finished_runs(race)["trial_id"])]
    if metric not in known.columns:
        return {}
    known = known.dropna(subset=[metric]).sort_values(TRAIN_SECONDS)
    values = known[[TRAIN_SECONDS, TOKENS_SEEN, metric]].to_numpy(float)
    firsts = known.drop_duplicates("trial_id")
    runs = known.groupby("trial_id", sort=False).indices
    return {
        (str(recipe), int(seed)): Curve(str(trial), *values[runs[trial]].T)
        for trial, recipe, seed in zip(*(firsts[name] for name in IDENTITY), strict=True)
    }


def pair_seeds(known: Curves, recipe: str, reference: str) -> list[int]:
    """Seeds for which both recipes have a curve, the smallest first."""
    return sorted(seed for name, seed in known if name == recipe and (reference, seed) in known)


def common_loss(known: Curves, recipe: str, reference: str) -> float:
    """The highest of the best losses of all runs of the pairs: the lowest loss that every one of them reaches."""
    seeds = pair_seeds(known, recipe, reference)
    best = [float(known[name, seed].losses.min()) for seed in seeds for name in (recipe, reference)]
    return max(best, default=math.nan)


def bound_of(known: Curves, recipe: str, reference: str) -> str:
    """How the true ratio to the common loss lies to the one that milestones give, where a run had met that loss by its
    first one: `≤` if one of the reference's had, `≥` if one of the recipe's had, `?` if of both; else empty."""
    goal, seeds = common_loss(known, recipe, reference), pair_seeds(known, recipe, reference)
    return _bound(*(_some_met_first(known, name, seeds, goal) for name in (reference, recipe)))


def _bound(at_most: bool, at_least: bool) -> str:
    return "?" if at_most and at_least else "≤" if at_most else "≥" if at_least else ""


def _some_met_first(known: Curves, recipe: str, seeds: Iterable[int], goal: float) -> bool:
    return any(known[recipe, seed].has_met_first(goal) for seed in seeds)


def speed_ups(known: Curves, recipe: str, reference: str) -> np.ndarray:
    """The logarithm of reference's seconds over recipe's to their common loss, one a pair."""
    goal = common_loss(known, recipe, reference)
    times = [
        (known[reference, seed].seconds_to(goal), known[recipe, seed].seconds_to(goal))
        for seed in pair_seeds(known, recipe, reference)
    ]
    # A run that starts below the common loss needs no time at all: its ratio is no number.
    return np.array([math.log(ref / own) if ref > 0 and own > 0 else math.nan for ref, own in times])


def efficiency(race: Race, reference: str | None = None) -> pd.DataFrame:
    """One row a recipe but the reference (the baseline): what it takes to their common loss, against the reference.

    `goal` in nats/token; `bound` as of `bound_of`, of the ratios but `break_even`; `speed_up`, `tokens` (the
    reference's over the recipe's), `value` of a kept token and its `break_even`, each a geometric mean with `_low` and
    `_high` of its 95 % interval over `pairs`; `kept`, the part of the labelled positions that was kept up to there. The
    last three are NaN where a run did not log what it kept, and for a recipe whose tokens are none of CHOOSING.
    """
    ref = reference or race.baseline
    known = curves(race)
    kept, every = _kept_tokens(race, CHOOSING), _kept_tokens(race, (*CHOOSING, EVERY_TOKEN))
    rows = []
    for recipe in (name for name in race.recipes if name != ref):
        goal, seeds = common_loss(known, recipe, ref), pair_seeds(known, recipe, ref)
        own = np.array([_spent(known[recipe, seed], goal, kept) for seed in seeds]).reshape(-1, 3)
        other = np.array([_spent(known[ref, seed], goal, every) for seed in seeds]).reshape(-1, 3)
        row: dict[str, object] = {"recipe": recipe, "pairs": len(seeds), "goal": goal}
        row["bound"] = bound_of(known, recipe, ref)
        with np.errstate(divide="ignore", invalid="ignore"):
            seconds, tokens, value = (other / own).T
            row["kept"] = float((own[:, 2] / own[:, 1]).mean()) if len(seeds) else math.nan
            measured = {"speed_up": seconds, "tokens": tokens, "value": value, "break_even": value / seconds}
        for name, ratios in measured.items():
            row[name], row[f"{name}_low"], row[f"{name}_high"] = geometric_interval(ratios)
        rows.append(row)
    return pd.DataFrame(rows)


def geometric_interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean of positive numbers and the ends of its interval; NaN if one of them is not positive."""
    if not (ratios > 0).all():
        return math.nan, math.nan, math.nan
    mean, half = mean_interval(np.log(ratios))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def target_losses(race: Race) -> list[float]:
    """What the slowest of the baseline's runs had reached at TARGET_FRACTIONS of its seconds, highest first.

    Best losses so far, interpolated between milestones, so that every baseline run reaches every target. Empty without
    a finished baseline; fractions before the first milestone of one of its runs are left out, and so are losses twice.
    """
    own = [curve for (recipe, _), curve in curves(race).items() if recipe == race.baseline]
    found = [float(np.max([curve.best_at(fraction) for curve in own])) for fraction in TARGET_FRACTIONS if own]
    return sorted({loss for loss in found if not math.isnan(loss)}, reverse=True)


def target_times(race: Race) -> pd.DataFrame:
    """One row a recipe and target: `seconds` with `_half_width` over `seeds`, and the speed-up with `_low` and `_high`.

    `reached` counts the seeds that got there. A run that did not would have taken longer than it ran: `seconds` is NaN
    then, and the speed-up, with the run's whole time in its place, no more than a `bound` without interval. So it is
    where a run had met the target by its first milestone (`bound_of`), and `seconds` of such are at most what is shown
    (`seconds_bound`), without a half width.
    """
    known = curves(race)
    rows = []
    for recipe in race.recipes:
        own = [seed for name, seed in known if name == recipe]
        pairs = pair_seeds(known, recipe, race.baseline)
        for goal in target_losses(race):
            times = [known[recipe, seed].seconds_to(goal) for seed in own]
            row: dict[str, object] = {"recipe": recipe, "target": goal, "seeds": len(own)}
            row["reached"] = int(np.isfinite(times).sum())
            row["seconds"], row["seconds_half_width"] = mean_interval(times)
            row["seconds_bound"] = "≤" if _some_met_first(known, recipe, own, goal) else ""
            if row["seconds_bound"]:
                row["seconds_half_width"] = math.nan
            spent = [_at_least(known[recipe, seed], goal) for seed in pairs]
            too_long = any(not reached for _, reached in spent) or _some_met_first(known, race.baseline, pairs, goal)
            at_least = _some_met_first(known, recipe, pairs, goal)
            row["bound"] = "" if recipe == race.baseline else _bound(too_long, at_least)
            base = [known[race.baseline, seed].seconds_to(goal) for seed in pairs]
            ratios = [ref / mine if mine else math.nan for (mine, _), ref in zip(spent, base, strict=True)]
            row["speed_up"], low, high = geometric_interval(np.array(ratios))
            row["speed_up_low"], row["speed_up_high"] = (math.nan, math.nan) if row["bound"] else (low, high)
            rows.append(row)
    return pd.DataFrame(rows)


def performance_profile(race: Race, taus: tuple[float, ...] = TAUS) -> pd.DataFrame:
    """One row a recipe: the share of targets x seeds that it reached within tau times the best recipe's time.

    Columns are the taus, `area` under the share from 1 to LARGEST_TAU over its width (1 is a recipe that is always the
    fastest), and `problems`. Seeds are those for which every recipe's run ended; a run that diverged or failed reaches
    nothing. A target that nobody reached counts, for nobody.
    """
    seeds = _ended_seeds(race)
    goals = target_losses(race)
    known = curves(race)
    times = np.full((len(race.recipes), len(seeds) * len(goals)), math.inf)
    for i, recipe in enumerate(race.recipes):
        for j, (seed, goal) in enumerate((seed, goal) for seed in seeds for goal in goals):
            if (recipe, seed) in known and not math.isnan(at := known[recipe, seed].seconds_to(goal)):
                times[i, j] = at
    ratios = profile_ratios(times)
    rows = []
    for recipe, own in zip(race.recipes, ratios, strict=True):
        row: dict[Any, object] = {"recipe": recipe, "problems": len(own), "area": profile_area(own)}
        rows.append(row | {tau: float((own <= tau).mean()) if len(own) else math.nan for tau in taus})
    return pd.DataFrame(rows)


def profile_ratios(times: np.ndarray) -> np.ndarray:
    """Times (recipes x problems, infinite where never reached) over the best recipe's; infinite where nobody's."""
    best = times.min(axis=0, initial=math.inf)
    with np.errstate(invalid="ignore"):
        ratios = np.where(best > 0, times / best, np.where(times == best, 1.0, math.inf))
    return np.where(np.isfinite(times), ratios, math.inf)


def profile_area(ratios: np.ndarray) -> float:
    """Area under the share of ratios <= tau for tau from 1 to LARGEST_TAU, over its width; NaN without problems."""
    if not len(ratios):
        return math.nan
    return float(np.clip(LARGEST_TAU - ratios, 0, None).mean() / (LARGEST_TAU - 1))


def _ended_seeds(race: Race) -> list[int]:
    ended = race.runs[race.runs["status"].isin(("finished", "diverged", "failed"))]
    recipes = ended.groupby("seed")["recipe"].nunique()
    return [int(seed) for seed in recipes[recipes == len(race.recipes)].index]


def _at_least(curve: Curve, goal: float) -> tuple[float, bool]:
    """Seconds to a loss and True, or all seconds of the run and False."""
    seconds = curve.seconds_to(goal)
    return (float(curve.seconds[-1]), False) if math.isnan(seconds) else (seconds, True)


def _spent(curve: Curve, goal: float, kept: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """Seconds, tokens and kept tokens of a run up to a loss; NaN for the last where it did not log them."""
    seconds = curve.seconds_to(goal)
    tokens = curve.tokens_at(seconds)
    if curve.trial_id not in kept or math.isnan(tokens):
        return seconds, tokens, math.nan
    return seconds, tokens, float(np.interp(tokens, *kept[curve.trial_id]))


def _kept_tokens(race: Race, kinds: tuple[str, ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By trial whose tokens part is of these kinds: tokens read, and kept, up to every logged row.

    A row speaks for the tokens since the one before.
    """
    if ROUTER_KEPT_FRACTION not in race.steps.columns or TOKENS_PART not in race.runs.columns:
        return {}
    parts = zip(race.runs["trial_id"], race.runs[TOKENS_PART], strict=True)
    trials = [trial for trial, part in parts if isinstance(part, dict) and part["kind"] in kinds]
    logged = race.steps[race.steps["trial_id"].isin(trials)].dropna(subset=[ROUTER_KEPT_FRACTION])
    found = {}
    for trial, rows in logged.sort_values(STEP).groupby("trial_id"):
        tokens = np.concatenate([[0.0], rows[TOKENS_SEEN].to_numpy(float)])
        kept = np.cumsum(np.diff(tokens) * rows[ROUTER_KEPT_FRACTION].to_numpy(float))
        found[str(trial)] = (tokens, np.concatenate([[0.0], kept]))
    return found
