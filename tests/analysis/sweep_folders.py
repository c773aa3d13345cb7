"""A writer of sweep folders, in the form that `cggr_ray.schema` describes, with a truth to be found again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from written_rows import lines, milestone, step_row

START = 1_800_000_000.0
RUNGS = (5.0, 10.0, 20.0)


def write_sweep(folder: Path, events: list[dict[str, Any]], **spec: Any) -> Path:
    folder.mkdir(parents=True)
    record = {"name": "sweep-mine", "space": "mine", "recipe": "quick", "search": {"scheduler": "asha"}}
    record |= {"spec": {"budget_seconds": 20.0}, "versions": {}, "command": "cggr-ray sweep mine"}
    (folder / "sweep.json").write_text(json.dumps(record | spec))
    (folder / "sweep.jsonl").write_text(lines(events))
    return folder


def drawn(number: int, at: float = START, **values: Any) -> dict[str, Any]:
    return {"kind": "trial", "trial_id": f"t{number:04d}", "values": values, "at": at}


def result(number: int, seconds: float, loss: float, at: float = START) -> dict[str, Any]:
    row = {"kind": "result", "trial_id": f"t{number:04d}", "train_seconds": seconds, "tokens_seen": int(100 * seconds)}
    return row | {"val/loss": loss, "at": at}


def ended(
    number: int, status: str, loss: float | None, seconds: float, at: float = START, **more: Any
) -> dict[str, Any]:
    row = {"kind": "end", "trial_id": f"t{number:04d}", "status": status, "val/loss": loss, "train_seconds": seconds}
    return row | {"tokens_seen": int(100 * seconds), "peak_memory_mib": 100.0, "message": "", "at": at} | more


def write_run_of(folder: Path, number: int, rows: list[dict[str, Any]], **described: Any) -> None:
    """The run folder of a trial that has no summary, as one that was stopped."""
    run = folder / "runs" / f"t{number:04d}"
    run.mkdir(parents=True)
    own = {"trial_id": run.name, "recipe": "quick", "seed": 0, "values": {}}
    (run / "run.json").write_text(json.dumps(own | described))
    (run / "metrics.jsonl").write_text(lines(rows))


def planted(folder: Path, trials: int = 40) -> Path:
    """A sweep whose loss depends on `lr`, best at 0.01, and `keep`; not on `strata`, and not on the part's score.

    The worse half stops at each rung; trial 7 runs out of memory, trial 11 fails, the last has not ended.
    """
    numbers, events, seen = random.Random(0), [{"kind": "session", "at": START}], {rung: [0.0][:0] for rung in RUNGS}
    for number in range(trials):
        lr, keep = 10 ** numbers.uniform(-3, -1), numbers.uniform(0.25, 0.75)
        tokens = {"kind": "selected_tokens", "score": numbers.choice(["loss", "margin"])}
        values = {"lr": lr, "tokens": tokens, "tokens.keep": keep, "strata": numbers.choice([2, 4])}
        at = START + 60 * number
        events.append(drawn(number, at, **values))
        if number in (7, 11):
            how = (
                ("out_of_memory", "CUDA out of memory. Tried 2 GiB") if number == 7 else ("failed", "ValueError: no |")
            )
            events.append(ended(number, how[0], None, 0.0, at + 9, message=f"{how[1]}\nmore"))
            continue
        quality = 2 + abs(10 * (lr / 0.01 if lr > 0.01 else 0.01 / lr) ** 0.5 - 10) / 10 + 0.5 * (0.75 - keep)
        for rung in RUNGS:
            loss = quality + 5 / rung
            events.append(result(number, rung, loss, at + rung))
            seen[rung].append(loss)
            if rung < RUNGS[-1] and loss > sorted(seen[rung])[len(seen[rung]) // 2]:
                break
        if number < trials - 1:
            status = "finished" if rung == RUNGS[-1] else "stopped"
            events.append(ended(number, status, loss, rung, at + rung + 1))
    write_sweep(folder, events)
    for number in range(2):
        rows = [step_row(step) for step in range(1, 6)] + [milestone(5, 5.0, 500, 4.0)]
        write_run_of(folder, number, rows)
    return folder
