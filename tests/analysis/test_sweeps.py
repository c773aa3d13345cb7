"""A sweep's events to frames: how trials ended, what was drawn, and what is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from sweep_folders import START, drawn, ended, planted, result, write_run_of, write_sweep

from analysis import read_sweep, write_report
from analysis.sweeps import flat_values
from cggr_ray.race import RaceSpec
from cggr_ray.recipe import load_recipe
from cggr_ray.routing.tokens import SelectedTokens


@pytest.fixture
def small(tmp_path: Path) -> Path:
    events = [
        {"kind": "session", "at": START - 1},
        drawn(0, START, lr=0.1, part={"kind": "a", "depth": 2}, limits=None, flag=True),
        {"kind": "session", "at": START + 1},
        drawn(1, START + 1, lr=0.2, part={"kind": "b"}, limits={"upper": 1.5}, flag=False),
        drawn(2, START + 2, lr=0.3, part={"kind": "b"}, limits=None, flag=True),
        result(0, 5.0, 4.0, START + 5),
        result(1, 5.0, 3.0, START + 6),
        result(2, 5.0, 3.5, START + 7),
        ended(1, "stopped", 3.0, 5.0, START + 8),
        {"kind": "exploit", "trial_id": "t0002", "donor": "t0001", "generation": 1, "values": {"lr": 0.25}},
        {"kind": "weather", "trial_id": "t0000", "val/loss": 0.0},
        ended(0, "diverged", None, 7.5, START + 9, message="no finite gradient", peak_memory_mib=None),
    ]
    return write_sweep(tmp_path / "sweep", events)


def test_trials_say_how_they_ended_and_what_was_drawn(small: Path) -> None:
    write_run_of(small, 1, [], gpus_per_trial=0.5)
    sweep = read_sweep(small)
    trials = sweep.trials.set_index("trial_id")
    assert trials["status"].to_dict() == {"t0000": "diverged", "t0001": "stopped", "t0002": "unfinished"}
    # What an end does not say, the last result has said.
    assert trials["val/loss"].to_dict() == {"t0000": 4.0, "t0001": 3.0, "t0002": 3.5}
    assert trials["train_seconds"].to_dict() == {"t0000": 7.5, "t0001": 5.0, "t0002": 5.0}
    assert trials["gpus_per_trial"].tolist() == [1.0, 0.5, 1.0] and trials["exploits"].tolist() == [0, 0, 1]
    assert trials["ended_at"].tolist()[:2] == [START + 9, START + 8] and math.isnan(trials["ended_at"]["t0002"])
    assert math.isnan(trials["peak_memory_mib"]["t0000"]) and trials["message"]["t0000"] == "no finite gradient"
    assert trials["values/lr"].tolist() == [0.1, 0.2, 0.25]  # of one that took over another, those it goes on with
    assert trials["values/part.kind"].tolist()[:2] == ["a", "b"] and trials["values/part.depth"].tolist()[0] == 2
    assert trials["values/limits"].tolist()[:2] == ["none", "set"] and trials["values/limits.upper"]["t0001"] == 1.5
    assert sweep.resumed_at == (START + 1,)
    assert sweep.budget_seconds == 20.0 and sweep.hyperparameters == ["lr", "part.kind", "limits", "flag"]


def test_results_are_the_validations_in_their_order(small: Path) -> None:
    results = read_sweep(small).results
    assert results["trial_id"].tolist() == ["t0000", "t0001", "t0002"]
    assert results["val/loss"].tolist() == [4.0, 3.0, 3.5] and results["tokens_seen"].tolist() == [500] * 3


def test_a_torn_last_line_is_ignored_and_a_broken_one_is_named(small: Path) -> None:
    with (small / "sweep.jsonl").open("a") as file:
        file.write('{"kind": "end", "trial')
    with pytest.warns(UserWarning, match=r"sweep\.jsonl:13: torn last line"):
        assert len(read_sweep(small).trials) == 3
    for broken in ('{"kind": "end", "trial\n', "[1]\n", '{"trial_id": "t0001"}\n'):
        (small / "sweep.jsonl").write_text(broken + json.dumps(drawn(0)) + "\n")
        with pytest.raises(ValueError, match=r"sweep\.jsonl:1: .*accepted"):
            read_sweep(small)


def test_a_folder_without_a_sweep_says_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no sweep in .*accepted: a folder with sweep\.json"):
        read_sweep(tmp_path)


def test_a_sweep_that_has_drawn_nothing_yet_is_empty_and_has_no_report(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "empty", [{"kind": "session", "at": START}])
    for _ in range(2):
        sweep = read_sweep(folder)
        assert len(sweep.trials) == len(sweep.results) == 0 and sweep.hyperparameters == []
        assert {"status", "message", "val/loss"} < set(sweep.trials.columns) and "train_seconds" in sweep.results
        with pytest.raises(ValueError, match=r"no trial in .*accepted: a sweep that has drawn one"):
            write_report(folder)
        assert not (folder / "report").exists()
        (folder / "sweep.jsonl").unlink(missing_ok=True)


def test_messages_are_text_before_a_trial_has_ended(tmp_path: Path) -> None:
    for number, events in enumerate(([], [drawn(0, x=1)])):
        trials = read_sweep(write_sweep(tmp_path / str(number), events)).trials
        assert trials["message"].str.len().isna().all()


def test_run_folders_are_read_when_their_rows_are_asked_for(tmp_path: Path) -> None:
    sweep = read_sweep(planted(tmp_path / "planted"))
    (tmp_path / "planted" / "runs" / "t0000" / "metrics.jsonl").unlink()
    assert sweep.steps.groupby("trial_id").size().to_dict() == {"t0001": 5}
    assert sweep.milestones["val/loss"].tolist() == [4.0]


def test_values_that_are_no_numbers_are_text() -> None:
    assert flat_values({"a": True, "b": [1, 2], "c": None, "d": "x", "e": {"f": {"g": 1}}}) == {
        "values/a": "true",
        "values/b": "[1, 2]",
        "values/c": "none",
        "values/d": "x",
        "values/e.f.g": 1,
    }


def test_a_key_that_is_drawn_beside_its_part_is_what_the_trial_ran_with() -> None:
    """In whatever order a sweep's file names the two: a recipe takes the part first."""
    part, keep = {"tokens": {"kind": "selected_tokens", "keep": 0.5}}, {"tokens.keep": 0.3}
    for values in (part | keep, keep | part):
        ran = load_recipe("cggr_loss").with_values(RaceSpec(arms={"cggr_loss": values}).changes("cggr_loss"))
        assert isinstance(ran.tokens, SelectedTokens) and ran.tokens.keep == 0.3
        assert flat_values(values) == {"values/tokens.kind": "selected_tokens", "values/tokens.keep": 0.3}


def test_parquet_holds_the_trials(small: Path, tmp_path: Path) -> None:
    sweep = read_sweep(small)
    paths = sweep.to_parquet(tmp_path / "frames")
    assert [path.name for path in paths] == ["trials.parquet", "results.parquet"]
    pd.testing.assert_series_equal(pd.read_parquet(paths[0])["values/lr"], sweep.trials["values/lr"])
