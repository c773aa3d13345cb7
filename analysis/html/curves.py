"""The curves of the HTML report as numbers: every run of a race, and the mean and 95 % interval of a recipe's runs.

A chart is one metric; a view of it is one x axis: train seconds, tokens, or the value of a histogram. Losses and scores
of milestones are shown against seconds and tokens, what steps log against seconds. A run with more than POINTS rows
becomes the mean of each of POINTS equal parts of the time. Means are over a recipe's finished runs, interpolated
linearly where all of them have values; the interval is Student's t at each point, mean ± t(0.975, n - 1) s / sqrt(n).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from analysis.frames import Race
from analysis.measures import FINISHED
from analysis.scores import score_names
from analysis.stats import mean_interval
from cggr_ray.schema import (
    ACTIVE_LAYERS,
    EVAL,
    GPU_MEMORY,
    GPU_MEMORY_PEAK,
    GPU_UTILIZATION,
    METRICS,
    PROBE,
    SAMPLES_PER_SEC,
    STEP,
    STEP_SECONDS,
    TOKENS_PER_SEC,
    TOKENS_SEEN,
    TRAIN_SECONDS,
    VAL_TOKENS,
)

# Points of a run in a chart: what a screen can show; a race of many runs gets fewer of each.
POINTS = 100
POINTS_OF_A_RACE = 1800
DIGITS = 5
SECONDS = ("train time (s)", TRAIN_SECONDS, 1.0)
TOKENS = ("tokens seen (millions)", TOKENS_SEEN, 1e-6)
GROUPS = {
    "val": "Held-out loss",
    EVAL: "Scores",
    "train": "Training",
    "system": "Machine",
    "router": "Routing",
    "updates": "Layers",
}
# Said by another curve, or no curve at all.
LEFT_OUT = (SAMPLES_PER_SEC, STEP_SECONDS, PROBE, VAL_TOKENS)
FROM_ZERO = (TOKENS_PER_SEC, GPU_MEMORY, GPU_MEMORY_PEAK, GPU_UTILIZATION, ACTIVE_LAYERS)

Axis = tuple[str, str, float]


@dataclass(frozen=True)
class Curve:
    """One run in a view."""

    trial: str
    recipe: str
    finished: bool
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Mean:
    """The finished runs of a recipe in a view; `half` is the interval's half width, None where there is one run."""

    recipe: str
    runs: int
    x: list[float]
    y: list[float]
    half: list[float | None]


@dataclass(frozen=True)
class View:
    """The curves of a metric against one axis."""

    axis: str
    curves: tuple[Curve, ...]
    means: tuple[Mean, ...]


@dataclass(frozen=True)
class Chart:
    """A metric with its views; `from_zero` if its axis begins at 0."""

    metric: str
    unit: str
    meaning: str
    group: str
    from_zero: bool
    views: tuple[View, ...]


def charts(race: Race) -> list[Chart]:
    """All that the race has measured, milestones first, the rest in the order of `cggr_ray.schema.METRICS`."""
    points = max(20, min(POINTS, POINTS_OF_A_RACE // max(1, len(race.runs))))
    found = [_chart(race, race.milestones, name, (SECONDS, TOKENS), points) for name in _milestone_metrics(race)]
    for metric in METRICS:
        group = metric.name.split("/")[0]
        if group not in ("train", "system", "router", "updates") or metric.name in LEFT_OUT:
            continue
        if _is_measured(race.steps, metric.name):
            found.append(_chart(race, race.steps, metric.name, (SECONDS,), points))
        elif _has_histograms(race.steps, metric.name):
            found.append(_histogram(race, metric.name))
    return [chart for chart in found if chart.views[0].curves]


def _milestone_metrics(race: Race) -> list[str]:
    """Losses, then scores."""
    names = [str(name) for name in race.milestones.columns if str(name) not in LEFT_OUT]
    losses = [name for name in names if name.startswith("val/")]
    return [name for name in (*losses, *score_names(race)) if _is_measured(race.milestones, name)]


def _is_measured(frame: pd.DataFrame, name: str) -> bool:
    if name not in frame.columns or not is_numeric_dtype(frame[name]):
        return False
    return bool(np.isfinite(frame[name].astype(float)).any())


def _has_histograms(frame: pd.DataFrame, name: str) -> bool:
    """Whether a column holds {edges, counts}, as a histogram is logged."""
    values = list(frame[name].dropna()) if name in frame.columns else []
    return len(values) > 0 and all(isinstance(value, dict) and {"edges", "counts"} <= value.keys() for value in values)


def _chart(race: Race, rows: pd.DataFrame, name: str, axes: Iterable[Axis], points: int) -> Chart:
    unit, meaning = described(name)
    known = rows.loc[np.isfinite(rows[name].astype(float)), ["trial_id", TRAIN_SECONDS, TOKENS_SEEN, name]]
    views = tuple(_view(race, known, axis, name, points) for axis in axes)
    group = name.split("/")[0]
    return Chart(name, unit, meaning, GROUPS[group], group == EVAL or name in FROM_ZERO, views)


def described(name: str) -> tuple[str, str]:
    """Unit and meaning, for a metric of one source or task those of the metric it belongs to."""
    for metric in METRICS:
        if name == metric.name:
            return metric.unit, metric.meaning
        if name.startswith(f"{metric.name}/"):
            return metric.unit, f"{metric.meaning}; {name.removeprefix(metric.name + '/')}"
    return "1", name.removeprefix(f"{EVAL}/").replace("/", ", ").replace("_", " ")


def _view(race: Race, rows: pd.DataFrame, axis: Axis, name: str, points: int) -> View:
    title, x, scale = axis
    parts = np.linspace(0, rows[x].max(), points + 1)[1:-1]
    by_trial = dict(iter(rows.groupby("trial_id")[[x, name]]))
    curves = []
    for trial, recipe, status in race.runs[["trial_id", "recipe", "status"]].itertuples(index=False):
        if trial not in by_trial:
            continue
        own = by_trial[trial].sort_values(x)
        if len(own) > points:
            own = own.groupby(np.digitize(own[x], parts)).mean()
        at, values = rounded(own[x] * scale), rounded(own[name])
        curves.append(Curve(str(trial), str(recipe), status == FINISHED, at, values))
    return View(title, tuple(curves), _means(race, curves, points))


def _means(race: Race, curves: list[Curve], points: int) -> tuple[Mean, ...]:
    """One a recipe with finished runs that share some stretch of the axis."""
    means = []
    for recipe in race.recipes:
        own = [curve for curve in curves if curve.recipe == recipe and curve.finished]
        grid = _shared_grid(own, points)
        if len(grid):
            values = np.array([np.interp(grid, curve.x, curve.y) for curve in own])
            middle = rounded(values.mean(axis=0))
            means.append(Mean(recipe, len(own), rounded(grid), middle, _half_widths(values)))
    return tuple(means)


def _half_widths(values: np.ndarray) -> list[float | None]:
    """Of the interval of each column's mean; None below two rows."""
    if len(values) < 2:
        return [None] * values.shape[1]
    return [float(f"{mean_interval(column)[1]:.3g}") for column in values.T]


def _shared_grid(curves: list[Curve], points: int) -> np.ndarray:
    """The points of all curves in the stretch that all cover, or as many evenly spaced ones."""
    if not curves:
        return np.empty(0)
    start, end = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    grid = np.unique(np.concatenate([curve.x for curve in curves]))
    grid = grid[(grid >= start) & (grid <= end)]
    return grid if len(grid) <= points else np.linspace(start, end, points)


def _histogram(race: Race, name: str) -> Chart:
    """The last histogram of every run: the density of each bin over its middle, as bins may have other widths."""
    unit, meaning = described(name)
    curves = []
    for trial, recipe, status in race.runs[["trial_id", "recipe", "status"]].itertuples(index=False):
        logged = race.steps[race.steps["trial_id"] == trial].dropna(subset=[name]).sort_values(STEP)
        counts = np.array(logged[name].iloc[-1]["counts"], dtype=float) if len(logged) else np.empty(0)
        if counts.sum() > 0:
            edges = np.array(logged[name].iloc[-1]["edges"], dtype=float)
            middles, density = (edges[1:] + edges[:-1]) / 2, counts / counts.sum() / np.diff(edges)
            curves.append(Curve(str(trial), str(recipe), status == FINISHED, rounded(middles), rounded(density)))
    view = View(unit, tuple(curves), _means(race, curves, POINTS))
    return Chart(name, "density", f"{meaning}; the last of every run", GROUPS[name.split("/")[0]], True, (view,))


def rounded(values: Iterable[float]) -> list[float]:
    """Five significant digits: more than a screen shows, and half the size."""
    return [float(f"{value:.{DIGITS}g}") for value in values]
