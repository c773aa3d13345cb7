"""Parallel coordinates of a sweep as an SVG picture: a trial's line thickens under the pointer and says its values."""

from __future__ import annotations

from html import escape

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from analysis.coordinates import Axis, axes_of, best_last
from analysis.sweeps import Sweep
from analysis.tables import figure
from cggr_ray.schema import VAL_LOSS

BETWEEN, HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 132, 400, 58, 34, 24, 64
INNER = HEIGHT - TOP - BOTTOM
# Where a line passes an axis whose hyperparameter the trial does not have.
WITHOUT = -0.06
SHADES = 10
STYLE = (
    ".coordinates path{fill:none;stroke-linejoin:round}.coordinates .trial:hover{stroke-width:6;opacity:1}"
    ".coordinates text{font-size:11.5px;fill:var(--faint);paint-order:stroke;stroke:var(--paper);stroke-width:4px}"
    ".coordinates .title{fill:var(--ink)}.coordinates .upright{stroke:var(--faint)}"
)


def shade_style() -> str:
    """A class a shade, the best last: bolder, and away from the colour of the page."""
    rules = []
    for shade in range(SHADES):
        part = shade / (SHADES - 1)
        paper, night = to_hex(colormaps["viridis_r"](part)), to_hex(colormaps["viridis"](part))
        look = f"stroke:light-dark({paper},{night});stroke-width:{1 + 1.6 * part:.1f};opacity:{0.5 + 0.5 * part:.2f}"
        rules.append(f".shade-{shade}{{{look}}}")
    return "".join(rules) + STYLE


def coordinates(sweep: Sweep) -> str:
    """The picture in a box that scrolls by itself; nothing where no trial has a loss."""
    trials = best_last(sweep)
    if not len(trials):
        return ""
    axes = axes_of(sweep)
    width = LEFT + BETWEEN * (len(axes) - 1) + RIGHT
    heights = np.nan_to_num(np.array([axis.heights(trials) for axis in axes]).T, nan=WITHOUT)
    # The worst is drawn first, the best last and on top.
    shades = np.arange(len(trials)) * SHADES // len(trials)
    lines = [
        f'<path class="trial shade-{shade}" d="M{_points(row)}"><title>{escape(words)}</title></path>'
        for row, shade, words in zip(heights, shades, _words(trials.to_dict("records"), axes), strict=True)
    ]
    drawn = "".join((*lines, *(_upright(place, axis) for place, axis in enumerate(axes))))
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="Parallel coordinates">'
        f'<svg class="coordinates" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" role="img" '
        f'aria-label="Hyperparameters and loss of {len(trials)} trials">{drawn}</svg></div>'
    )


def _words(trials: list[dict[object, object]], axes: list[Axis]) -> list[str]:
    """What a line says of its trial: id, status, loss, and the values it passes."""
    said = []
    for trial in trials:
        values = [
            f"{axis.title} = {trial[axis.column]}" for axis in axes[:-1] if trial[axis.column] == trial[axis.column]
        ]
        loss = figure(float(str(trial[VAL_LOSS])), 4)
        said.append("\n".join([f"{trial['trial_id']} ({trial['status']}): {loss} nats/token", *values]))
    return said


def _points(row: np.ndarray) -> str:
    return "L".join(f"{LEFT + BETWEEN * place},{_y(height):.1f}" for place, height in enumerate(row))


def _y(height: float) -> float:
    return TOP + (1 - height) * INNER


def _upright(place: int, axis: Axis) -> str:
    """An axis with its figures; names stand at two levels, so that neighbours have room."""
    x = LEFT + BETWEEN * place
    labels = "".join(
        f'<text x="{x + 5}" y="{_y(height) + 4:.1f}">{escape(label)}</text>' for label, height in axis.ticks()
    )
    title = f'<text class="title" x="{max(x - 20, 4)}" y="{18 + 18 * (place % 2)}">{escape(axis.title)}</text>'
    return f'<path class="upright" d="M{x},{TOP}V{HEIGHT - BOTTOM}"/>{labels}{title}'
