"""A race whose folder alone was moved to another machine goes on there, and says so where it cannot."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_runs import rows_of
from typer.testing import CliRunner

from cggr_ray import cli
from cggr_ray.loop import run_race
from cggr_ray.race import Trial
from cggr_ray.reproduce import read_recorded
from cggr_ray.stopping import StoppedError

RACE = """
recipes = ["own.toml"]
budget_seconds = 6.0
step_seconds = 1.0
global_rows = 2
micro_rows = 2
milestones = [0.3]
device = "cpu"
[model]
preset = "tiny"
[data]
row_tokens = 64
val_documents = 4
[[data.sources]]
kind = "jsonl"
name = "mine"
path = "train.jsonl"
[[evaluation.tasks]]
kind = "aime"
path = "aime.jsonl"
questions = 2
samples = 2
pass_at = [1]
max_new_tokens = 2
seconds = 600.0
"""
STEPS = 4


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A race's file beside all that it names."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "race.toml").write_text(RACE)
    (folder / "own.toml").write_text('[objective]\nkind = "next_token"\n')
    rows = [{"question": f"What is {n} and {n}?", "answer": f"{2 * n}"} for n in range(200)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"problem": f"What is {n} times {n}?", "answer": f"{n * n}"} for n in range(3)]
    (folder / "aime.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object, steps: int | None = None) -> str:
    """The command, with its trials in this process; stopped after so many steps."""

    def here(trials: Sequence[Trial], *_: Any) -> list[str]:
        asked = itertools.count()
        for trial in trials:
            try:
                run_race(trial, stop=lambda: steps is not None and next(asked) > steps)
            except StoppedError:
                return [trial.trial_id]
        return []

    monkeypatch.setattr("trainables.driver.run_trials", here)
    monkeypatch.setattr("cggr_ray.commands.finish", lambda folder, failed, console: print("failed", failed))
    shown = CliRunner().invoke(cli.app, ["race", *map(str, arguments)])
    return shown.output + repr(shown.exception)


def summary(race: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((race / "runs" / "own-s0" / "summary.json").read_text())
    return found


def test_a_race_goes_on_elsewhere_without_the_files_it_was_made_from(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = (files / "own.toml").read_text()
    assert "failed []" in run(monkeypatch, files / "race.toml", "--out", tmp_path / "whole")
    run(monkeypatch, files / "race.toml", "--out", tmp_path / "parts", steps=STEPS)
    moved = tmp_path / "elsewhere" / "race"
    moved.parent.mkdir()
    (tmp_path / "parts").rename(moved)
    shutil.rmtree(files)
    elsewhere = {"name": "another", "type": "cpu", "threads": 1}
    monkeypatch.setattr("cggr_ray.description.device_info", lambda device: elsewhere)
    # A recipe of one's own, and a model's folder, are read where they were.
    files.mkdir()
    (files / "own.toml").write_text(recipe)
    assert "failed []" in run(monkeypatch, "--resume", moved)
    whole, parts = summary(tmp_path / "whole"), summary(moved)
    apart = {"wall_seconds", "ledgers"}
    assert {k: v for k, v in parts.items() if k not in apart} == {k: v for k, v in whole.items() if k not in apart}
    assert parts["eval/aime/n"] == 2 and parts["ledgers"]["train"] == whole["ledgers"]["train"] == 6.0
    assert [row["step"] for row in rows_of(moved / "runs/own-s0", "resumed")] == [STEPS]
    here, there = (json.loads((race / "runs/own-s0/run.json").read_text()) for race in (tmp_path / "whole", moved))
    assert there["earlier"] == [
        {"device": here["device"]["name"], "host": here["process"]["host"], "versions": here["versions"]}
    ]
    assert "earlier" not in here and read_recorded(tmp_path / "whole/runs/own-s0").is_exact
    assert not read_recorded(moved / "runs/own-s0").is_exact
    again = tmp_path / "third"
    moved.rename(again)
    shown = CliRunner().invoke(cli.app, ["evaluate", str(again), "--device", "cpu"])
    assert shown.exit_code == 0 and "aime/n 2" in shown.output, shown.output + repr(shown.exception)


def test_a_recipe_that_was_edited_in_the_middle_of_a_race_is_refused(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, files / "race.toml", "--out", tmp_path / "race", steps=1)
    before = (files / "own.toml").read_text()
    (files / "own.toml").write_text(before + "label_smoothing = 0.1\n")
    assert "own.toml' is another than" in run(monkeypatch, "--resume", tmp_path / "race")
    assert not (tmp_path / "race/runs/own-s0/summary.json").exists()
    (files / "own.toml").write_text(before)
    assert "failed []" in run(monkeypatch, "--resume", tmp_path / "race")
