"""Parallel coordinates of a sweep as numbers: an axis a hyperparameter, from 0 to 1, and one of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from analysis.hyperparameters import importance, is_choice, is_logarithmic
from analysis.sweeps import VALUES, Sweep
from cggr_ray.schema import VAL_LOSS

MOST_AXES = 8
# Of a choice with more values than that, not all can be named.
MOST_LABELS, LONGEST_LABEL = 12, 18


@dataclass(frozen=True)
class Axis:
    """One axis. `choices` are the values of a choice in their order, else the axis goes from `low` to `high`."""

    column: str
    title: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0
    logarithmic: bool = False

    def heights(self, trials: pd.DataFrame) -> np.ndarray:
        """Where each trial crosses it, 0 to 1; NaN where a trial has no such hyperparameter."""
        column = trials[self.column]
        if self.choices:
            places = {choice: self._place(number) for number, choice in enumerate(self.choices)}
            return column.astype(str).where(column.notna()).map(places).to_numpy(float)
        values = np.log(column.to_numpy(float)) if self.logarithmic else column.to_numpy(float)
        low, high = self._ends()
        return (values - low) / (high - low)

    def ticks(self) -> list[tuple[str, float]]:
        """Labels and where they stand."""
        if self.choices:
            every = -(-len(self.choices) // MOST_LABELS)
            return [(_short(self.choices[k]), self._place(k)) for k in range(0, len(self.choices), every)]
        places = (0.0, 0.25, 0.5, 0.75, 1.0)
        low, high = self._ends()
        values = [low + place * (high - low) for place in places]
        return [(f"{np.exp(v) if self.logarithmic else v:.3g}", p) for v, p in zip(values, places, strict=True)]

    def _place(self, number: int) -> float:
        return (number + 0.5) / len(self.choices)

    def _ends(self) -> tuple[float, float]:
        return (math.log(self.low), math.log(self.high)) if self.logarithmic else (self.low, self.high)


def axes_of(sweep: Sweep) -> list[Axis]:
    """At most eight hyperparameters, the most important first, as the columns stand where that is unknown; the loss."""
    ranked = [str(name) for name in importance(sweep)["hyperparameter"]] or sweep.hyperparameters
    trials = best_last(sweep)
    drawn = [name for name in ranked if trials[VALUES + name].nunique() > 1][:MOST_AXES]
    return [*(_axis(trials, VALUES + name, name) for name in drawn), _axis(trials, VAL_LOSS, VAL_LOSS, number=True)]


def best_last(sweep: Sweep) -> pd.DataFrame:
    """The trials that have a loss, the worst first: what is drawn last lies on top."""
    known = sweep.trials[np.isfinite(sweep.trials[VAL_LOSS].astype(float))]
    return known.sort_values(VAL_LOSS, ascending=False, kind="stable")


def _axis(trials: pd.DataFrame, name: str, title: str, number: bool = False) -> Axis:
    column = trials[name].dropna()
    if is_choice(column) and not number:
        ordered = sorted(column.unique()) if is_numeric_dtype(column) else sorted(map(str, column.unique()))
        return Axis(name, title, tuple(map(str, ordered)))
    low, high = float(column.min()), float(column.max())
    return Axis(name, title, (), low, high if high > low else low + 1, is_logarithmic(column) and not number)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"
