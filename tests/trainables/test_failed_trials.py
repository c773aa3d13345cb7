"""A trial that fails for good: its folder says so, until it is begun again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_races import cggr_ray, write_race

from analysis import read_race

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def test_a_trial_that_fails_every_time_has_failed_and_goes_on_once_it_can(tmp_path: Path) -> None:
    race, run = tmp_path / "race", tmp_path / "race" / "runs" / "cggr_loss-s0"
    spec = write_race(tmp_path, budget=0.5)
    cggr_ray("race", spec, "--out", race, "--executor", "inprocess", "--trials", 1)
    # A run that cannot write its rows.
    (run / "metrics.jsonl").mkdir(parents=True)
    done = cggr_ray("race", "--resume", race, "--executor", "inprocess", expect=1)
    assert "did not finish: cggr_loss-s0" in done.stdout
    failure = json.loads((run / "failure.json").read_text())
    assert (failure["trial_id"], failure["recipe"], failure["seed"]) == ("cggr_loss-s0", "cggr_loss", 0)
    assert failure["message"].startswith("IsADirectoryError")
    assert dict(read_race(race).runs[["trial_id", "status"]].to_numpy()) == {
        "baseline-s0": "finished",
        "cggr_loss-s0": "failed",
    }
    (run / "metrics.jsonl").rmdir()
    cggr_ray("race", "--resume", race, "--executor", "inprocess")
    assert set(read_race(race).runs["status"]) == {"finished"} and not (run / "failure.json").exists()
