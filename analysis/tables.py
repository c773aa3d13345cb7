"""The tables of a report as Markdown (or plain text): figures with their spread, a dash where there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from tabulate import tabulate

from analysis.frames import Race
from analysis.judging import LOSS, claims
from analysis.layers import MODES, layer_measures
from analysis.measures import FAR, comparison, epochs, ledger_check, order_check, stability
from cggr_ray.schema import BUDGET_LEDGERS, LEARNING_RATE, LEDGERS, TRAIN_SECONDS, VAL_LOSS, VAL_NATS_PER_BYTE

MARKDOWN = "github"
NONE = "–"
# Characters of a header's line in a terminal.
HEADER_WIDTH = 12
# Behind a difference that is no claim: chance alone could have made it.
UNSUPPORTED = " †"


def figure(value: float, digits: int, half_width: float = math.nan, sign: bool = False) -> str:
    """A number, with `± half width` where there is one; what rounds to zero is no -0."""
    if pd.isna(value):
        return NONE
    text = f"{value:{'+' if sign else ''}z,.{digits}f}"
    return text if pd.isna(half_width) else f"{text} ± {half_width:,.{digits}f}"


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], style: str = MARKDOWN) -> str:
    """Rows under headers; everything is text already, so nothing is reformatted. Markdown's | is escaped; elsewhere,
    in a terminal, long headers are broken."""
    bar = r"\|" if style == MARKDOWN else "|"
    head, *body = ([str(cell).replace("|", bar) for cell in row] for row in (headers, *rows))
    widest = None if style == MARKDOWN else HEADER_WIDTH
    return tabulate(body, head, tablefmt=style, disable_numparse=True, maxheadercolwidths=widest)


def comparison_table(race: Race, style: str = MARKDOWN) -> str:
    """One row a recipe with the measures of `analysis.measures.comparison`, units in the head; † marks no claim."""
    headers = (
        *("recipe", "finished", "final val loss (nats/token)", "difference to baseline", "val loss at equal tokens"),
        *(
            "time to baseline's final loss (s)",
            "tokens seen (M)",
            "epochs",
            "tokens/s",
            "steps",
            "peak memory (MiB)",
        ),
    )
    judged = claims(race)
    shown = set(judged.loc[(judged["quantity"] == LOSS.name) & judged["supported"], "recipe"]) if len(judged) else set()
    rows = comparison(race).to_dict("records")
    return table(headers, [_comparison_cells(race, row, row["recipe"] in shown) for row in rows], style)


def _comparison_cells(race: Race, row: dict[Any, Any], is_claim: bool) -> list[str]:
    def cell(name: str, digits: int, scale: float = 1.0, sign: bool = False) -> str:
        return figure(row[name] * scale, digits, row[f"{name}_half_width"] * scale, sign)

    difference = NONE
    if row["recipe"] != race.baseline and not math.isnan(row["loss_difference"]):
        difference = cell("loss_difference", 4, sign=True) + ("" if is_claim else UNSUPPORTED)
    seconds = cell("seconds_to_baseline_loss", 1)
    if row["reached"] < row["pairs"]:
        seconds = f"reached by {row['reached']} of {row['pairs']}"
    memory = cell("peak_memory_mib", 0)
    if 0 < row["measured"] < row["seeds"]:
        memory += f" ({row['measured']} of {row['seeds']} runs)"
    return [
        str(row["recipe"]),
        f"{row['seeds']} of {row['runs']}",
        cell("final_loss", 4),
        difference,
        cell("loss_at_equal_tokens", 4),
        seconds,
        cell("tokens_seen", 3, scale=1e-6),
        _epochs_cell(epochs(race).get(str(row["recipe"]), {})),
        cell("tokens_per_second", 0),
        cell("steps", 0),
        memory,
    ]


def _epochs_cell(passes: Mapping[str, float]) -> str:
    if len(passes) == 1:
        return figure(next(iter(passes.values())), 1)
    return ", ".join(f"{source} {figure(passed, 1)}" for source, passed in passes.items()) or NONE


def validation_table(race: Race) -> str:
    """One row a run: how it ended, its final and its best validation, and the final loss on every source."""
    prefix = f"{VAL_LOSS}/"
    sources = [str(name) for name in race.milestones.columns if str(name).startswith(prefix)]
    headers = [
        *("trial", "recipe", "seed", "status", "resumed", "final val loss", "best val loss", "best at (s)"),
        *("final nats/byte", *(f"final, {name.removeprefix(prefix)}" for name in sources)),
    ]
    rows = []
    for run in race.runs.to_dict("records"):
        own = race.milestones[race.milestones["trial_id"] == run["trial_id"]].sort_values(TRAIN_SECONDS)
        known = own.dropna(subset=[VAL_LOSS]) if VAL_LOSS in own.columns else own.iloc[:0]
        best = known.loc[known[VAL_LOSS].idxmin()] if len(known) else {}
        last = own.iloc[-1] if len(own) else {}
        cells = [str(run[name]) for name in ("trial_id", "recipe", "seed", "status", "resumes")]
        cells += [figure(last.get(VAL_LOSS, math.nan), 4), figure(best.get(VAL_LOSS, math.nan), 4)]
        cells += [figure(best.get(TRAIN_SECONDS, math.nan), 1), figure(last.get(VAL_NATS_PER_BYTE, math.nan), 4)]
        rows.append(cells + [figure(last.get(name, math.nan), 4) for name in sources])
    return table(headers, rows)


def ledger_table(race: Race) -> str:
    """One row a run: the eight ledgers in seconds, their sum against the wall clock, and the overrun of the budget."""
    headers = ["trial", *(f"{name}{' *' if name in BUDGET_LEDGERS else ''}" for name in LEDGERS)]
    headers += ["sum", "wall clock", "sum − wall (%)", "overrun", "last step", "overrun (steps)"]
    runs = race.runs.set_index("trial_id")
    rows = []
    for check in ledger_check(race).to_dict("records"):
        spent = runs.loc[check["trial_id"]]
        seconds = [figure(spent[f"ledger/{name}"], 1) for name in LEDGERS]
        closure = [figure(check[name], 1) for name in ("ledger_seconds", "wall_seconds")]
        overrun = [figure(check[name], 3) for name in ("overrun_seconds", "last_step_seconds")]
        difference = figure(check["difference_percent"], 3, sign=True)
        steps = figure(check["overrun_steps"], 2)
        rows.append([str(check["trial_id"]), *seconds, *closure, difference, *overrun, steps])
    return table(headers, rows)


def stability_table(race: Race) -> str:
    """One row a run: its gradient norms, and the steps that had no finite gradient."""
    headers = ("trial", "status", "gradient norm, median", "largest", "over the median", f"beyond {FAR:g} medians (%)")
    rows = []
    for run in stability(race).to_dict("records"):
        usual, largest = run["median"], run["largest"]
        sizes = [NONE] * 3 if pd.isna(usual) else [f"{usual:.3g}", f"{largest:.3g}", f"{largest / usual:.3g}x"]
        counts = figure(100 * run["far"], 1), figure(run["skipped_steps"], 0)
        rows.append([run["trial_id"], run["status"], *sizes, *counts])
    return table([*headers, "skipped steps"], rows)


def layers_table(race: Race) -> str:
    """One row a run of `layer_rows`: how many layers learnt on average, probes, switches, seconds of each mode."""
    headers = ("trial", "recipe", "seed", "layers that learn (mean)", "probes", "switches", "steps a row")
    seconds = ("full at the start (s)", "probes (s)", "resting (s)", "full between (s)", "full at the end (s)")
    rows = []
    for run in layer_measures(race).to_dict("records"):
        cells = [str(run[name]) for name in ("trial_id", "recipe", "seed")]
        cells += [f"{figure(run['mean_active'], 2)} of {run['layers']}", str(run["probes"]), str(run["switches"])]
        cells += [figure(run["steps_per_row"], 1), *(figure(run[f"seconds/{mode}"], 1) for mode in MODES)]
        rows.append(cells)
    return table([*headers, *seconds], rows)


def order_table(race: Race) -> str:
    """One row a run: whether its data order equals that of the other runs of its data seed."""
    words = {True: "yes", False: "NO"}
    rows = []
    for check in order_check(race).to_dict("records"):
        agree = NONE if pd.isna(check["agree"]) else words[bool(check["agree"])]
        cells = [str(check[name]) for name in ("trial_id", "seed", "data_seed", "marks_compared")]
        rows.append([*cells, agree, ", ".join(check["disagrees_with"]) or NONE])
    return table(["trial", "seed", "data seed", "marks compared", "same order", "differs from"], rows)


def settings_table(race: Race) -> str:
    """One row a recipe: the highest learning rate its runs logged, and the hyperparameters set for this race."""
    overrides = [str(name) for name in race.runs.columns if str(name).startswith("values/")]
    rows = []
    for recipe in race.recipes:
        runs = race.runs[race.runs["recipe"] == recipe]
        steps = race.steps[race.steps["recipe"] == recipe]
        rates = steps.groupby("trial_id")[LEARNING_RATE].max() if LEARNING_RATE in steps.columns else pd.Series()
        peaks = ", ".join(dict.fromkeys(f"{rate:.4g}" for rate in rates.dropna()))
        own = {name.removeprefix("values/"): distinct(runs, name) for name in overrides}
        changed = "; ".join(f"{name} = {value}" for name, value in own.items() if value != NONE)
        rows.append([recipe, peaks or NONE, changed or "none"])
    return table(["recipe", "highest learning rate (hidden matrices)", "values set for this race"], rows)


def distinct(runs: pd.DataFrame, column: str) -> str:
    """The different values of a column, as text; a dash if the column is absent or empty."""
    return ", ".join(_texts(runs, column)) or NONE


def by_recipe(runs: pd.DataFrame, column: str) -> str:
    """As `distinct`; where every recipe has one value and not all have the same, whose it is."""
    own = {str(recipe): _texts(rows, column) for recipe, rows in runs.groupby("recipe", sort=False)}
    if all(len(texts) == 1 for texts in own.values()) and len({texts[0] for texts in own.values()}) > 1:
        return "; ".join(f"{recipe}: {text}" for recipe, (text,) in own.items())
    return distinct(runs, column)


def _texts(runs: pd.DataFrame, column: str) -> list[str]:
    if column not in runs.columns:
        return []
    values = [value for value in runs[column] if isinstance(value, list | dict) or not pd.isna(value)]
    return list(dict.fromkeys(plain(value) for value in values))


def plain(value: object) -> str:
    """A value of a JSON file as a reader would write it: whole numbers without a decimal point."""
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{int(value):,}" if value.is_integer() else f"{value:,g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
