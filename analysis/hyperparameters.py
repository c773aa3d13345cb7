"""Which hyperparameters of a sweep matter: PED-ANOVA, as Optuna has it, and what chance alone would give.

PED-ANOVA (arXiv:2304.10255; with conditional hyperparameters arXiv:2601.20800) asks by how much the values of the best
trials are spread otherwise than those of all trials; it needs no model of the loss. The best are the lowest tenth of
the losses, at least five. A trial that was stopped counts with its last loss: it was among the worse half at its rung.
One without a loss is left out.

The measure is never 0, and larger by chance for a number than for a choice. So the mean of the same measure after the
losses were dealt out to the trials anew is taken off; `chance` is how far beyond that mean such shuffles come.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype
from scipy.stats import skew, spearmanr

from analysis.sweeps import VALUES, Sweep
from cggr_ray.schema import VAL_LOSS

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

BEST_SHARE, FEWEST_BEST, FEWEST_TRIALS = 0.1, 5, 10
SHUFFLES, SEED, CHANCE = 60, 0, 0.95
# A number with no more different values than this is a choice.
CHOICES = 8
COLUMNS = ("hyperparameter", "importance", "chance", "correlation", "best_values")


def importance(sweep: Sweep) -> pd.DataFrame:
    """One row a hyperparameter that was varied, the most important first; empty below ten trials with a loss.

    `importance` is its share of all of them, which sum to 1, or 0 where none is more than shuffles give on average;
    `chance` what 95 % of shuffles of the losses stay below, in the same unit; `correlation` Spearman's with the loss,
    NaN for a choice; `best_values` what the best trials have.
    """
    return _found(sweep).copy()


# A report asks for it three times.
@lru_cache(maxsize=1)
def _found(sweep: Sweep) -> pd.DataFrame:
    trials = sweep.trials[np.isfinite(sweep.trials[VAL_LOSS].astype(float))]
    names = [name for name in sweep.hyperparameters if trials[VALUES + name].nunique() > 1]
    if len(trials) < FEWEST_TRIALS or not names:
        return pd.DataFrame(columns=list(COLUMNS))
    losses = trials[VAL_LOSS].to_numpy(float)
    measure = _ped_anova(trials, names)
    random = np.random.default_rng(SEED)
    found, shuffled = measure(losses), [measure(random.permutation(losses)) for _ in range(SHUFFLES)]
    best = trials[losses <= np.sort(losses)[num_best(len(trials)) - 1]]
    by_chance = {name: np.array([draw[name] for draw in shuffled]) for name in names}
    excess = {name: max(found[name] - by_chance[name].mean(), 0.0) for name in names}
    whole = sum(excess.values()) or 1.0
    rows = [
        {
            "hyperparameter": name,
            "importance": excess[name] / whole,
            "chance": float(np.quantile(by_chance[name] - by_chance[name].mean(), CHANCE)) / whole,
            "correlation": _correlation(trials[VALUES + name], trials[VAL_LOSS]),
            "best_values": _values(best[VALUES + name], is_choice(trials[VALUES + name])),
        }
        for name in names
    ]
    return pd.DataFrame(rows).sort_values("importance", ascending=False, kind="stable", ignore_index=True)


def num_best(trials: int) -> int:
    """How many trials are the best of so many."""
    return max(FEWEST_BEST, int(np.ceil(BEST_SHARE * trials)))


def is_choice(column: pd.Series) -> bool:
    """Whether a hyperparameter has few values, or such as are no numbers."""
    return not is_numeric_dtype(column) or column.nunique() <= CHOICES


def is_logarithmic(column: pd.Series) -> bool:
    """Whether a numeric hyperparameter was drawn on a logarithmic scale: its values are more even on one."""
    known = column.dropna().to_numpy(float)
    return bool((known > 0).all() and abs(skew(np.log(known))) < abs(skew(known)))


def _ped_anova(trials: pd.DataFrame, names: list[str]) -> Callable[[np.ndarray], dict[str, float]]:
    """From the losses of the trials to the measure of every hyperparameter."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study, whole = optuna.create_study(direction="minimize"), {}
    for name in names:
        column = trials[VALUES + name]
        whole[name] = column.astype(str).where(column.notna()) if is_choice(column) else column
    distributions = {name: _distribution(column.dropna()) for name, column in whole.items()}
    for row in range(len(trials)):
        known = {name: column.iloc[row] for name, column in whole.items() if not pd.isna(column.iloc[row])}
        own = {name: distributions[name] for name in known}
        study.add_trial(optuna.trial.create_trial(params=known, distributions=own, value=0.0))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=num_best(len(trials)) / len(trials))

    def measure(losses: np.ndarray) -> dict[str, float]:
        with warnings.catch_warnings():
            # That lower is better is what is meant; that some values are rare is said in the report.
            warnings.simplefilter("ignore", UserWarning)
            return evaluator.evaluate(study, names, target=lambda trial: float(losses[trial.number]))

    return measure


def _distribution(column: pd.Series) -> BaseDistribution:
    """Of the values that were drawn."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if not is_numeric_dtype(column):
        return CategoricalDistribution(sorted(column.unique()))
    return FloatDistribution(float(column.min()), float(column.max()), log=is_logarithmic(column))


def _correlation(column: pd.Series, losses: pd.Series) -> float:
    """Spearman's rank correlation of a number with the loss; NaN for a choice."""
    if is_choice(column):
        return math.nan
    known = column.notna()
    return float(spearmanr(column[known], losses[known]).statistic)


def _values(column: pd.Series, choice: bool) -> str:
    """What the best trials have: the span of a number, the counts of a choice."""
    known = column.dropna()
    if choice:
        return ", ".join(f"{value} ({count}x)" for value, count in known.astype(str).value_counts().items())
    return f"{known.min():.3g} to {known.max():.3g}" if len(known) else ""
