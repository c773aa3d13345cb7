"""A sweep with a mirror through real Ray: machines lose their disks, and it ends as one that never lost anything.

Its first trial's process is killed and its run folder removed; in its second, the process that started the sweep is
killed and the whole folder is removed. What is expected comes from the same trials run without Ray, mirror and kills.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE, shell, started
from small_races import cggr_ray, write_race

import trainables  # noqa: F401 - settles Ray's settings before Ray is imported
from cggr_ray.loop import run_race
from cggr_ray.race import Trial, load_race
from cggr_ray.sweep_command import read_sweep
from trainables.history import read_events
from trainables.sweep import sweep_race, sweep_trial

pytestmark = [pytest.mark.slow, pytest.mark.ray]
BUDGET = 6.0
# Of a summary, what the machine decides.
OF_THE_MACHINE = {"wall_seconds", "overrun_seconds", "ledgers"}


@dataclass(frozen=True)
class Flow:
    """What is there at the end, and the first trial's files in the mirror when the second was killed."""

    disk: Path
    folder: Path
    first: dict[str, bytes]
    output: str


def until_sent(process: subprocess.Popen[str], run: Path) -> None:
    """Waits for a checkpoint of a run in the mirror."""
    deadline = time.monotonic() + PATIENCE
    while not list(run.glob("checkpoints/step_*/manifest.json")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def pid_of(run: Path) -> int:
    """The process that trains."""
    found: int = json.loads((run / "run.json").read_text())["process"]["pid"]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    folder = tmp_path_factory.mktemp("mirrored")
    write_race(folder, budget=BUDGET, more="step_seconds = 0.05\ncheckpoint_every_seconds = 1.0")
    disk, sweep, again = folder / "disk", folder / "sweep", folder / "again"
    file = folder / "mine.toml"
    file.write_text('race = "small.toml"\nspace = "baseline"\n[search]\ntrials = 2\nseed = 1\nscheduler = "none"\n')
    process = started("sweep", file, "--out", sweep, "--mirror", f"file://{disk}", environment=shell())
    until_sent(process, disk / "runs" / "t0000")
    os.kill(pid_of(sweep / "runs" / "t0000"), signal.SIGKILL)
    shutil.rmtree(sweep / "runs" / "t0000")
    until_sent(process, disk / "runs" / "t0001")
    first, worker = contents(disk / "runs" / "t0000"), pid_of(sweep / "runs" / "t0001")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    shutil.rmtree(sweep)
    done = cggr_ray("sweep", "--resume", f"file://{disk}", "--out", again)
    return Flow(disk, again, first, done.stdout)


@pytest.fixture(scope="module")
def expected(flow: Flow, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of the same trials that nothing has happened to."""
    folder, spec = tmp_path_factory.mktemp("expected"), read_sweep(flow.folder)
    race = replace(sweep_race(spec), mirror=None)
    found = {}
    for event in read_events(flow.folder / "sweep.jsonl")[0]:
        if event["kind"] == "trial":
            trial: Trial = sweep_trial(spec, race, event["values"], event["trial_id"], folder)
            run_race(trial.placed(Path(trial.folder), flow.folder / "data"))
            found[trial.trial_id] = Path(trial.folder)
    return found


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


@pytest.mark.parametrize("trial_id", ["t0000", "t0001"])
def test_a_trial_that_lost_its_disk_ends_as_if_nothing_had_been(
    flow: Flow, expected: dict[str, Path], trial_id: str
) -> None:
    run = flow.folder / "runs" / trial_id
    summary, truth = (json.loads((folder / "summary.json").read_text()) for folder in (run, expected[trial_id]))
    assert {k: v for k, v in summary.items() if k not in OF_THE_MACHINE} == (
        {k: v for k, v in truth.items() if k not in OF_THE_MACHINE}
    )
    assert (run / "progress.f64").read_bytes() == (expected[trial_id] / "progress.f64").read_bytes()
    losses, true_losses = (
        [row["val/loss"] for row in rows(folder, "milestone")] for folder in (run, expected[trial_id])
    )
    # A milestone after the checkpoint was taken again.
    assert list(dict.fromkeys(losses)) == true_losses
    (resumed,) = rows(run, "resumed")
    assert 0 < resumed["step"] < summary["steps"]


def test_what_had_ended_was_not_run_again_and_all_of_it_is_in_the_mirror(flow: Flow) -> None:
    assert contents(flow.disk / "runs" / "t0000") == flow.first
    assert "2 finished" in flow.output and "best recipe" in flow.output
    events = read_events(flow.folder / "sweep.jsonl")[0]
    assert [event["trial_id"] for event in events if event["kind"] == "end"] == ["t0000", "t0001"]
    for name in ("sweep.json", "sweep.jsonl", "mirror.id", "best/race.toml", "runs/t0001/summary.json"):
        assert (flow.disk / name).read_bytes() == (flow.folder / name).read_bytes(), name
    assert load_race(str(flow.folder / "best" / "race.toml")).mirror is None
    assert not list(flow.disk.rglob("checkpoints")) and not list(flow.disk.rglob("*.partial"))
