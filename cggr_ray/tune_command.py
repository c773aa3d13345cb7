"""cggr-ray tune: runs the tuning of a race, says what was best and writes the tuned race."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cggr_ray.commands import check, claim, go_on, new_folder, read_spec, refuse_changes, run_left, specify
from cggr_ray.environment import fingerprint
from cggr_ray.planning import show_plan
from cggr_ray.race import RaceSpec, Trial
from cggr_ray.schema import TUNED_FILE, TUNING_FILE, TUNING_ROWS_FILE, VAL_LOSS
from cggr_ray.tuning import best_rows, notes, plan_tuning, tuning_of, tuning_rows, write_tuned


def tune(
    name: str | None,
    out: Path | None,
    changes: Mapping[str, Any],
    executor: str,
    address: str | None,
    resume: Path | None,
    dry_run: bool,
) -> None:
    """Plans the tuning of a race, or takes one up again, runs what is left of it and writes the tuned race."""
    if resume is not None:
        refuse_changes(name or out or changes)
        spec, folder = read_spec(resume, TUNING_FILE), resume
    else:
        spec = specify(name, changes, {})
        folder = out or new_folder(f"{spec.name}-tuning")
    check(spec, executor, address, folder)
    trials = plan_tuning(spec, folder)
    if dry_run:
        show_plan(trials[0].race, trials)
        for number, values in enumerate(tuning_of(spec).values, 1):
            Console().print(f"  values {number}: {json.dumps(values)}", highlight=False, soft_wrap=True)
        return
    record = {
        "name": spec.name,
        "spec": spec.to_plain(),
        "parts": {name: spec.recipe(name).to_plain() for name in spec.recipes},
        "versions": fingerprint(),
        "trials": [trial.trial_id for trial in trials],
    }
    claim(folder, TUNING_FILE, record)
    console = Console()
    failed = run_left(trials, folder, executor, address, None, console)
    finish_tuning(spec, trials, folder, failed, console)


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
        table.add_row(row["recipe"], json.dumps(row["values"]), row["status"], loss, mark)
    console.print(table)
    for line in notes(tuning_of(spec), best):
        console.print(line, highlight=False, soft_wrap=True)
    if lost := [name for name in spec.recipes if name not in best]:
        console.print(f"no trial with a finite loss: {', '.join(lost)}; no {TUNED_FILE} is written", soft_wrap=True)
    else:
        write_tuned(spec, rows, folder / TUNED_FILE)
        console.print(f"tuned race: {(folder / TUNED_FILE).resolve()}", soft_wrap=True)
    if failed:
        console.print(f"did not finish: {', '.join(failed)}; {go_on('tune', folder)}", soft_wrap=True)
    if lost or failed:
        sys.exit(1)
