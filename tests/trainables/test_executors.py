"""Races and sweeps through real Ray, on the CPU, small. Each test is a process: Ray wants one to itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
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
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "cggr_ray.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
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


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A race by the default executor: Ray Train workers under Tune, on a clock of fixed steps."""
    folder = tmp_path_factory.mktemp("raced")
    spec = write_race(folder, budget=10, more="step_seconds = 0.5")
    done = cggr_ray("race", spec, "--out", folder / "race")
    assert "report:" in done.stdout and "baseline" in done.stdout
    return folder


def test_a_race_leaves_runs_a_table_and_a_report(raced: Path) -> None:
    assert len(losses(raced / "race")["baseline-s0"]) == 20
    report = (raced / "race" / "report" / "benchmark_results.md").read_text()
    assert "cggr_loss" in report and list((raced / "race" / "report").glob("*.png"))


def test_both_executors_agree_and_a_race_goes_on_where_it_stopped(raced: Path) -> None:
    cggr_ray("race", raced / "small.toml", "--out", raced / "parts", "--executor", "inprocess", "--trials", 1)
    assert len(list((raced / "parts" / "runs").glob("*/summary.json"))) == 1
    cggr_ray("race", "--resume", raced / "parts", "--executor", "inprocess")
    assert losses(raced / "parts") == losses(raced / "race")
    for run in ("baseline-s0", "cggr_loss-s0"):
        files = [sorted(p.name for p in (raced / way / "runs" / run).iterdir()) for way in ("race", "parts")]
        assert files[0] == files[1]


def test_another_races_folder_is_refused_and_left_alone(raced: Path) -> None:
    before = (raced / "race" / "race.json").read_bytes()
    done = cggr_ray("race", raced / "small.toml", "--budget", 7, "--out", raced / "race", expect=2)
    assert done.stderr.startswith("error: ") and "holds another race" in done.stderr
    assert (raced / "race" / "race.json").read_bytes() == before


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
    deadline = time.time() + 100
    while not list(run.glob("checkpoints/step_*")):
        assert time.time() < deadline and race.poll() is None
        time.sleep(0.2)
    worker = subprocess.run(["pgrep", "-f", "ray::RayTrainWorker"], capture_output=True, text=True, check=True)
    os.kill(int(worker.stdout.split()[0]), signal.SIGKILL)
    output, _ = race.communicate(timeout=150)
    assert race.returncode == 0, output[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    resumed = [row["step"] for row in rows if row["kind"] == "resumed"]
    assert len(resumed) == 1 and 0 < resumed[0] < summary["steps"]
    assert summary["status"] == "finished" and 8 <= summary["train_seconds"] <= 8 + 2 * summary["last_step_seconds"]
    assert sum(summary["ledgers"].values()) == pytest.approx(summary["wall_seconds"], rel=0.005)


def test_a_sweep_stops_the_worse_half_and_writes_its_rows(tmp_path: Path) -> None:
    spec = write_race(tmp_path, budget=3)
    done = cggr_ray("sweep", "baseline", "--race", spec, "--out", tmp_path / "sweep", "--trials", 4)
    rows = [json.loads(line) for line in (tmp_path / "sweep" / "sweep.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and {row["status"] for row in rows} <= {"finished", "stopped"}
    assert any(row["status"] == "finished" for row in rows)
    assert all(row["train_seconds"] <= 3.5 and row["val/loss"] > 0 for row in rows)
    assert len({row["values"]["optimizer.matrix.lr"] for row in rows}) == 4
    assert "best trials" in done.stdout
