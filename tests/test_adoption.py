"""A run that goes on with another's weights, at its own place in the budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import rows_of

from analysis import read_race
from cggr_ray import checkpoint
from cggr_ray.adoption import adopt
from cggr_ray.data.dataset import DataSpec, prepare
from cggr_ray.data.sources import Problems
from cggr_ray.loop import run_race
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import RaceSpec, Trial, plan_trials
from cggr_ray.reproduce import read_recorded, reproduce


class Stopped(Exception):
    """As a scheduler stops a run: inside its report."""


def trial_of(folder: Path, name: str, step_seconds: float, rate: float, part: float = 1.0) -> Trial:
    spec = RaceSpec(
        recipes=("fewer_rows",),
        budget_seconds=6.0,
        step_seconds=step_seconds,
        global_rows=4,
        micro_rows=4,
        milestones=(0.5,),
        model=ModelSpec(preset="tiny"),
        data=DataSpec(sources=(Problems(count=600),), row_tokens=64, val_documents=8),
        values={"optimizer.schedule.warmup_tokens": 1000, "optimizer.matrix.lr": rate, "rows.fraction": part},
        device="cpu",
    )
    prepare(spec.data, folder / "data")
    return replace(plan_trials(spec, folder)[0], trial_id=name).placed(folder / name, folder / "data")


def to_the_milestone(trial: Trial) -> None:
    def report(row: dict[str, Any]) -> None:
        if row["kind"] == "milestone":
            raise Stopped

    with pytest.raises(Stopped):
        run_race(trial, report, saved=True)


def test_the_next_step_is_the_donors_and_the_clock_its_own(tmp_path: Path) -> None:
    donor, receiver = trial_of(tmp_path, "donor", 0.5, 0.002), trial_of(tmp_path, "receiver", 0.7, 0.01)
    to_the_milestone(donor)
    to_the_milestone(receiver)
    for _ in range(2):
        assert adopt(Path(donor.folder), Path(receiver.folder))
    assert [path.name for path in (tmp_path / "receiver" / "checkpoints").iterdir()] == ["step_00000006"]
    summary = run_race(receiver)

    whole = trial_of(tmp_path, "whole", 0.5, 0.002)
    truth = {row["step"]: row["train/loss"] for row in (run_race(whole), rows_of(tmp_path / "whole", "step"))[1]}
    found = {row["step"]: row["train/loss"] for row in rows_of(tmp_path / "receiver", "step")}
    # Six steps of the donor are its own now; the seventh reads the donor's weights and data; then its own rate tells.
    assert [found[step] for step in range(1, 8)] == [truth[step] for step in range(1, 8)]
    assert found[9] != truth[9]
    # Five steps of 0.7 s on its own clock, then four to the end of its budget.
    assert summary["steps"] == 10 and summary["train_seconds"] == pytest.approx(9 * 0.7)
    later = [row["train_seconds"] for row in rows_of(tmp_path / "receiver", "step") if row["step"] == 7]
    assert later == [pytest.approx(6 * 0.7)]
    assert rows_of(tmp_path / "receiver", "adopted") == [{"kind": "adopted", "step": 6, "donor": "donor"}]
    with pytest.raises(ValueError, match="went on at step 6 with the weights of 'donor'; accepted: a run that"):
        reproduce(tmp_path / "receiver", tmp_path / "again", lambda text: None)
    assert not (tmp_path / "again").exists() and read_recorded(tmp_path / "whole").summary["steps"] == 12
    assert read_race(tmp_path / "receiver").runs["resumes"].tolist() == [1]
    kept = json.loads((tmp_path / "whole" / "summary.json").read_text())["order"]
    assert all(kept[mark] == value for mark, value in summary["order"].items() if mark in kept)


@pytest.mark.parametrize(("theirs", "own"), [(1.0, 0.25), (0.25, 1.0)])
def test_rows_per_second_are_those_of_its_own_steps(theirs: float, own: float, tmp_path: Path) -> None:
    donor = trial_of(tmp_path, "donor", 0.5, 0.002, theirs)
    receiver = trial_of(tmp_path, "receiver", 0.7, 0.002, own)
    to_the_milestone(donor)
    to_the_milestone(receiver)
    assert adopt(Path(donor.folder), Path(receiver.folder))
    run_race(receiver)
    found = {row["step"]: row["train/samples_per_sec"] for row in rows_of(tmp_path / "receiver", "step")}
    assert [found[step] for step in (5, 6)] == pytest.approx([4 * theirs / 0.5] * 2)
    assert [found[step] for step in range(7, 11)] == pytest.approx([4 * own / 0.7] * 4)


def test_a_donor_without_a_whole_checkpoint_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    donor, receiver = trial_of(tmp_path, "donor", 0.5, 0.002), trial_of(tmp_path, "receiver", 0.7, 0.01)
    to_the_milestone(donor)
    to_the_milestone(receiver)
    for state in (tmp_path / "donor" / "checkpoints").glob("*/state.json"):
        state.write_text("{}")
    before = {path: path.read_bytes() for path in (tmp_path / "receiver").rglob("*") if path.is_file()}
    assert not adopt(Path(donor.folder), Path(receiver.folder))
    assert {path: path.read_bytes() for path in (tmp_path / "receiver").rglob("*") if path.is_file()} == before
    assert "receiver: goes on with its own weights, as donor has no whole checkpoint" in caplog.text
    assert run_race(receiver)["status"] == "finished"


def test_a_milestone_is_reported_once_there_is_a_checkpoint_of_it(tmp_path: Path) -> None:
    trial = replace(trial_of(tmp_path, "run", 0.5, 0.002), gpus_per_trial=0.5)
    seen = []

    def report(row: dict[str, Any]) -> None:
        saved = checkpoint.newest(Path(trial.folder))[0]
        seen.append((row["kind"], row["step"], saved.name if saved else None))

    run_race(trial, report, saved=True)
    assert [entry for entry in seen if entry[0] == "milestone"] == [
        ("milestone", 6, "step_00000006"),
        ("milestone", 12, "step_00000006"),
    ]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["gpus_per_trial"] == 0.5
