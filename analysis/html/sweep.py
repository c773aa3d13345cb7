"""`report.html` of a sweep: the Markdown report, the best trials' curves to read, and a line a trial to point at."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from analysis.html.coordinates import coordinates, shade_style
from analysis.html.curves import SECONDS, TOKENS, Chart, Curve, Mean, View, described, rounded
from analysis.html.markup import to_html
from analysis.html.page import arm_style, chart_groups, document, embedded, legend
from analysis.measures import FINISHED
from analysis.plots import ZOOM_FRACTION
from analysis.sweep_report import COORDINATES_PLOT, best_trials, render_sweep, sweep_plots
from analysis.sweeps import Sweep
from cggr_ray.schema import TRAIN_SECONDS, VAL_LOSS

# Curves that can be told apart.
MOST_CURVES = 8
BUDGET_TITLE = "Loss against the budget"


def write_sweep_html(sweep: Sweep, path: Path | str) -> Path:
    """Writes the page of a sweep to `path`, whose folder exists; returns the path."""
    target = Path(path)
    target.write_text(sweep_page(sweep), encoding="utf-8")
    return target


def sweep_page(sweep: Sweep) -> str:
    """The whole page."""
    markdown, chart = render_sweep(sweep), best_chart(sweep)
    arms = [curve.recipe for curve in chart.views[0].curves]
    plots = {file: plot for file, _, plot in sweep_plots(sweep)}
    data = {"recipes": arms, "zoom": ZOOM_FRACTION, "charts": [asdict(chart)] if arms else []}

    def image(name: str, caption: str) -> str:
        if name == COORDINATES_PLOT[0]:
            return f"<p>A line says its values under the pointer.</p>{coordinates(sweep)}"
        return embedded(lambda file, target: plots[file](sweep, target), name, caption)

    if not arms:
        return document(markdown, image, {}, shade_style(), data)
    body = markdown.partition(f"\n## {BUDGET_TITLE}\n")[2].partition("\n## ")[0]
    best = f"<h3>The best trials</h3>{_legend(sweep, arms)}{chart_groups([chart], arms)}"
    return document(markdown, image, {BUDGET_TITLE: to_html(body, image) + best}, arm_style(arms) + shade_style(), data)


def best_chart(sweep: Sweep) -> Chart:
    """Validation loss of the best trials, an arm each, against train seconds and tokens."""
    unit, meaning = described(VAL_LOSS)
    known = sweep.results.dropna(subset=[VAL_LOSS]).sort_values(TRAIN_SECONDS)
    best = best_trials(sweep, MOST_CURVES)
    views = []
    for title, x, scale in (SECONDS, TOKENS):
        curves = []
        for trial, status in zip(best["trial_id"], best["status"], strict=True):
            own = known[known["trial_id"] == trial]
            if len(own):
                points = rounded(own[x] * scale), rounded(own[VAL_LOSS])
                curves.append(Curve(trial, trial, status == FINISHED, *points))
        # Each is the mean of itself alone: drawn thick, named at its end and read out.
        means = [Mean(curve.recipe, 1, curve.x, curve.y, [None] * len(curve.x)) for curve in curves]
        views.append(View(title, tuple(curves), tuple(means)))
    return Chart(VAL_LOSS, unit, meaning, "Held-out loss", False, tuple(views))


def _legend(sweep: Sweep, arms: list[str]) -> str:
    losses = sweep.trials.set_index("trial_id")[VAL_LOSS]
    return legend("Trials", [(trial, f"{losses[trial]:.4f}") for trial in arms])
