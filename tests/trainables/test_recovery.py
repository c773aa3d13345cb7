"""A worker that dies: another is started, which goes on from the run's own checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import PATIENCE, shell, started
from small_races import write_race

from trainables.history import read_events

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def test_a_killed_worker_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    spec = write_race(tmp_path, budget=8, more="checkpoint_every_seconds = 1.0")
    arguments = [
        sys.executable,
        "-m",
        "cggr_ray.cli",
        "race",
        spec,
        "--out",
        tmp_path / "race",
        "--recipes",
        "baseline",
    ]
    race = subprocess.Popen([str(a) for a in arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = tmp_path / "race" / "runs" / "baseline-s0"
    deadline = time.time() + 250
    while not list(run.glob("checkpoints/step_*")):
        assert time.time() < deadline and race.poll() is None
        time.sleep(0.2)
    os.kill(json.loads((run / "run.json").read_text())["process"]["pid"], signal.SIGKILL)
    output, _ = race.communicate(timeout=150)
    assert race.returncode == 0, output[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    resumed = [row["step"] for row in rows if row["kind"] == "resumed"]
    assert len(resumed) == 1 and 0 < resumed[0] < summary["steps"]
    assert summary["status"] == "finished" and 8 <= summary["train_seconds"] <= 8 + 2 * summary["last_step_seconds"]
    assert sum(summary["ledgers"].values()) == pytest.approx(summary["wall_seconds"], rel=0.005)


def test_a_trial_that_ray_ends_for_want_of_memory_does_not_end_its_sweep(tmp_path: Path) -> None:
    """Any machine is low on memory here when Ray looks, which it does in the middle of some of a trial's lives."""
    spec = write_race(tmp_path, budget=1000, more="step_seconds = 0.05\ncheckpoint_every_seconds = 0.2")
    low = shell(RAY_memory_usage_threshold="0.001", RAY_memory_monitor_refresh_ms="9000")
    sweep = started(
        *("sweep", "baseline", "--race", spec, "--out", tmp_path / "sweep", "--trials", 2, "--scheduler", "none"),
        environment=low,
    )
    output, _ = sweep.communicate(timeout=PATIENCE)
    ends = [event for event in read_events(tmp_path / "sweep" / "sweep.jsonl")[0] if event["kind"] == "end"]
    assert [end["status"] for end in ends] == ["failed", "failed"], output[-3000:]
    assert all("running low on memory" in end["message"] for end in ends)
    assert sweep.returncode == 1 and "2 failed" in output
