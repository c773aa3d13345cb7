"""cggr-ray tune: runs the tuning of a race, says what was best and writes the tuned race."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cggr_ray.arguments import tables
from cggr_ray.calibrated import check_calibration
from cggr_ray.commands import (
    check,
    check_plan,
    check_recipes,
    claim,
    go_on,
    new_folder,
    read_spec,
    refuse_changes,
    resumed,
    run_left,
    specify,
)
from cggr_ray.device import pick_device
from cggr_ray.environment import fingerprint
from cggr_ray.files import write_whole
from cggr_ray.mirror import mirror_of
from cggr_ray.paths import arm_name
from cggr_ray.planning import show_plan
from cggr_ray.race import RaceSpec, Trial
from cggr_ray.schema import TUNED_FILE, TUNING_FILE, TUNING_ROWS_FILE, VAL_LOSS
from cggr_ray.telemetry.console import terminal
from cggr_ray.tuning import best_rows, notes, plan_tuning, tuning_of, tuning_rows, write_tuned


def tune(
    name: str | None,
    out: Path | None,
    changes: Mapping[str, Any],
    executor: str,
    address: str | None,
    resume: Path | str | None,
    also: Sequence[str],
    dry_run: bool,
) -> None:
    """Plans the tuning of a race, or takes one up again, `also` with more entries in its values; runs what is left
    and writes the tuned race."""
    if resume is not None:
        refuse_changes(name or changes)
        folder = resumed(resume, TUNING_FILE, out)
        spec = with_more(read_spec(folder, TUNING_FILE), tables("--also", also))
    elif also:
        raise ValueError("--also without --resume; accepted: every entry in the race's tuning.values")
    else:
        spec = specify(name, changes, {})
        folder = out or new_folder(f"{spec.name}-tuning")
    if dry_run:
        check_plan(spec, executor)
    else:
        check(spec, executor, address, folder)
        if resume is None:
            check_calibration(spec, pick_device(spec.device) if address is None else None)
    trials, console = plan_tuning(spec, folder), terminal()
    if dry_run:
        show_plan(trials[0].race, trials)
        for number, values in enumerate(tuning_of(spec).values, 1):
            console.print(f"  values {number}: {json.dumps(values)}", highlight=False, soft_wrap=True)
        return
    mirror = mirror_of(spec, folder)
    mirror.check()
    parts = {name: spec.recipe(name).to_plain() for name in spec.recipes}
    record = {
        "name": spec.name,
        "spec": spec.to_plain(),
        "parts": parts,
        "versions": fingerprint(),
        "trials": [trial.trial_id for trial in trials],
    }
    if also:
        check_recipes(folder, parts, TUNING_FILE)
        write_whole(folder / TUNING_FILE, json.dumps(record, indent=1))
    else:
        claim(folder, TUNING_FILE, record)
    with mirror:
        failed = run_left(trials, folder, executor, address, None, console, mirror)
        finish_tuning(spec, trials, folder, failed, console)


def with_more(spec: RaceSpec, entries: Sequence[dict[str, Any]]) -> RaceSpec:
    """The race with more entries in its tuning's values.

    Raises:
        ValueError: it has no tuning, or one that does not take an entry.
    """
    tuning = tuning_of(spec)
    return replace(spec, tuning=replace(tuning, values=(*tuning.values, *entries)))


def finish_tuning(
    spec: RaceSpec, trials: Sequence[Trial], folder: Path, failed: Sequence[str], console: Console
) -> None:
    """Prints the trials, writes their rows and the tuned race; exit code 1 where a recipe has no finite loss, and then
    no race is written, or where a trial did not end."""
    rows = tuning_rows(spec, trials)
    (folder / TUNING_ROWS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    best = best_rows(rows)
    table = Table("recipe", "values", "status", "val/loss", "", title="tuning")
    for row in rows:
        loss = "" if row[VAL_LOSS] is None else f"{row[VAL_LOSS]:.4f}"
        mark = "best" if row is best.get(row["recipe"]) else ""
        table.add_row(arm_name(row["recipe"], spec.recipes), json.dumps(row["values"]), row["status"], loss, mark)
    console.print(table)
    for line in notes(tuning_of(spec), best):
        console.print(line, highlight=False, soft_wrap=True)
    if lost := [arm_name(name, spec.recipes) for name in spec.recipes if name not in best]:
        console.print(f"no trial with a finite loss: {', '.join(lost)}; no {TUNED_FILE} is written", soft_wrap=True)
    else:
        write_tuned(spec, rows, folder / TUNED_FILE)
        console.print(f"tuned race: {(folder / TUNED_FILE).resolve()}", soft_wrap=True)
    if failed:
        console.print(f"did not finish: {', '.join(failed)}; {go_on('tune', folder)}", soft_wrap=True)
    if lost or failed:
        sys.exit(1)
