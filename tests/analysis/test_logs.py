"""Logs and CSV: strict JSON that says what the run folders say, and tables equal to the frames."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import pytest

from analysis.frames import read_race
from analysis.logs import log_file, write_logs, write_tables
from analysis.output import write_report
from cggr_ray.schema import METRICS

Writer = Callable[..., Path]
RowMaker = Callable[..., dict[str, Any]]


def strictly(path: Path) -> dict[str, Any]:
    def refuse(word: str) -> NoReturn:
        raise AssertionError(f"{word} in {path.name}")

    value: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    return value


def test_a_log_holds_every_row_of_every_seed(pair_race: Path, tmp_path: Path) -> None:
    paths = write_logs(read_race(pair_race), tmp_path / "logs")
    assert [path.name for path in paths] == ["training_log_baseline.json", "training_log_quick.json"]
    log = strictly(paths[1])
    assert (log["recipe"], log["baseline"], log["race"]) == (
        "quick",
        "baseline",
        json.loads((pair_race / "race.json").read_text()),
    )
    assert [entry["run"]["trial_id"] for entry in log["runs"]] == ["quick-0", "quick-1"]
    for entry in log["runs"]:
        folder = pair_race / "runs" / entry["run"]["trial_id"]
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for kind, name in (("step", "steps"), ("milestone", "milestones")):
            rows = [
                {key: value for key, value in row.items() if key != "kind"} for row in logged if row["kind"] == kind
            ]
            assert entry[name] == rows
        summary = json.loads((folder / "summary.json").read_text())
        for key in ("status", "steps", "train_seconds", "order", "tokens_seen"):
            assert entry["run"][key] == summary[key]
        assert entry["run"]["ledger/train"] == summary["ledgers"]["train"]
        assert entry["run"]["device/name"] == "Test GPU"


def test_a_log_names_every_unit(pair_race: Path, tmp_path: Path) -> None:
    log = strictly(write_logs(read_race(pair_race), tmp_path)[0])
    assert {name: entry["unit"] for name, entry in log["metrics"].items()} == {m.name: m.unit for m in METRICS}
    entry = log["runs"][0]
    used = {key for name in ("steps", "milestones") for row in entry[name] for key in row}
    assert used <= set(log["metrics"])


def test_what_is_not_a_number_is_null(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker, logged_step: RowMaker
) -> None:
    rows = [
        milestone_row(1, 1, 100, 3.0),
        milestone_row(2, 2, 200, float("inf")),
        milestone_row(3, 3, 300, float("nan")),
    ]
    rows += [logged_step(1, **{"updates/relevance": [1.0, float("nan")], "data/order_rows": 8}), logged_step(2)]
    run_writer(tmp_path, "e3/full", 0, rows, {"val/loss": float("nan"), "status": "diverged"})
    (path,) = write_logs(read_race(tmp_path), tmp_path)
    assert path.name == "training_log_e3-full.json" == log_file("e3/full")
    (entry,) = strictly(path)["runs"]
    assert [row["val/loss"] for row in entry["milestones"]] == [3, None, None]
    assert [row["updates/relevance"] for row in entry["steps"]] == [[1, None], None]
    # Whole numbers stay whole beside a gap.
    assert [row["data/order_rows"] for row in entry["steps"]] == [8, None]
    assert isinstance(entry["steps"][0]["data/order_rows"], int)
    assert entry["run"]["status"] == "diverged"


def test_runs_stand_in_the_order_of_their_seeds(tmp_path: Path, run_writer: Writer, milestone_row: RowMaker) -> None:
    for seed in (10, 2):
        run_writer(tmp_path, "baseline", seed, [milestone_row(1, 1, 1, 3.0)], {})
    (path,) = write_logs(read_race(tmp_path), tmp_path)
    assert [entry["run"]["seed"] for entry in strictly(path)["runs"]] == [2, 10]


def test_recipes_that_would_share_a_log_are_refused(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    for recipe in ("e3/full", "e3-full"):
        run_writer(tmp_path, recipe, 0, [milestone_row(1, 1, 1, 3.0)], {})
    with pytest.raises(ValueError, match="e3-full"):
        write_logs(read_race(tmp_path), tmp_path)


def test_csv_holds_the_frames(resting_race: Path, tmp_path: Path) -> None:
    race = read_race(resting_race)
    paths = write_tables(race, tmp_path)
    assert {path.name for path in paths} == {
        f"{name}.{kind}" for name in ("runs", "steps", "milestones") for kind in ("csv", "parquet")
    }
    steps = pd.read_csv(tmp_path / "steps.csv")
    assert list(steps.columns) == list(race.steps.columns) and len(steps) == len(race.steps)
    for name in ("train_seconds", "updates/active_layers"):
        assert steps[name].tolist() == race.steps[name].tolist()
    texts = steps.loc[steps["trial_id"] == "suffix-0", "updates/relevance"].dropna()
    assert [json.loads(text) for text in texts] == [[1, 1, 1, 1], [0, 1, 2, 5]]


def test_runs_that_cannot_be_compared_leave_no_half_of_a_report(pair_race: Path) -> None:
    for file in (pair_race / "runs" / "quick-1").glob("*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"seed": 0}))
    with pytest.raises(ValueError, match=r"'quick-0', 'quick-1'\]; accepted: one run a recipe and seed"):
        write_report(pair_race)
    assert not (pair_race / "report").exists()


def test_everything_comes_from_the_run_folders_and_twice_the_same(pair_race: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    path = write_report(pair_race, first)
    write_report(pair_race, second)
    assert path == first / "benchmark_results.md"
    names = {file.name for file in first.iterdir() if file.suffix != ".png"}
    assert len(names) == 10 and {"report.html", "training_log_quick.json", "steps.csv", "runs.parquet"} <= names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
