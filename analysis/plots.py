"""The plots of a report: loss and scores against train seconds and tokens, speed, memory, resting layers.

A recipe keeps its colour in every plot of a race (Okabe and Ito's palette, which survives colour blindness; the
baseline is black). A thin line is one run, a thick line the mean of a recipe's finished runs, drawn where all of them
have values. Every function writes one PNG and returns its path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.frames import Race
from analysis.layers import layer_rows, relevance_shares
from analysis.measures import FINISHED, finished_runs
from cggr_ray.schema import FRACTION, TOKENS_PER_SEC, TOKENS_SEEN, TRAIN_SECONDS, VAL_LOSS

DPI = 130
BASELINE_COLOUR = "#000000"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
DASHES = ("-", "--", ":", "-.")
# The first part of a run falls so fast that it would flatten everything after it.
ZOOM_FRACTION = 0.25
SPEED_WINDOW = 9
# Against what a milestone is drawn: the name of the axis, and what is 1 there. Tokens are those read from the stream.
POSITIONS = {TRAIN_SECONDS: ("train time (s)", 1.0), TOKENS_SEEN: ("tokens seen (millions)", 1e6)}

Style = tuple[str, str]


def styles(recipes: list[str], baseline: str) -> dict[str, Style]:
    """Colour and dash of every recipe; past seven recipes the colours come again with another dash."""
    others = [name for name in recipes if name != baseline]
    given = {
        name: (PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)]) for i, name in enumerate(others)
    }
    return {name: (BASELINE_COLOUR, "-") if name == baseline else given[name] for name in recipes}


def plot_loss(race: Race, path: Path, position: str) -> Path:
    """Validation loss at every milestone against one of POSITIONS."""
    figure, axes = _at_milestones(race, position, VAL_LOSS, f"{VAL_LOSS} (nats/token)")
    _zoom(axes, race.milestones, VAL_LOSS)
    return save(figure, axes, path)


def plot_score(race: Race, path: Path, position: str, score: str) -> Path:
    """A score of an evaluation at every milestone against one of POSITIONS."""
    figure, axes = _at_milestones(race, position, score, score)
    axes.set_ylim(bottom=0)
    return save(figure, axes, path)


def _at_milestones(race: Race, position: str, metric: str, label: str) -> tuple[Figure, Axes]:
    name, unit = POSITIONS[position]
    figure, axes = canvas(name, label)
    milestones = race.milestones.assign(**{position: race.milestones[position] / unit})
    _lines(axes, race, milestones, position, metric)
    return figure, axes


def plot_speed(race: Race, path: Path) -> Path:
    """Tokens seen per train second against seconds of training, as a running median of nine rows."""
    figure, axes = canvas("train time (s)", f"tokens/s (running median of {SPEED_WINDOW} rows)")
    steps = race.steps
    if TOKENS_PER_SEC in steps.columns:
        by_run = steps.groupby("trial_id", sort=False)[TOKENS_PER_SEC]
        smooth = by_run.transform(lambda values: values.rolling(SPEED_WINDOW, center=True, min_periods=1).median())
        _lines(axes, race, steps.assign(**{TOKENS_PER_SEC: smooth}), TRAIN_SECONDS, TOKENS_PER_SEC)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return save(figure, axes, path)


def plot_memory(race: Race, path: Path) -> Path:
    """Peak device memory: a bar for the mean of a recipe's finished runs, a dot for each of them."""
    figure, axes = canvas("peak device memory (MiB)", "")
    look = styles(race.recipes, race.baseline)
    peaks = finished_runs(race)
    for row, recipe in enumerate(race.recipes):
        values = peaks.loc[peaks["recipe"] == recipe, "peak_memory_mib"].dropna().to_numpy(float)
        if len(values):
            axes.barh(row, values.mean(), height=0.6, color=look[recipe][0], alpha=0.55)
            axes.plot(values, [row] * len(values), "o", color=look[recipe][0], markersize=4)
            axes.annotate(
                f"{values.mean():,.0f}", (values.max(), row), xytext=(7, 0), textcoords="offset points", va="center"
            )
    axes.set_yticks(range(len(race.recipes)), race.recipes)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    return save(figure, axes, path)


def plot_active_layers(race: Race, path: Path) -> Path:
    """Layers that learn between probes against seconds of training: a line a run in which they rested or had probes."""
    figure, axes = canvas("train time (s)", "layers that learn")
    look, rows = styles(race.recipes, race.baseline), layer_rows(race)
    for recipe, own in rows.groupby("recipe", sort=False):
        colour, dash = look[str(recipe)]
        runs = [run for _, run in own.groupby("trial_id", sort=False)]
        for number, run in enumerate(runs):
            label = str(recipe) if number == 0 else None
            axes.step(run[TRAIN_SECONDS], run["depth"], dash, color=colour, lw=1.0, alpha=0.7, label=label)
    axes.set_ylim(0, 1.05 * rows["layers"].max())
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return save(figure, axes, path)


def plot_relevance(race: Race, path: Path) -> Path:
    """A panel a recipe, of its first seed: each layer's share of the relevance, from one probe to the next."""
    shares = relevance_shares(race)
    figure = Figure(figsize=(8, 1 + 2.6 * len(shares)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(shares), sharex=True, squeeze=False)[:, 0]
    # A probe whose sum is close to 0 has huge shares; it must not darken all others.
    brightest = float(np.quantile(np.concatenate([own.to_numpy().ravel() for own in shares.values()]), 0.99))
    for axes, (trial, own) in zip(panels, shares.items(), strict=True):
        end = race.steps.loc[race.steps["trial_id"] == trial, TRAIN_SECONDS].max()
        layers = np.arange(own.shape[1] + 1) - 0.5
        mesh = axes.pcolormesh([*own.index, end], layers, own.T, vmin=0, vmax=brightest, rasterized=True)
        axes.set(title=trial, ylabel="layer (0: lowest)")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(mesh, ax=axes, label="share of the relevance")
    panels[-1].set_xlabel("train time (s)")
    figure.savefig(path, dpi=DPI)
    return path


def _lines(axes: Axes, race: Race, rows: pd.DataFrame, x: str, y: str) -> None:
    """A thin line a run and, from two finished runs on, a thick line for their mean; nothing if nobody measured `y`."""
    if y not in rows.columns:
        return
    look = styles(race.recipes, race.baseline)
    finished = set(race.runs.loc[race.runs["status"] == FINISHED, "trial_id"])
    for recipe in race.recipes:
        colour, dash = look[recipe]
        curves: Mapping[str, pd.DataFrame] = {
            str(trial): run[[x, y]].astype(float).dropna().sort_values(x)
            for trial, run in rows[rows["recipe"] == recipe].groupby("trial_id", sort=False)
        }
        ended = [curve for trial, curve in curves.items() if trial in finished and len(curve)]
        label = f"{recipe} ({len(ended)} of {int((race.runs['recipe'] == recipe).sum())} runs finished)"
        alone = len(curves) == 1
        for curve in curves.values():
            axes.plot(curve[x], curve[y], dash, color=colour, lw=1.8 if alone else 0.7, alpha=1 if alone else 0.5)
        if len(ended) > 1:
            axes.plot(*_mean_curve(ended, x, y), dash, color=colour, lw=2.2)
        axes.plot([], [], dash, color=colour, lw=2.2, label=label)


def _mean_curve(curves: list[pd.DataFrame], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the interpolated curves over the stretch that all of them cover."""
    start = max(float(curve[x].iloc[0]) for curve in curves)
    end = min(float(curve[x].iloc[-1]) for curve in curves)
    points = np.unique(np.concatenate([curve[x].to_numpy() for curve in curves]))
    grid = points[(points >= start) & (points <= end)]
    return grid, np.mean([np.interp(grid, curve[x], curve[y]) for curve in curves], axis=0)


def _zoom(axes: Axes, milestones: pd.DataFrame, metric: str) -> None:
    """Limits the loss axis to what happens from ZOOM_FRACTION of the budget on, if the race got that far."""
    late = milestones[milestones[FRACTION].astype(float) >= ZOOM_FRACTION]
    losses = late.get(metric, pd.Series(dtype=float)).astype(float).dropna()
    if len(losses) > 1 and losses.max() > losses.min():
        margin = 0.05 * (losses.max() - losses.min())
        axes.set_ylim(losses.min() - margin, losses.max() + margin)


def canvas(x_label: str, y_label: str, height: float = 4.8) -> tuple[Figure, Axes]:
    """A figure with a canvas of its own: no window system, and no state shared with the caller's pyplot."""
    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, axes: Axes, path: Path) -> Path:
    """Writes a figure, with a legend where something is named."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=DPI)
    return path
