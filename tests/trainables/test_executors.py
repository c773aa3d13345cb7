"""Both executors through real Ray, on the CPU, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_races import cggr_ray, losses, write_race

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A race by the default executor: Ray Train workers under Tune, on a clock of fixed steps."""
    folder = tmp_path_factory.mktemp("raced")
    spec = write_race(folder, budget=10, more="step_seconds = 0.5")
    done = cggr_ray("race", spec, "--out", folder / "race")
    assert "report:" in done.stdout and "baseline" in done.stdout
    assert "session-" not in done.stdout, "Tune speaks of its own folder"
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


def test_a_race_of_an_older_version_goes_on(raced: Path) -> None:
    """Whose record lacks a setting that has a default now."""
    record = json.loads((raced / "race" / "race.json").read_text())
    older = record | {"spec": {key: value for key, value in record["spec"].items() if key != "order_by_seed"}}
    assert older != record
    (raced / "race" / "race.json").write_text(json.dumps(older))
    cggr_ray("race", "--resume", raced / "race", "--executor", "inprocess")
    (raced / "race" / "race.json").write_text(json.dumps(record))


def test_two_workers_train_as_one_does(raced: Path) -> None:
    arguments = ("--recipes", "baseline", "--workers", 2, "--out", raced / "pair")
    cggr_ray("race", raced / "small.toml", *arguments)
    found, expected = losses(raced / "pair")["baseline-s0"], losses(raced / "race")["baseline-s0"]
    assert found == pytest.approx(expected, rel=2e-4) and len(found) == 20
    summaries = [json.loads((raced / way / "runs/baseline-s0/summary.json").read_text()) for way in ("race", "pair")]
    assert summaries[0]["order"] == summaries[1]["order"] and summaries[0]["tokens_seen"] == summaries[1]["tokens_seen"]


def test_workers_need_an_executor_that_has_some(raced: Path) -> None:
    arguments = ("--executor", "inprocess", "--workers", 2, "--out", raced / "none")
    done = cggr_ray("race", raced / "small.toml", *arguments, expect=2)
    assert "executor 'inprocess' with workers = 2; accepted: executor train, or workers = 1" in done.stderr
    assert not (raced / "none").exists()


def test_another_races_folder_is_refused_and_left_alone(raced: Path) -> None:
    before = (raced / "race" / "race.json").read_bytes()
    done = cggr_ray("race", raced / "small.toml", "--budget", 7, "--out", raced / "race", expect=2)
    assert done.stderr.startswith("error: ") and "holds another race" in done.stderr
    assert (raced / "race" / "race.json").read_bytes() == before
