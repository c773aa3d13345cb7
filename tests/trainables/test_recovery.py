"""A worker that dies: another is started, which goes on from the run's own checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest
from commands import MARK, PATIENCE, processes, shell, started, until_saved
from small_races import write_race

from trainables.history import read_events

pytestmark = [pytest.mark.slow, pytest.mark.ray]


SOMEBODY_ELSE = (
    "import ray; ray.init(address='local', include_dashboard=False, num_cpus=1); print('up', flush=True); input()"
)


@pytest.fixture
def somebody_else() -> Iterator[None]:
    """Another Ray on this machine."""
    command = [sys.executable, "-c", SOMEBODY_ELSE]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True, env=shell()) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        yield
        process.communicate("\n")


@pytest.mark.parametrize("process", ["ray::RayTrainWorker", "ray::ImplicitFunc"])
def test_a_trial_one_of_whose_processes_is_killed_goes_on_from_its_checkpoint(
    process: str, tmp_path: Path, somebody_else: None
) -> None:
    """The one that trains, or the one that Tune knows, with whose end the first loses its resources too; also beside
    somebody else's Ray."""
    spec = write_race(tmp_path, budget=8, more="checkpoint_every_seconds = 1.0")
    environment = shell(**{MARK: str(tmp_path)})
    race = started("race", spec, "--out", tmp_path / "race", "--recipes", "baseline", environment=environment)
    run = tmp_path / "race" / "runs" / "baseline-s0"
    until_saved(race, run)
    (pid,) = (pid for pid, command in processes(str(tmp_path)).items() if command.startswith(process))
    os.kill(pid, signal.SIGKILL)
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
