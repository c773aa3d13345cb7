"""Run folders to frames: tidy columns, resumption, torn and broken lines, Parquet."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import write_report
from analysis.frames import read_race

Writer = Callable[..., Path]
RowMaker = Callable[..., dict[str, Any]]


def test_every_row_says_whose_it_is_and_ledgers_are_columns(pair_race: Path) -> None:
    race = read_race(pair_race)
    assert list(race.milestones.columns[:3]) == ["trial_id", "recipe", "seed"]
    assert len(race.milestones) == 12 and len(race.steps) == 8 and len(race.runs) == 4
    quick = race.milestones.query("recipe == 'quick' and seed == 1")
    assert list(quick["val/loss"]) == [4, 2.2, 1.9] and list(quick["tokens_seen"]) == [0, 500, 1000]
    assert race.runs["ledger/warm_up"].tolist() == [5.0] * 4
    assert set(race.runs["model/name"]) == {"tiny"} and race.spec["name"] == "pair"
    assert race.recipes == ["baseline", "quick"] and "kind" not in race.steps.columns


def test_baseline_leads_even_if_its_name_sorts_last(tmp_path: Path, run_writer: Writer) -> None:
    for recipe in ("alpha", "zero"):
        run_writer(tmp_path, recipe, 0, [], {})
    (tmp_path / "race.json").write_text(json.dumps({"baseline": "zero", "recipes": ["alpha", "zero", "absent"]}))
    assert read_race(tmp_path).recipes == ["zero", "alpha"]


def test_resumption_drops_the_rows_that_were_lost(
    tmp_path: Path, run_writer: Writer, logged_step: RowMaker, milestone_row: RowMaker
) -> None:
    before = [logged_step(1), logged_step(2), logged_step(3), milestone_row(3, 3, 300, 9.0)]
    after = [logged_step(3), milestone_row(3, 3.5, 300, 8.0), logged_step(4)]
    again = [{"kind": "resumed", "step": 3}, logged_step(4, **{"train/loss": 1.5})]
    run_writer(tmp_path, "baseline", 0, [*before, {"kind": "resumed", "step": 2}, *after, *again], {"tokens_seen": 400})
    race = read_race(tmp_path)
    assert race.steps["step"].tolist() == [1, 2, 3, 4]
    assert race.steps["train/loss"].tolist()[-1] == 1.5
    assert race.milestones["val/loss"].tolist() == [8.0]
    assert race.runs["resumes"].tolist() == [2]


def test_torn_last_line_is_left_out_with_a_warning(tmp_path: Path, run_writer: Writer, logged_step: RowMaker) -> None:
    folder = run_writer(tmp_path, "baseline", 0, [logged_step(1)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 2, "tra')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:2: torn last line"):
        race = read_race(tmp_path)
    assert race.steps["step"].tolist() == [1]
    assert race.runs["status"].tolist() == ["unfinished"] and math.isnan(race.runs["ledger/train"][0])


@pytest.mark.parametrize(
    "broken",
    ['{"kind": "step", "st\n', "[1, 2]\n", '{"kind": "note", "step": 2}\n', '{"kind": "step"}\n', '"step"\n'],
)
def test_a_broken_line_elsewhere_names_file_and_line(
    tmp_path: Path, run_writer: Writer, logged_step: RowMaker, broken: str
) -> None:
    folder = run_writer(tmp_path, "baseline", 0, [logged_step(1)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(broken + json.dumps(logged_step(3)) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: .*accepted") as error:
        read_race(tmp_path)
    assert "\n" not in str(error.value)


def test_a_broken_line_that_was_ended_is_not_a_torn_one(tmp_path: Path, run_writer: Writer) -> None:
    folder = run_writer(tmp_path, "baseline", 0, [])
    (folder / "metrics.jsonl").write_text('{"kind": "step", "st\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1"):
        read_race(tmp_path)


def test_one_run_folder_and_a_folder_above_are_accepted(pair_race: Path) -> None:
    assert read_race(pair_race / "runs" / "quick-1").runs["trial_id"].tolist() == ["quick-1"]
    above = read_race(pair_race.parent)
    assert len(above.runs) == 4 and above.spec == {} and above.baseline == "baseline"


@pytest.mark.parametrize("lone", [False, True])
def test_a_trial_that_failed_for_good_is_a_run_with_its_message(pair_race: Path, lone: bool) -> None:
    """Before it had described itself, too, and where there is no other run."""
    for run in (pair_race / "runs").iterdir():
        if lone or run.name == "quick-1":
            recipe, seed = run.name.split("-")
            shutil.rmtree(run)
            run.mkdir()
            failure = {"trial_id": run.name, "recipe": recipe, "seed": int(seed), "message": "out of memory"}
            (run / "failure.json").write_text(json.dumps(failure))
    race = read_race(pair_race)
    assert len(race.runs) == 4 and race.steps.empty == lone
    said = race.runs.set_index("trial_id").loc["quick-1", ["recipe", "seed", "status", "message"]]
    assert said.tolist() == ["quick", 1, "failed", "out of memory"]
    text = write_report(pair_race).read_text()
    assert "* quick-1 (failed): out of memory" in text and "never started" not in text


@pytest.mark.parametrize("missing", ["nowhere", "."])
def test_no_runs_says_what_is_accepted(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ValueError, match=r"no runs in .*accepted") as error:
        read_race(tmp_path / missing)
    assert "\n" not in str(error.value)


def test_two_races_at_once_are_refused(tmp_path: Path, run_writer: Writer) -> None:
    for name in ("one", "two"):
        run_writer(tmp_path / name, "baseline", 0, [], {})
    with pytest.raises(ValueError, match=r"baseline-0.*occur twice"):
        read_race(tmp_path)


def test_a_run_file_without_a_seed_is_refused(tmp_path: Path, run_writer: Writer) -> None:
    folder = run_writer(tmp_path, "baseline", 0, [])
    (folder / "run.json").write_text('{"trial_id": "x", "recipe": "baseline"}')
    with pytest.raises(ValueError, match="no 'seed'; accepted"):
        read_race(tmp_path)


def test_parquet_holds_the_same_numbers_and_histograms_as_json(
    tmp_path: Path, run_writer: Writer, logged_step: RowMaker
) -> None:
    histogram = {"edges": [0.0, 1.0, 2.0], "counts": [3, 4]}
    first = logged_step(1, **{"router/difficulty_score_dist": histogram, "train/loss": None})
    values = {"depth": 2, "lr": 0.1, "schedule": "linear", "spans": [1, 2]}
    run_writer(
        tmp_path, "cggr", 0, [first, logged_step(2, **{"train/loss": 2.5})], {"order": {"8": "ab"}}, values=values
    )
    run_writer(tmp_path, "baseline", 0, [logged_step(1)], None, values={"depth": "auto"})
    race = read_race(tmp_path)
    assert math.isnan(race.steps.query("recipe == 'cggr'")["train/loss"].iloc[0])
    kept = race.steps["router/difficulty_score_dist"]
    assert [value for value in kept if isinstance(value, dict)] == [histogram]

    paths = race.to_parquet(tmp_path / "frames")
    assert [path.name for path in paths] == ["runs.parquet", "steps.parquet", "milestones.parquet"]
    steps = pd.read_parquet(tmp_path / "frames" / "steps.parquet")
    texts = steps["router/difficulty_score_dist"].dropna().tolist()
    assert [json.loads(text) for text in texts] == [histogram]
    pd.testing.assert_series_equal(steps["train/loss"], race.steps["train/loss"])
    runs = pd.read_parquet(tmp_path / "frames" / "runs.parquet").set_index("recipe")
    assert json.loads(runs.at["cggr", "values/spans"]) == [1, 2]
    assert runs.at["cggr", "values/depth"] == "2" and runs.at["baseline", "values/depth"] == "auto"
    assert json.loads(runs.at["cggr", "order"]) == {"8": "ab"} and pd.isna(runs.at["baseline", "order"])
