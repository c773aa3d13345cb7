"""A view of a chart as an SVG picture: what a browser without JavaScript, or a printer, shows.

Coordinates are those of a box of WIDTH by HEIGHT; colours are classes `arm-<number>` that the page's style defines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from matplotlib.ticker import MaxNLocator

from analysis.html.curves import Chart, Curve, Mean, View
from analysis.plots import ZOOM_FRACTION

WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 22, 10, 38
INNER_WIDTH, INNER_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
LABEL_HEIGHT = 12
Range = tuple[float, float]


def picture(chart: Chart, recipes: Sequence[str]) -> str:
    """The first view of a chart: grid, runs, means, and the number of each recipe at the end of its line."""
    view = chart.views[0]
    across, up = _ranges(chart, view)
    box = _Box(across, up)
    label = escape(f"{chart.metric} against {view.axis}")
    lines = [_path(box, run, f"run{_kind(run)} arm-{recipes.index(run.recipe)}") for run in view.curves]
    means = [_path(box, mean, f"mean arm-{recipes.index(mean.recipe)}") for mean in view.means]
    # An inner picture cuts off what lies outside of the ranges.
    frame = f'x="{LEFT}" y="{TOP}" width="{INNER_WIDTH}" height="{INNER_HEIGHT}"'
    inner = f'<svg {frame} viewBox="{LEFT} {TOP} {INNER_WIDTH} {INNER_HEIGHT}">{"".join((*lines, *means))}</svg>'
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{_grid(box, view.axis)}{inner}{_ends(box, view, recipes)}</svg>"
    )


class _Box:
    """From values to coordinates."""

    def __init__(self, across: Range, up: Range) -> None:
        self.across, self.up = across, up

    def x(self, value: float) -> float:
        low, high = self.across
        return LEFT + (value - low) / (high - low) * INNER_WIDTH

    def y(self, value: float) -> float:
        low, high = self.up
        return HEIGHT - BOTTOM - (value - low) / (high - low) * INNER_HEIGHT


def _ranges(chart: Chart, view: View) -> tuple[Range, Range]:
    """Of the axes; the y axis leaves out what lies above or below all values after ZOOM_FRACTION of the x axis."""
    xs = [value for curve in view.curves for value in curve.x]
    late = min(xs) + ZOOM_FRACTION * (max(xs) - min(xs))
    ys = [y for curve in view.curves for x, y in zip(curve.x, curve.y, strict=True) if x >= late]
    low, high = min(ys), max(ys)
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1), (
        min(0.0, low) if chart.from_zero else low - margin,
        high + margin,
    )


def _kind(run: Curve) -> str:
    return (" lone" if len(run.x) == 1 else "") + ("" if run.finished else " unfinished")


def _path(box: _Box, curve: Curve | Mean, kind: str) -> str:
    points = "L".join(f"{box.x(x):.1f},{box.y(y):.1f}" for x, y in zip(curve.x, curve.y, strict=True))
    points += "h0" if len(curve.x) == 1 else ""  # a lone point is drawn as its round cap
    return f'<path class="{kind}" d="M{points}"/>'


def _ends(box: _Box, view: View, recipes: Sequence[str]) -> str:
    """The number of each recipe beside the end of its line, one above the other where lines end together."""
    inside = [mean for mean in view.means if TOP <= box.y(mean.y[-1]) <= HEIGHT - BOTTOM]
    inside.sort(key=lambda mean: -mean.y[-1])
    heights = [box.y(mean.y[-1]) for mean in inside]
    for k in range(1, len(heights)):
        heights[k] = max(heights[k], heights[k - 1] + LABEL_HEIGHT)
    lowest = float(HEIGHT - BOTTOM)
    for k in reversed(range(len(heights))):
        heights[k] = lowest = min(heights[k], lowest)
        lowest -= LABEL_HEIGHT
    pieces = []
    for mean, height in zip(inside, heights, strict=True):
        arm = recipes.index(mean.recipe)
        x, y = box.x(mean.x[-1]) + 4, height + 4
        pieces.append(f'<text class="end arm-{arm}" x="{x:.0f}" y="{y:.0f}">{arm + 1}</text>')
    return "".join(pieces)


def _grid(box: _Box, axis: str) -> str:
    """Lines and figures of both axes, and the title of the x axis."""
    bottom, pieces = HEIGHT - BOTTOM, []
    for tick in _ticks(box.up, 5):
        y = box.y(tick)
        pieces.append(f'<path class="grid" d="M{LEFT},{y:.1f}H{WIDTH - RIGHT}"/>')
        pieces.append(f'<text class="tick y" x="{LEFT - 6}" y="{y + 4:.1f}">{_short(tick)}</text>')
    for tick in _ticks(box.across, 6):
        pieces.append(f'<text class="tick x" x="{box.x(tick):.1f}" y="{bottom + 15}">{_short(tick)}</text>')
    pieces.append(f'<path class="axis" d="M{LEFT},{bottom}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    return "".join(pieces) + f'<text class="title" x="{middle:.0f}" y="{HEIGHT - 6}">{escape(axis)}</text>'


def _ticks(span: Range, most: int) -> Iterable[float]:
    ticks = MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(*span)
    return [float(tick) for tick in ticks if span[0] <= tick <= span[1]]


def _short(value: float) -> str:
    """A figure of an axis, with M for millions and k for thousands."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{np.round(value, 10):g}"
