"""The plots of a sweep's report: loss against the budget, parallel coordinates, importance, the timeline of trials.

A status keeps its colour in all of them. Every function writes one PNG and returns its path.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from analysis.coordinates import Axis, axes_of, best_last
from analysis.hyperparameters import importance
from analysis.measures import FINISHED
from analysis.plots import DPI, canvas, save
from analysis.sweeps import Sweep
from cggr_ray.schema import TRAIN_SECONDS, VAL_LOSS

STATUS_COLOURS = {
    FINISHED: "#009E73",
    "stopped": "#9AA0A6",
    "cut": "#56B4E9",
    "unfinished": "#F0E442",
    "diverged": "#CC79A7",
    "out_of_memory": "#E69F00",
    "failed": "#D55E00",
}
UNKNOWN_COLOUR = "#000000"
LONGEST_TIMELINE = 9.0


def plot_budget(sweep: Sweep, path: Path) -> Path:
    """Validation loss of every trial against its train seconds, a cross where it ended early."""
    figure, axes = canvas("train time (s)", f"{VAL_LOSS} (nats/token)")
    known = sweep.results.dropna(subset=[VAL_LOSS])
    curves = dict(iter(known.groupby("trial_id", sort=False)))
    for status, own in sweep.trials.groupby("status", sort=False):
        colour = STATUS_COLOURS.get(str(status), UNKNOWN_COLOUR)
        axes.plot([], [], color=colour, lw=2, label=f"{status} ({len(own)})")
        for trial in own["trial_id"]:
            if trial in curves:
                _curve(axes, curves[trial], colour, status == FINISHED)
    if len(known):
        low, high = known[VAL_LOSS].min(), known[VAL_LOSS].quantile(0.9)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    return save(figure, axes, path)


def plot_importance(sweep: Sweep, path: Path) -> Path:
    """A bar a hyperparameter, and a line where chance alone would reach."""
    table = importance(sweep)[::-1]
    figure, axes = canvas("importance (share of all)", "", height=1.2 + 0.32 * max(len(table), 1))
    rows = np.arange(len(table))
    beyond = table["importance"] > table["chance"]
    axes.barh(rows, table["importance"], color=np.where(beyond, "#0072B2", "#C4CBD2"), height=0.6)
    axes.plot(table["chance"], rows, "|", color="#D55E00", markersize=14, markeredgewidth=2, label="chance (95 %)")
    axes.set_yticks(rows, table["hyperparameter"])
    axes.grid(axis="y", visible=False)
    return save(figure, axes, path)


def plot_coordinates(sweep: Sweep, path: Path) -> Path:
    """A line a trial with a loss through its hyperparameters, the most important first, coloured by the loss."""
    axes_drawn, trials = axes_of(sweep), best_last(sweep)
    figure = Figure(figsize=(max(8, 1.5 * len(axes_drawn)), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    heights = np.array([axis.heights(trials) for axis in axes_drawn]).T
    shades = Normalize(*trials[VAL_LOSS].quantile([0, 0.9]))
    lines = LineCollection(
        [np.column_stack([np.arange(len(row)), row]) for row in np.nan_to_num(heights, nan=-0.06)],
        colors=colormaps["viridis"](shades(trials[VAL_LOSS])),
        linewidths=np.linspace(0.7, 1.8, len(trials)),
        alpha=0.8,
    )
    axes.add_collection(lines)
    for place, axis in enumerate(axes_drawn):
        _upright(axes, place, axis)
    axes.set(xlim=(-0.2, len(axes_drawn) - 0.3), ylim=(-0.1, 1.08), yticks=[])
    axes.set_xticks(range(len(axes_drawn)), [axis.title for axis in axes_drawn], rotation=20, ha="right", fontsize=8)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=DPI)
    return path


def plot_timeline(sweep: Sweep, path: Path) -> Path:
    """A bar a trial from its begin to its end, in minutes since the first one began; open where it has no end. A dashed
    line where the sweep was resumed."""
    began, ended = sweep.trials["started_at"].astype(float), sweep.trials["ended_at"].astype(float)
    last = np.nanmax([*began, *ended, *sweep.results["at"].astype(float)])
    figure, axes = canvas("since the first trial began (min)", "trial", min(LONGEST_TIMELINE, 2 + 0.1 * len(began)))
    for status, own in sweep.trials.groupby("status", sort=False):
        start = (began[own.index] - began.min()) / 60
        length = (ended[own.index].fillna(last) - began[own.index]) / 60
        colour = STATUS_COLOURS.get(str(status), UNKNOWN_COLOUR)
        axes.barh(own.index, length, left=start, height=0.8, color=colour, label=f"{status} ({len(own)})")
    for number, at in enumerate(sweep.resumed_at):
        label = f"resumed ({len(sweep.resumed_at)}x)" if number == 0 else None
        axes.axvline((at - began.min()) / 60, color="#404040", lw=1, ls="--", label=label)
    axes.invert_yaxis()
    axes.set_yticks(*_some_trials(sweep.trials["trial_id"]))
    return save(figure, axes, path)


def _curve(axes: Axes, rows: pd.DataFrame, colour: str, finished: bool) -> None:
    own = rows.sort_values(TRAIN_SECONDS)
    axes.plot(own[TRAIN_SECONDS], own[VAL_LOSS], color=colour, lw=1.2 if finished else 0.7, alpha=0.8)
    if not finished:
        axes.plot(own[TRAIN_SECONDS].iloc[-1], own[VAL_LOSS].iloc[-1], "x", color=colour, markersize=4)


def _upright(axes: Axes, place: int, axis: Axis) -> None:
    """One axis of the parallel coordinates with its figures."""
    axes.plot([place, place], [0, 1], color="#404040", lw=1)
    for label, height in axis.ticks():
        axes.annotate(
            label,
            (place, height),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
        )


def _some_trials(names: pd.Series) -> tuple[list[int], list[str]]:
    """At most 25 rows to name."""
    every = -(-len(names) // 25)
    rows = list(range(0, len(names), every))
    return rows, [str(names.iloc[row]) for row in rows]
