"""`benchmark_results.md` of a race: what ran, who was ahead, how sure that is, and whether the race was fair.

The file is to be read by somebody who has nothing else, so it explains its own columns, shows the checks a race must
pass (ledgers that add up, one data order) and says what its figures cannot support.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.frames import Race, read_race
from analysis.layers import relevance_shares, resting_rows
from analysis.measures import FINISHED, comparison, epochs, equal_tokens, ledger_check, order_check
from analysis.plots import (
    ZOOM_FRACTION,
    plot_active_layers,
    plot_loss_against_seconds,
    plot_loss_against_tokens,
    plot_memory,
    plot_relevance,
    plot_speed,
)
from analysis.tables import (
    NONE,
    comparison_table,
    distinct,
    figure,
    layers_table,
    ledger_table,
    order_table,
    plain,
    settings_table,
    table,
    validation_table,
)
from cggr_ray.schema import KEPT_LOSS, VAL_LOSS

REPORT_FILE = "benchmark_results.md"
REPORT_FOLDER = "report"
# Ledgers that miss the wall clock by more than this many percent leave time unexplained.
CLOSURE_PERCENT = 0.5
# Passes over the same documents after which new ones would be worth much more.
FRESH_EPOCHS = 4
PLOTS = (
    ("loss_against_seconds.png", "Validation loss against train seconds: equal time", plot_loss_against_seconds),
    ("loss_against_tokens.png", "Validation loss against tokens seen: equal data", plot_loss_against_tokens),
    ("tokens_per_second.png", "Tokens per train second", plot_speed),
    ("memory.png", "Peak device memory", plot_memory),
)
LAYER_PLOTS = (
    ("active_layers.png", "Layers that learn between probes, against train seconds", plot_active_layers),
    ("relevance.png", "Relevance of every layer, as shares of what a probe found, first seed", plot_relevance),
)
Plots = tuple[tuple[str, str, Callable[[Race, Path], Path]], ...]
CURVE_NOTE = (
    "Thin lines are runs, thick lines means over a recipe's finished runs. The loss axis leaves out what lies above "
    f"every loss measured after {ZOOM_FRACTION:.0%} of the budget."
)
COLUMN_NOTES = """\
* **finished**: runs that used their whole budget, of those started. Only they enter this table.
* **final val loss**: mean next-token loss on held-out documents at the end of the budget, that is, at equal time.
* **difference to baseline**: final val loss minus that of the baseline run of the same seed; below zero is better.
* **val loss at equal tokens**: interpolated at {tokens} million tokens seen, the most that every finished run reached.
* **time to baseline's final loss**: train seconds until the run first gets to the final val loss of the baseline run of
  its seed, interpolated between milestones; "reached by k of n" if some pairs never got there.
* **speed-up**: the baseline's own time to that loss divided by the time above; above one is faster.
* **tokens seen, tokens/s**: tokens read from the stream, padding left out, whether or not they carried a gradient;
  per train second. **epochs**: how often the training documents were read. **steps**: optimizer updates.
* **peak memory**: largest allocation on the device.
* **±**: half width of the 95 % Student t interval over seeds (over pairs for differences, times and speed-ups);
  without it there was one run only.

Train seconds are training plus waiting for data; nothing else counts against the budget."""

LAYER_NOTES = """\
Runs in which a layer ever rested.

* **layers that learn**: mean over train seconds, probes included.
* **probes**: steps in which every layer learns and its relevance is measured.
* **switches**: changes of the number of layers that learn, between steps that are no probes.
* **full at the start, between, at the end**: seconds in which every layer learns, probes left out: before some rest for
  the first time, in the midst, and after they rested for the last time (recovery).
* **steps a row**: a logged row speaks for the steps since the row before it, a probe for itself alone. Above 1.0 the
  seconds are estimates, and switches are those in the log: more may have happened."""


def write_report(race_folder: Path | str, out: Path | str | None = None) -> Path:
    """Writes the report, its plots and the frames as Parquet; returns the path of the Markdown file.

    Without `out` they go to `report/` in the race folder. Raises ValueError if the folder holds no run.
    """
    race = read_race(race_folder)
    target = Path(out) if out is not None else race.folder / REPORT_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    race.to_parquet(target)
    for name, _, plot in (*PLOTS, *_layer_plots(race)):
        plot(race, target / name)
    path = target / REPORT_FILE
    path.write_text(render(race), encoding="utf-8")
    return path


def render(race: Race) -> str:
    """The Markdown of a report; it links to the plots by the names in PLOTS and LAYER_PLOTS."""
    tokens = figure(equal_tokens(race) / 1e6, 3)
    sections = (
        (
            f"# Race {race.spec.get('name', race.folder.resolve().name)}",
            f"{_headline(race)}\n\n{_bullets(verdicts(race))}",
        ),
        ("## What ran", _what_ran(race)),
        ("## Comparison", f"{comparison_table(race)}\n\n{COLUMN_NOTES.format(tokens=tokens)}"),
        ("## Curves", f"{CURVE_NOTE}\n\n{_images(PLOTS)}"),
        *_layers(race),
        ("## Validation, run by run", f"{validation_table(race)}\n\n{_unfinished(race)}"),
        ("## Where the time went", f"{_ledger_words(race)}\n\n{ledger_table(race)}"),
        ("## Order of the data", f"{_order_words(race)}\n\n{order_table(race)}"),
        ("## Settings of every recipe", f"{tuning_words(race)}\n\n{settings_table(race)}"),
        ("## What these figures cannot say", _bullets(_caveats(race))),
        ("## Specification", f"```json\n{json.dumps(race.spec.get('spec', {}), indent=2, ensure_ascii=False)}\n```"),
    )
    return "\n\n".join(f"{title}\n\n{body.strip()}" for title, body in sections) + "\n"


def _images(plots: Plots) -> str:
    return "\n\n".join(f"**{caption}**\n\n![{caption}]({name})" for name, caption, _ in plots)


def _layers(race: Race) -> list[tuple[str, str]]:
    """The section on resting layers, where some rested."""
    plots = _layer_plots(race)
    return [("## Layers that learn", f"{layers_table(race)}\n\n{LAYER_NOTES}\n\n{_images(plots)}")] if plots else []


def _layer_plots(race: Race) -> Plots:
    """Those that have something to show."""
    shown = (len(resting_rows(race)), len(relevance_shares(race)))
    return tuple(plot for plot, some in zip(LAYER_PLOTS, shown, strict=True) if some)


def summary_table(race: Race) -> str:
    """The comparison and its verdicts as plain text, for a terminal."""
    return comparison_table(race, "simple") + "\n\n" + "\n".join(f"{line}" for line in verdicts(race, bold=False))


def verdicts(race: Race, bold: bool = True) -> list[str]:
    """One sentence a recipe, no stronger than its seeds allow."""
    mark = "**" if bold else ""
    rows = comparison(race).to_dict("records")
    lines = [f"{mark}{r['recipe']}{mark}: {_verdict(race, r)}." for r in rows if r["recipe"] != race.baseline]
    return lines or [f"Only {race.baseline} ran: there is nothing to compare"]


def _verdict(race: Race, row: dict[Any, Any]) -> str:
    lost = _lost(race, row["recipe"])
    if row["seeds"] == 0:
        return f"no run finished ({lost}): nothing can be compared"
    if row["pairs"] == 0:
        return f"no finished {race.baseline} run has one of its seeds: nothing can be compared"
    n, difference, half = row["pairs"], row["loss_difference"], row["loss_difference_half_width"]
    measured = f"{figure(difference, 4, half, sign=True)} nats/token against {race.baseline} at equal time"
    if math.isnan(difference):
        words = "a final loss is not a number: nothing can be concluded"
    elif n == 1:
        words = f"one seed: no interval, nothing can be concluded (measured {measured})"
    elif abs(difference) <= half:
        words = f"no difference that {n} seeds could show: {measured}, and the 95 % interval includes 0"
    else:
        side = "lower" if difference < 0 else "higher"
        words = f"{side} final loss: {measured}, and the 95 % interval over {n} pairs excludes 0"
    if n > 1:
        words += f"; {_speed_words(race, row)}"
    return f"{words}; {lost}, left out of these figures" if lost else words


def _speed_words(race: Race, row: dict[Any, Any]) -> str:
    if row["reached"] < row["pairs"]:
        return f"{row['reached']} of {row['pairs']} pairs reached {race.baseline}'s final loss"
    ratio, half = row["speed_up"], row["speed_up_half_width"]
    unsure = ", an interval that includes 1" if abs(ratio - 1) <= half else ""
    return f"speed-up to {race.baseline}'s final loss {figure(ratio, 2, half)}{unsure}"


def _lost(race: Race, recipe: str) -> str:
    """How the runs of a recipe that cannot be compared ended, as `1 run diverged`; empty if there are none."""
    status = race.runs.loc[race.runs["recipe"] == recipe, "status"]
    counts = Counter(str(word) for word in status if word != FINISHED)
    return ", ".join(f"{count} run{'s' if count > 1 else ''} {word}" for word, count in counts.items())


def _headline(race: Race) -> str:
    counts = f"{len(race.recipes)} recipes, {len(race.runs)} runs, {race.runs['seed'].nunique()} seeds"
    device = distinct(race.runs, "device/name")
    return f"{counts}, {_budget(race)} train seconds a run, on {device}. Baseline: {race.baseline}."


def _budget(race: Race) -> str:
    seconds = race.spec.get("budget_seconds")
    return plain(seconds) if seconds is not None else distinct(race.runs, "budget_seconds")


def _what_ran(race: Race) -> str:
    runs = race.runs
    rows = [["recipes", ", ".join(race.recipes)], ["baseline", race.baseline]]
    rows += [["budget (train seconds)", _budget(race)]]
    rows += [["seeds", distinct(runs, "seed")], ["data seeds", distinct(runs, "data_seed")]]
    for group in ("model", "data", "device"):
        names = [str(name) for name in runs.columns if str(name) == group or str(name).startswith(f"{group}/")]
        rows += [[name.replace("/", ", ").replace("_", " "), distinct(runs, name)] for name in names]
    rows += [["trained parameters, all parts", distinct(runs, "parameters")]]
    sources = [
        str(name).removeprefix(f"{VAL_LOSS}/") for name in race.milestones if str(name).startswith(VAL_LOSS + "/")
    ]
    rows += [["validation sources", ", ".join(sources) or NONE], ["tokens per step", _step_tokens(runs)]]
    versions = [str(name) for name in runs.columns if str(name).startswith("versions/")]
    rows += [["versions", ", ".join(f"{name.removeprefix('versions/')} {distinct(runs, name)}" for name in versions)]]
    return table(["", ""], [row for row in rows if row[1] not in ("", NONE)])


def _step_tokens(runs: pd.DataFrame) -> str:
    if not {"row_tokens", "global_rows"} <= set(runs.columns):
        return NONE
    shapes = runs[["recipe", "row_tokens", "global_rows"]].dropna().drop_duplicates()
    texts = {
        str(recipe): f"{int(rows * width):,} ({int(rows)} rows of {int(width)})"
        for recipe, width, rows in shapes.itertuples(index=False)
    }
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{recipe}: {text}" for recipe, text in texts.items()) or NONE


def _unfinished(race: Race) -> str:
    """Why runs did not finish, and which trials of the race left no run at all."""
    messages = race.runs.get("message", pd.Series("", index=race.runs.index))
    lines = [
        f"{run} ({status}): {message if isinstance(message, str) and message else 'no message'}"
        for run, status, message in zip(race.runs["trial_id"], race.runs["status"], messages, strict=True)
        if status != FINISHED
    ]
    absent = [str(trial) for trial in race.spec.get("trials", ()) if trial not in set(race.runs["trial_id"])]
    return _bullets(lines + [f"{trial}: never started" for trial in absent])


def _ledger_words(race: Race) -> str:
    checks = ledger_check(race)
    worst = checks["difference_percent"].abs().max()
    if len(checks) == 0 or checks["difference_percent"].isna().any():
        closure = "Ledgers or wall clock are missing for some runs, so they cannot be said to add up."
    elif worst > CLOSURE_PERCENT:
        closure = f"**The ledgers miss the wall clock by up to {worst:.2f} %: time is unexplained.**"
    else:
        closure = f"The eight ledgers add up to the wall clock within {worst:.3f} % in every run."
    overrun = checks["overrun_steps"].max()
    late = f" Training used at most {overrun:.2f} last steps beyond the budget." if not pd.isna(overrun) else ""
    return f"{closure}{late} Seconds; the budget is the sum of the columns marked *."


def _order_words(race: Race) -> str:
    agree = order_check(race)["agree"]
    if (agree == False).any():  # noqa: E712 - nullable booleans
        return "**Runs of one data seed read different rows: their losses cannot be compared as pairs.**"
    if agree.isna().any() or len(agree) == 0:
        return "Some runs had no run of the same data seed to compare with."
    return "Every run read the same rows in the same order as the other runs of its data seed, at every mark compared."


def tuning_words(race: Race) -> str:
    """How the arms were tuned before the race, in a sentence; an arm without any of the values tried was not."""
    spec = race.spec.get("spec", {})
    tuning = spec.get("tuning")
    if tuning is None:
        return "No arm was tuned for this race."
    arms, tried = spec.get("arms", {}), tuning["values"]
    names = list(spec.get("recipes", race.recipes))
    untuned = [name for name in names if not any(entry.items() <= arms.get(name, {}).items() for entry in tried)]
    if len(untuned) == len(names):
        return "The race's file describes a tuning, but no arm has any of its values: no arm was tuned for this race."
    keys = "; ".join(f"{key} = {plain([entry[key] for entry in tried])}" for key in tried[0])
    together = " (varied together)" if len(tried[0]) > 1 else ""
    words = (
        f"Before the race each arm had {len(tried)} trials of {plain(tuning['seconds'])} train seconds, seed "
        f"{tuning['seed']}, over {keys}{together}; it races with the values of its lowest loss on the same held-out "
        "documents."
    )
    return f"{words} **Not so {', '.join(untuned)}: none of these values.**" if untuned else words


def _caveats(race: Race) -> list[str]:
    rows = comparison(race)
    pairs = rows.loc[rows["recipe"] != race.baseline, "pairs"]
    fewest = int(pairs.min()) if len(pairs) else 0
    notes = [
        f"The smallest comparison has {fewest} pairs: its t interval is wide and assumes a roughly normal spread."
        if fewest > 1
        else "A recipe with fewer than two pairs has no interval; its difference may be the luck of one seed.",
        "One budget, one model and one device: a ranking can turn over at another of either.",
        "Every recipe ran with the learning rate in the table of settings; one that was tuned less well looks worse.",
        "Time to a loss is interpolated linearly between milestones: late on a convex curve, within one spacing.",
    ]
    if race.runs.get("data_seed", pd.Series()).nunique() == 1:
        notes.append("All runs share one order of the data: the spread over seeds leaves out that of the order.")
    if len(pairs) > 1:
        notes.append(f"{len(pairs)} recipes are compared with one baseline; the intervals are not widened for that.")
    most = {recipe: max(passes.values(), default=0.0) for recipe, passes in epochs(race).items()}
    if max(most.values(), default=0.0) > FRESH_EPOCHS:
        passes = ", ".join(f"{recipe} {figure(number, 1)}" for recipe, number in most.items())
        notes.append(
            f"Documents were read more often than about {FRESH_EPOCHS} times ({passes}), beyond which they teach "
            "little (arXiv:2305.16264) and more tokens a second turn into memorising: more data may change the ranking."
        )
    if KEPT_LOSS in race.steps.columns:
        notes.append("Training loss of recipes that select is over kept positions and compares with no other recipe's.")
    return notes


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)
