"""The process that started a race under Ray gets SIGTERM, then SIGKILL: nothing is lost, left behind or told.

One race goes through all of it, as each start of Ray takes seconds; the tests look at what it left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from commands import MARK, PATIENCE, left_behind, saved_steps, shell, started, until_saved

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(4 * PATIENCE)]

RACE = """
recipes = ["baseline", "cggr_loss"]
budget_seconds = 10
step_seconds = 0.05
global_rows = 2
micro_rows = 2
milestones = [0.5]
device = "cpu"
checkpoint_every_seconds = 0.5
wandb = "offline"
tensorboard = true
data = { row_tokens = 64, val_documents = 5, sources = [{ kind = "problems", count = 300 }] }
"""
SECRETS = {
    name: f"{name.lower()}-is-told-to-nobody-{'7' * 20}"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY")
}


@dataclass
class Flow:
    """What was seen on the way."""

    folder: Path
    output: str
    stopped: int
    stopped_at: int
    left_behind: list[str]
    finished: int

    def rows(self, run: str) -> list[dict[str, Any]]:
        text = (self.folder / "race" / "runs" / run / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flow]:
    folder = tmp_path_factory.mktemp("flow")
    (folder / "small.toml").write_text(RACE)
    race, run = folder / "race", folder / "race" / "runs" / "baseline-s0"
    # Sockets have short names only.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as sessions:
        environment = shell(**SECRETS, **{"RAY_TMPDIR": sessions, MARK: str(folder)})

        def raced(*arguments: object) -> subprocess.Popen[str]:
            return started("race", *arguments, "--executor", "inprocess", environment=environment)

        first = raced(folder / "small.toml", "--out", race)
        until_saved(first, run)
        # To its whole process group, as `timeout` and a shell's `kill %1` send it.
        os.killpg(first.pid, signal.SIGTERM)
        output = first.communicate(timeout=PATIENCE)[0]
        saved, left = max(saved_steps(run)), left_behind(str(folder))
        second = raced("--resume", race)
        until_saved(second, run, saved)
        second.send_signal(signal.SIGKILL)
        second.wait()
        third = raced("--resume", race)
        output += third.communicate(timeout=PATIENCE)[0]
        for path in sorted(Path(sessions).rglob("*")):
            if path.is_file():
                told = folder / "sessions" / path.relative_to(sessions)
                told.parent.mkdir(parents=True, exist_ok=True)
                told.write_bytes(path.read_bytes())
    yield Flow(folder, output, first.returncode, saved, left, third.returncode)


def test_sigterm_saves_what_runs_and_ends_ray(flow: Flow) -> None:
    assert flow.stopped == 143, flow.output
    assert "stopped by SIGTERM; --resume" in flow.output
    # The checkpoint is of the very step at which it stopped: no later row was written.
    rows = flow.rows("baseline-s0")
    first = next(number for number, row in enumerate(rows) if row["kind"] == "resumed")
    assert rows[first]["step"] == flow.stopped_at
    assert max(row["step"] for row in rows[:first]) <= flow.stopped_at
    assert flow.left_behind == []


def test_a_killed_driver_is_taken_up_again_and_every_run_ends(flow: Flow) -> None:
    assert flow.finished == 0, flow.output
    for run, resumes in (("baseline-s0", 2), ("cggr_loss-s0", 0)):
        summary = json.loads((flow.folder / "race" / "runs" / run / "summary.json").read_text())
        assert summary["status"] == "finished" and summary["budget_seconds"] <= summary["train_seconds"]
        rows = flow.rows(run)
        assert [row["kind"] for row in rows].count("resumed") == resumes
        # One writer: steps rise, but where a run goes on.
        for before, after in pairwise(rows):
            assert after["step"] >= before["step"] or after["kind"] == "resumed"
    assert not (flow.folder / "race" / "stop").exists()


def test_secrets_are_told_to_nobody(flow: Flow) -> None:
    written = [path for path in flow.folder.rglob("*") if path.is_file()]
    assert {"run.json", "race.json", "metrics.jsonl"} <= {path.name for path in written}
    assert any(path.suffix == ".wandb" for path in written) and any("tfevents" in path.name for path in written)
    assert any("sessions" in path.parts for path in written)
    told = [
        (name, str(path))
        for path in written
        for name, secret in SECRETS.items()
        if secret.encode() in path.read_bytes()
    ]
    assert told == []
    assert not any(secret in flow.output for secret in SECRETS.values())
