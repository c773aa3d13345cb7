"""`benchmark_results.md` of a race: what ran, who was ahead, how sure that is, and whether the race was fair.

The file is to be read by somebody who has nothing else, so it explains its own columns, shows the checks a race must
pass (ledgers that add up, one data order) and says what its figures cannot support.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from analysis.cautions import (
    caveats,
    ledger_words,
    never_started,
    order_words,
    stability_words,
    tuning_words,
    unfinished,
)
from analysis.findings import (
    answers_table,
    efficiency_table,
    milestones_table,
    profile_table,
    run_scores_table,
    saturation_table,
    score_table,
    targets_table,
    tokens_table,
    verdict_table,
)
from analysis.frames import Race
from analysis.judging import LOSS, claims, lost_runs
from analysis.layers import layer_rows, relevance_shares
from analysis.measures import FINISHED, comparison, equal_tokens, finished_runs
from analysis.notes import (
    COLUMN_NOTES,
    EFFICIENCY_NOTES,
    LAYER_NOTES,
    MILESTONE_NOTES,
    RATIO_NOTE,
    SATURATION_NOTES,
    SCORE_NOTES,
    SET_SECONDS_NOTE,
    SPEED_NOTES,
    SPEED_UP_NOTE,
    TARGET_NOTES,
    TEST_NOTES,
    UNTESTED_NOTE,
    VERDICT_NOTES,
)
from analysis.plots import (
    ZOOM_FRACTION,
    plot_active_layers,
    plot_loss,
    plot_memory,
    plot_relevance,
    plot_score,
    plot_speed,
)
from analysis.scores import PREFIX, PRIMARY, primary_scores, score_names, task_names, unequal_questions
from analysis.stats import ALPHA
from analysis.tables import (
    NONE,
    by_recipe,
    comparison_table,
    distinct,
    figure,
    layers_table,
    ledger_table,
    order_table,
    plain,
    settings_table,
    stability_table,
    table,
    validation_table,
)
from analysis.targets import TARGET_FRACTIONS
from cggr_ray.saying import counted
from cggr_ray.schema import RACE_FILE, TOKENS_SEEN, TRAIN_SECONDS, VAL_LOSS, VAL_TOKENS

REPORT_FILE = "benchmark_results.md"
PLOTS = (
    (
        "loss_against_seconds.png",
        "Validation loss against train seconds: equal time",
        partial(plot_loss, position=TRAIN_SECONDS),
    ),
    (
        "loss_against_tokens.png",
        "Validation loss against tokens seen: equal data",
        partial(plot_loss, position=TOKENS_SEEN),
    ),
    ("tokens_per_second.png", "Tokens per train second", plot_speed),
)
MEMORY_PLOT = ("memory.png", "Peak device memory", plot_memory)
LAYER_PLOTS = (
    ("active_layers.png", "Layers that learn between probes, against train seconds", plot_active_layers),
    ("relevance.png", "Relevance of every layer, as shares of what a probe found, first seed", plot_relevance),
)
Plots = tuple[tuple[str, str, Callable[[Race, Path], Path]], ...]
CURVE_NOTE = (
    "Thin lines are runs, thick lines means over a recipe's finished runs. The loss axis leaves out what lies above "
    f"every loss measured after {100 * ZOOM_FRACTION:.0f} % of the budget."
)


def render(race: Race) -> str:
    """The Markdown of a report; it links to the plots by the names in `race_plots` and LAYER_PLOTS."""
    title = f"# Race {race.spec.get('name', race.folder.resolve().name)}"
    specification = json.dumps(race.spec.get("spec", {}), indent=2, ensure_ascii=False)
    told_by = f"{RACE_FILE} is not here; as {race.spec['told_by']} has it:\n\n" if "told_by" in race.spec else ""
    sections = (
        (title, _headline(race)),
        ("## Verdicts", _verdict_section(race)),
        ("## What ran", _what_ran(race)),
        ("## Comparison", f"{comparison_table(race)}\n\n{_column_notes(race)}"),
        ("## Curves", f"{CURVE_NOTE}\n\n{_images(race_plots(race))}"),
        *_scores(race),
        *_findings(race),
        *_layers(race),
        ("## Validation, run by run", f"{validation_table(race)}\n\n{_bullets(unfinished(race))}"),
        ("## Stability", f"{stability_words(race)}\n\n{stability_table(race)}"),
        ("## Where the time went", f"{ledger_words(race)}\n\n{ledger_table(race)}"),
        ("## Order of the data", f"{order_words(race)}\n\n{order_table(race)}"),
        ("## Settings of every recipe", f"{tuning_words(race)}\n\n{settings_table(race)}"),
        ("## What these figures cannot say", _bullets(caveats(race))),
        ("## Specification", f"{told_by}```json\n{specification}\n```"),
    )
    return "\n\n".join(f"{heading}\n\n{body.strip()}" for heading, body in sections) + "\n"


def _verdict_section(race: Race) -> str:
    if len(race.recipes) == 1:
        return f"Only {race.baseline} ran: there is nothing to compare."
    lost = {recipe: words for recipe in race.recipes if (words := lost_runs(race, recipe))}
    missing = _bullets([f"{recipe}: {words}, left out of these figures." for recipe, words in lost.items()])
    tests = ", ".join(f"{test} over {pairs} pairs" for test, pairs in _tests(claims(race)))
    family, then = ("", "") if race.stepped else (" for final loss and tokens/s together", SPEED_UP_NOTE)
    tested = TEST_NOTES.format(tests=tests, family=family, percent=f"{100 * ALPHA:.0f}", then=then)
    tested = tested if tests else UNTESTED_NOTE
    speeds = SET_SECONDS_NOTE if race.stepped else SPEED_NOTES.format(baseline=race.baseline)
    ratios = "." if race.stepped else RATIO_NOTE
    notes = VERDICT_NOTES.format(baseline=race.baseline, tests=tested, speeds=speeds, ratios=ratios)
    return "\n\n".join(part for part in (verdict_table(race), missing, notes) if part)


def _tests(judged: pd.DataFrame) -> list[tuple[str, int]]:
    """The tests that gave a p, with their number of pairs."""
    known = judged.dropna(subset=["p"])
    return list(dict.fromkeys(zip(known["test"], known["pairs"], strict=True)))


def _column_notes(race: Race) -> str:
    return COLUMN_NOTES.format(tokens=figure(equal_tokens(race) / 1e6, 3))


def _findings(race: Race) -> list[tuple[str, str]]:
    """The sections that need finished runs with milestones."""
    if not len(comparison(race).dropna(subset=["final_loss"])):
        return []
    at = f"**Loss at equal time** (nats/token)\n\n{milestones_table(race)}"
    tokens = f"**Loss at equal tokens** (nats/token)\n\n{tokens_table(race)}"
    sections = [("## Equal time and equal tokens", f"{at}\n\n{tokens}\n\n{MILESTONE_NOTES}")]
    if len(race.recipes) > 1:
        times = f"{targets_table(race)}\n\n**Performance profile**\n\n{profile_table(race)}\n\n{_target_notes()}"
        sections.append(("## Time to target losses", times))
        sections.append(
            ("## Efficiency, and the value of a kept token", f"{efficiency_table(race)}\n\n{EFFICIENCY_NOTES}")
        )
    return [*sections, ("## Saturation", f"{saturation_table(race)}\n\n{SATURATION_NOTES}")]


def _target_notes() -> str:
    *most, last = (f"{100 * fraction:.0f}" for fraction in TARGET_FRACTIONS)
    return TARGET_NOTES.format(fractions=f"{', '.join(most)} and {last}")


def _scores(race: Race) -> list[tuple[str, str]]:
    """The section on evaluation scores, where milestones asked for some."""
    names = score_names(race)
    if not task_names(race) or not (race.runs["status"] == FINISHED).any():
        return []
    parts = [score_table(race)] if len(race.recipes) > 1 and primary_scores(race) else []
    uneven = ", ".join(name.removeprefix(PREFIX) for name in unequal_questions(race))
    if uneven:
        parts.append(f"**Runs answered different numbers of questions within their time: {uneven}.**")
    for name in names:
        short = name.removeprefix(PREFIX)
        parts += [f"**{short} at equal time**", milestones_table(race, name)]
        parts += [f"**{short} at equal tokens**", tokens_table(race, name)]
    notes = SCORE_NOTES.format(primary=", ".join(PRIMARY))
    parts += ["**Run by run**", run_scores_table(race)] if names else []
    parts += ["**Answers at the end, run by run**", answers_table(race), notes]
    return [("## Evaluation scores", "\n\n".join(parts))]


def _images(plots: Plots) -> str:
    return "\n\n".join(f"**{caption}**\n\n![{caption}]({name})" for name, caption, _ in plots)


def _layers(race: Race) -> list[tuple[str, str]]:
    """The section on resting layers, where some rested or were measured."""
    plots = layer_plots(race)
    return [("## Layers that learn", f"{layers_table(race)}\n\n{LAYER_NOTES}\n\n{_images(plots)}")] if plots else []


def race_plots(race: Race) -> Plots:
    """Loss, speed and the judged score of each task; and memory, where the device said its peak."""
    scores = tuple(plot for score in primary_scores(race) for plot in _score_plots(score))
    memory = (MEMORY_PLOT,) if finished_runs(race)["peak_memory_mib"].notna().any() else ()
    return (*PLOTS, *scores, *memory)


def _score_plots(score: str) -> Plots:
    name = score.removeprefix(PREFIX)
    file = name.replace("/", "_")
    at_seconds, at_tokens = (partial(plot_score, position=at, score=score) for at in (TRAIN_SECONDS, TOKENS_SEEN))
    return (
        (f"{file}_against_seconds.png", f"{name} against train seconds", at_seconds),
        (f"{file}_against_tokens.png", f"{name} against tokens seen", at_tokens),
    )


def layer_plots(race: Race) -> Plots:
    """Those that have something to show."""
    shown = (len(layer_rows(race)), len(relevance_shares(race)))
    return tuple(plot for plot, some in zip(LAYER_PLOTS, shown, strict=True) if some)


def summary_table(race: Race) -> str:
    """The comparison and its verdicts as plain text, for a terminal."""
    return comparison_table(race, "simple") + "\n\n" + "\n".join(verdicts(race))


def verdicts(race: Race) -> list[str]:
    """One sentence an arm, no stronger than its seeds allow."""
    lines: dict[str, str] = {}
    for row in claims(race).to_dict("records"):
        difference = row["difference"]
        if row["quantity"] == LOSS.name:
            measured = f"{figure(difference, 4, (row['high'] - row['low']) / 2, sign=True)} nats/token"
        else:
            measured = f"{row['bound']} {figure(difference, 3)}x".lstrip()
        said = f"{row['quantity']}: {row['verdict']}" + ("" if pd.isna(difference) else f" ({measured})")
        lines[row["recipe"]] = f"{lines[row['recipe']]}; {said}" if row["recipe"] in lines else said
    lost = {recipe: lost_runs(race, recipe) for recipe in lines}
    ends = {recipe: f"; {words}, left out of these figures" if words else "" for recipe, words in lost.items()}
    said_of_all = [f"{recipe}: {line}{ends[recipe]}." for recipe, line in lines.items()]
    return said_of_all or [f"Only {race.baseline} ran: there is nothing to compare"]


def _headline(race: Race) -> str:
    runs, absent = len(race.runs), len(never_started(race))
    part = f"{runs} of " if absent else ""
    recipes, seeds = counted(len(race.recipes), "recipe"), counted(race.runs["seed"].nunique(), "seed")
    counts = f"{recipes}, {part}{counted(runs + absent, 'run')}, {seeds}"
    device = distinct(race.runs, "device/name")
    stepped = f", counted as {plain(race.spec['spec']['step_seconds'])} s a step" if race.stepped else ""
    return f"{counts}, {_budget(race)} train seconds a run{stepped}, on {device}. Baseline: {race.baseline}."


def _budget(race: Race) -> str:
    seconds = race.spec.get("budget_seconds")
    return plain(seconds) if seconds is not None else distinct(race.runs, "budget_seconds")


def _milestones(race: Race) -> str:
    return plain(race.spec.get("spec", {}).get("milestones", [])) or NONE


def _what_ran(race: Race) -> str:
    runs = race.runs
    rows = [["recipes", ", ".join(race.recipes)], ["baseline", race.baseline]]
    rows += [["budget (train seconds)", _budget(race)], ["milestones (parts of the budget)", _milestones(race)]]
    rows += [["seeds", distinct(runs, "seed")], ["data seeds", distinct(runs, "data_seed")]]
    rows += [["command", f"`{race.spec['command']}`" if "command" in race.spec else NONE]]
    for group in ("model", "data", "device", "execution"):
        names = [str(name) for name in runs.columns if str(name) == group or str(name).startswith(f"{group}/")]
        rows += [[_label(name), by_recipe(runs, name)] for name in names]
    rows += [["trained parameters, all parts", by_recipe(runs, "parameters")]]
    sources = [
        str(name).removeprefix(f"{VAL_LOSS}/") for name in race.milestones if str(name).startswith(VAL_LOSS + "/")
    ]
    rows += [["validation sources", ", ".join(sources) or NONE]]
    rows += [["labelled tokens of a validation", distinct(race.milestones, VAL_TOKENS)]]
    rows += [["tokens per step", _step_tokens(runs)], ["hosts", distinct(runs, "process/host")]]
    rows += [
        ["rows of a micro-batch, at the end", by_recipe(runs, "micro_rows")],
        ["calibrated on", _calibrated_on(race)],
    ]
    versions = {str(name): distinct(runs, name) for name in runs.columns if str(name).startswith("versions/")}
    known = (f"{name.removeprefix('versions/')} {text}" for name, text in versions.items() if text != NONE)
    rows += [["versions", ", ".join(known)]]
    return table(["", ""], [row for row in rows if row[1] not in ("", NONE)])


def _calibrated_on(race: Race) -> str:
    """The device that micro-batches were calibrated on."""
    calibration = race.spec.get("spec", {}).get("calibration")
    return str(calibration["device"]["name"]) if calibration else NONE


def _label(column: str) -> str:
    return column.replace("/", ", ").replace("_mib", " (MiB)").replace("_", " ")


def _step_tokens(runs: pd.DataFrame) -> str:
    if not {"row_tokens", "global_rows"} <= set(runs.columns):
        return NONE
    shapes = runs[["recipe", "row_tokens", "global_rows"]].dropna()
    texts = [
        f"{int(rows * width):,} ({int(rows)} rows of {int(width)})" for _, width, rows in shapes.itertuples(index=False)
    ]
    return by_recipe(shapes.assign(text=texts), "text")


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)
