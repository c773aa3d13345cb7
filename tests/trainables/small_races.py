"""Small races through the real command line, for the tests of Ray's side: each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from commands import shell

RACE = """
recipes = ["baseline", "cggr_loss"]
budget_seconds = {budget}
global_rows = 2
micro_rows = 2
milestones = [0.125, 0.25, 0.5]
device = "cpu"
{more}

[data]
row_tokens = 64
val_documents = 5

[[data.sources]]
kind = "problems"
count = 300

[values]
"optimizer.schedule.warmup_tokens" = 1000
"""


def write_race(folder: Path, budget: float, more: str = "") -> Path:
    path = folder / "small.toml"
    path.write_text(RACE.format(budget=budget, more=more))
    return path


def cggr_ray(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "cggr_ray.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=shell(),
        timeout=480,
        check=False,
    )
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def losses(folder: Path) -> dict[str, list[float]]:
    found = {}
    for run in sorted((folder / "runs").iterdir()):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[run.name] = [r.get("train/loss", r.get("train/loss_kept_positions")) for r in rows if r["kind"] == "step"]
    return found
