"""`benchmark_results.md` of a sweep: the best trials, which hyperparameters matter, and what became of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.hyperparameters import BEST_SHARE, CHANCE, FEWEST_BEST, FEWEST_TRIALS, importance, num_best
from analysis.measures import FINISHED
from analysis.sweep_plots import plot_budget, plot_coordinates, plot_importance, plot_timeline
from analysis.sweeps import VALUES, Sweep
from analysis.tables import MARKDOWN, NONE, figure, plain, table
from cggr_ray.saying import counted
from cggr_ray.schema import PEAK_MEMORY, TOKENS_SEEN, TRAIN_SECONDS, VAL_LOSS

MOST_BEST = 10
# Not failures: they ended as they were meant to.
INTENDED = (FINISHED, "stopped", "cut", "unfinished")
LONGEST_REASON = 200
BEST_NOTE = (
    "Trials that used their whole budget, the lowest loss first; all read the same data with the same seed. The lowest "
    "of many losses is partly luck: race it against the defaults with other seeds before believing it."
)
UNFINISHED_NOTE = (
    "No trial with a loss has used its whole budget: these are the lowest last losses, after train seconds that differ."
)
IMPORTANCE_NOTE = f"""\
PED-ANOVA (arXiv:2304.10255, by Optuna): how differently the values of the best {100 * BEST_SHARE:.0f} % of trials (at
least {FEWEST_BEST}, here {{best}} of {{trials}}) are spread from those of all, less what shuffled losses give on
average, as a share of all. A stopped trial counts with its last loss; one without a loss is left out. Chance is what
{100 * CHANCE:.0f} % of shuffles stay below: an importance below it says nothing, and one in twenty passes it by luck.
Correlation is Spearman's with the loss, below 0 where larger values are better."""
BUDGET_NOTE = "A cross is where a trial ended early. The loss axis leaves out the highest tenth of all losses."

Plots = tuple[tuple[str, str, Callable[[Sweep, Path], Path]], ...]
BUDGET_PLOT = ("loss_against_budget.png", "Validation loss of every trial against train seconds", plot_budget)
IMPORTANCE_PLOT = ("importance.png", "Importance of every hyperparameter, and what chance would give", plot_importance)
COORDINATES_PLOT = (
    "parallel_coordinates.png",
    "Hyperparameters of every trial, the most important first; bolder is a lower loss, below an axis is without it",
    plot_coordinates,
)
TIMELINE_PLOT = ("timeline.png", "Trials from begin to end", plot_timeline)


def render_sweep(sweep: Sweep) -> str:
    """The Markdown of a sweep's report; it links to the plots by their names in `sweep_plots`."""
    settings = json.dumps({"search": sweep.spec.get("search"), "race": sweep.spec.get("spec")}, indent=2)
    sections = [
        (f"# Sweep {sweep.spec.get('name', sweep.folder.resolve().name)}", headline(sweep)),
        ("## Best trials", f"{best_table(sweep)}\n\n{_best_note(sweep)}"),
        ("## Which hyperparameters matter", _importance_section(sweep)),
        ("## Loss against the budget", _budget_section(sweep)),
        ("## Timeline", _image(TIMELINE_PLOT)),
        ("## Failures, and why", failures_table(sweep)),
        ("## What these figures cannot say", "\n".join(f"* {line}" for line in sweep_caveats(sweep))),
        ("## Settings", f"Command: `{sweep.spec.get('command', NONE)}`\n\n```json\n{settings}\n```"),
    ]
    return "\n\n".join(f"{heading}\n\n{body.strip()}" for heading, body in sections) + "\n"


def sweep_plots(sweep: Sweep) -> Plots:
    """Those that have something to show."""
    ranked = (IMPORTANCE_PLOT,) if len(importance(sweep)) else ()
    losses = (BUDGET_PLOT,) if sweep.results[VAL_LOSS].notna().any() else ()
    drawn = (COORDINATES_PLOT,) if sweep.trials[VAL_LOSS].notna().any() else ()
    return (*ranked, *drawn, *losses, TIMELINE_PLOT)


def headline(sweep: Sweep) -> str:
    """What was searched, how many trials ended how, and the best loss."""
    counts = sweep.trials["status"].value_counts()
    ends = ", ".join(f"{number} {str(status).replace('_', ' ')}" for status, number in counts.items())
    budget = NONE if sweep.budget_seconds is None else plain(sweep.budget_seconds)
    best = best_trials(sweep, 1)
    rows = zip(best["trial_id"], best["status"], best[VAL_LOSS], strict=True)
    found = "".join(f" Best: {trial} ({status}), {figure(loss, 4)} nats/token." for trial, status, loss in rows)
    what = f"{sweep.spec.get('recipe', NONE)}, space {sweep.spec.get('space', NONE)}"
    return f"{what}: {counted(len(sweep.trials), 'trial')} ({ends}), {budget} train seconds each.{found}"


def best_trials(sweep: Sweep, most: int = MOST_BEST) -> pd.DataFrame:
    """The rows of the finished trials with the lowest losses; of all trials with a loss where none finished."""
    known = sweep.trials.dropna(subset=[VAL_LOSS])
    finished = known[known["status"] == FINISHED]
    return (finished if len(finished) else known).sort_values(VAL_LOSS, kind="stable").head(most)


def _best_note(sweep: Sweep) -> str:
    return BEST_NOTE if (best_trials(sweep, 1)["status"] == FINISHED).any() else UNFINISHED_NOTE


def best_table(sweep: Sweep, style: str = MARKDOWN) -> str:
    """One row a trial of `best_trials`, with the hyperparameters that differ between trials."""
    names = sweep.hyperparameters
    headers = ["trial", "status", "val loss", "train seconds", "tokens (M)", "peak memory (MiB)", *names]
    rows = []
    for trial in best_trials(sweep).to_dict("records"):
        cells = [str(trial["trial_id"]), str(trial["status"]), figure(trial[VAL_LOSS], 4)]
        cells += [figure(trial[TRAIN_SECONDS], 1), figure(trial[TOKENS_SEEN] / 1e6, 2), figure(trial[PEAK_MEMORY], 0)]
        rows.append([*cells, *(_value(trial[VALUES + name]) for name in names)])
    return table(headers, rows, style)


def rung_table(sweep: Sweep) -> str:
    """One row a validation time: how many trials came so far, how many went no further, and the losses there."""
    known = sweep.results.dropna(subset=[VAL_LOSS]).sort_values(TRAIN_SECONDS)
    # A validation comes up to a step late: times closer than half of what lies between two of one trial are one.
    apart = known.groupby("trial_id")[TRAIN_SECONDS].diff().min()
    at = (known[TRAIN_SECONDS].diff() > apart / 2).cumsum()
    last = at.groupby(known["trial_id"]).transform("max")
    stopped = set(sweep.trials.loc[sweep.trials["status"] == "stopped", "trial_id"])
    rows = []
    for _, own in known.groupby(at):
        here = own[(at == last)[own.index] & own["trial_id"].isin(stopped)]
        losses = [figure(float(own[VAL_LOSS].quantile(q)), 4) for q in (0.0, 0.5, 1.0)]
        rows.append([figure(own[TRAIN_SECONDS].median(), 1), str(own["trial_id"].nunique()), str(len(here)), *losses])
    return table(["train seconds", "trials", "stopped here", "lowest loss", "median", "highest"], rows)


def failures_table(sweep: Sweep) -> str:
    """One row a way to fail: how many trials, which, and the first reason."""
    failed = sweep.trials[~sweep.trials["status"].isin(INTENDED)]
    if not len(failed):
        return "No trial failed."
    reasons = failed["message"].fillna("").map(_reason)
    rows = []
    for (status, reason), own in failed.groupby(["status", reasons], sort=False):
        named = ", ".join(own["trial_id"].head(5)) + (", …" if len(own) > 5 else "")
        asked = figure(own[PEAK_MEMORY].max(), 0)
        rows.append([str(status).replace("_", " "), str(len(own)), named, asked, str(reason) or "no message"])
    return table(["how", "number", "trials", "most memory (MiB)", "why"], rows)


def sweep_caveats(sweep: Sweep) -> list[str]:
    """What the figures of a sweep cannot say."""
    trials, notes = sweep.trials, []
    if (trials["gpus_per_trial"] < 1).any():
        notes.append(
            "**Trials shared a GPU: what each did in its seconds depended on its neighbours. Their speeds, and losses "
            "at equal seconds, are not comparable with those of a race.**"
        )
    stopped = int((trials["status"] == "stopped").sum())
    if stopped:
        notes.append(
            f"Stopped early: {counted(stopped, 'trial')}. Some would have ended lower than the best that went on."
        )
    moved = int((trials["exploits"] > 0).sum())
    if moved:
        notes.append(
            f"Gone on with the weights of others: {counted(moved, 'trial')}. The values shown are those they ended "
            "with, and how important a hyperparameter looks mixes several settings."
        )
    open_ended = int((trials["status"] == "unfinished").sum())
    if open_ended:
        notes.append(f"Not ended yet: {counted(open_ended, 'trial')}.")
    notes.append("One seed, one budget, one model: differences within the spread over seeds are none.")
    return notes


def _importance_section(sweep: Sweep) -> str:
    ranked, known = importance(sweep), int(np.isfinite(sweep.trials[VAL_LOSS].astype(float)).sum())
    drawn = f"\n\n{_image(COORDINATES_PLOT)}" if known else ""
    if not len(ranked):
        return f"Fewer than {FEWEST_TRIALS} trials have a loss, or none of their values differ.{drawn}"
    rows = [
        [
            str(row["hyperparameter"]),
            figure(row["importance"], 3),
            figure(row["chance"], 3),
            "yes" if row["importance"] > row["chance"] else "no",
            figure(row["correlation"], 2, sign=True),
            str(row["best_values"]),
        ]
        for row in ranked.to_dict("records")
    ]
    headers = ("hyperparameter", "importance", "chance", "beyond chance", "correlation", "values of the best")
    note = IMPORTANCE_NOTE.format(best=num_best(known), trials=known)
    return f"{table(headers, rows)}\n\n{note}\n\n{_image(IMPORTANCE_PLOT)}{drawn}"


def _budget_section(sweep: Sweep) -> str:
    if not sweep.results[VAL_LOSS].notna().any():
        return "No trial has been validated."
    return f"{rung_table(sweep)}\n\n{BUDGET_NOTE}\n\n{_image(BUDGET_PLOT)}"


def _image(plot: tuple[str, str, Callable[[Sweep, Path], Path]]) -> str:
    return f"**{plot[1]}**\n\n![{plot[1]}]({plot[0]})"


def _value(value: object) -> str:
    return NONE if pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else str(value)  # type: ignore[call-overload]


def _reason(message: str) -> str:
    """The first line of a message, of a length that a table can hold."""
    first = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return first if len(first) <= LONGEST_REASON else f"{first[:LONGEST_REASON]}…"
