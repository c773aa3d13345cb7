"""Memory that runs out in a run: it goes on in smaller micro-batches, from the warm-up on, from a checkpoint too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import KilledError, killed_after, prepared, rows_of, step_losses

from analysis import read_race
from cggr_ray.data.dataset import DataSpec
from cggr_ray.data.sources import Problems
from cggr_ray.learner import Pass
from cggr_ray.loop import Run, run_race
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import RaceSpec, Trial, plan_trials

STEP_SECONDS = 0.5
SPEC = RaceSpec(
    budget_seconds=8 * STEP_SECONDS,
    step_seconds=STEP_SECONDS,
    global_rows=8,
    micro_rows=8,
    milestones=(),
    model=ModelSpec(preset="tiny"),
    data=DataSpec(sources=(Problems(count=60),), row_tokens=32, val_documents=4),
    values={"optimizer.schedule.warmup_tokens": 1000},
    device="cpu",
)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(SPEC.data, tmp_path_factory)


def trial_of(folder: Path, data_folder: Path, recipe: str = "baseline", **changes: Any) -> Trial:
    return plan_trials(replace(SPEC, recipes=(recipe,), **changes), folder)[0].placed(folder, data_folder)


PASS = Pass.__call__


class Scarce:
    """Stands in for a device: a pass over more rows than `most` finds no memory from a number of passes on."""

    def __init__(self, most: int, after: int) -> None:
        self.most, self.after, self.calls = most, after, 0

    def __get__(self, instance: Any, owner: type) -> Any:
        def run(micro: Any, *arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            result = PASS(instance, micro, *arguments, **keywords)
            if self.calls > self.after and len(micro.tokens_BT) > self.most:
                raise torch.OutOfMemoryError("no memory")
            return result

        return run


def test_a_run_goes_on_in_smaller_micro_batches(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, smaller, parts = tmp_path / "whole", tmp_path / "smaller", tmp_path / "parts"
    run_race(trial_of(whole, data_folder))
    # Two passes of warm-up, three steps, and the fourth finds no memory for eight rows, nor for four.
    monkeypatch.setattr(Pass, "__call__", Scarce(most=2, after=5))
    summary = run_race(trial_of(smaller, data_folder))
    assert (summary["micro_rows"], summary["out_of_memory"], summary["steps"]) == (2, 2, 8)
    events = rows_of(smaller, "out_of_memory")
    assert [(e["step"], e["train/micro_rows"], e["message"]) for e in events] == [
        (4, 4, "no memory"),
        (4, 2, "no memory"),
    ]
    assert events[0]["train_seconds"] == 3 * STEP_SECONDS and events[0]["fraction"] == 3 / 8
    run = json.loads((smaller / "run.json").read_text())
    assert run["micro_rows"] == 8 and summary["order"] == json.loads((whole / "summary.json").read_text())["order"]
    found, expected = step_losses(smaller), step_losses(whole)
    assert all(found[step] == expected[step] for step in (1, 2, 3))
    assert found == pytest.approx(expected, rel=1e-3) and found != expected

    frame = read_race(smaller)
    assert frame.runs["out_of_memory"].tolist() == [2] and len(frame.steps) == 8 and len(frame.milestones) == 1

    monkeypatch.setattr(Pass, "__call__", Scarce(most=2, after=5))
    saving = {"checkpoint_every_seconds": 5 * STEP_SECONDS}
    with pytest.raises(KilledError):
        run_race(trial_of(parts, data_folder, **saving), killed_after(5.5 * STEP_SECONDS))
    # There is memory again, and what is saved holds all the same.
    monkeypatch.setattr(Pass, "__call__", Scarce(most=8, after=0))
    again = run_race(trial_of(parts, data_folder, **saving))
    assert len(rows_of(parts, "resumed")) == 1 and step_losses(parts) == found
    assert all(again[name] == summary[name] for name in ("val/loss", "micro_rows", "out_of_memory", "tokens_seen"))


def test_memory_that_is_scarce_from_the_start_is_found_in_the_warm_up(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_race(trial_of(tmp_path / "two", data_folder, micro_rows=2))
    monkeypatch.setattr(Pass, "__call__", Scarce(most=2, after=0))
    found = run_race(trial_of(tmp_path / "eight", data_folder))
    assert found["micro_rows"] == 2 and step_losses(tmp_path / "eight") == step_losses(tmp_path / "two")
    assert found["train_seconds"] == expected["train_seconds"]
    assert [row["step"] for row in rows_of(tmp_path / "eight", "out_of_memory")] == [1, 1]


@pytest.mark.parametrize(("recipe", "last"), [("baseline", 1), ("random_rows", 4)])
def test_where_no_smaller_micro_batch_will_do_the_run_ends(
    recipe: str, last: int, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pass, "__call__", Scarce(most=0, after=3))
    with pytest.raises(torch.OutOfMemoryError, match=f"out of memory with micro-batches of {last} rows, and "):
        run_race(trial_of(tmp_path, data_folder, recipe))
    assert not (tmp_path / "summary.json").exists()
    # What was tried before the end is in the log all the same.
    assert [row["train/micro_rows"] for row in rows_of(tmp_path, "out_of_memory")] == [
        size for size in (4, 2, 1) if size >= last
    ]


def test_the_loader_hands_out_the_same_rows_in_smaller_pieces(data_folder: Path, tmp_path: Path) -> None:
    run = Run(trial_of(tmp_path, data_folder), lambda row: None)
    run.prepare()
    with run.loader:
        first = run.loader.next()
        again = run.loader.smaller(3)
        assert [len(m.tokens_BT) for m in again.micros] == [3, 3, 2] and again.tokens == first.tokens
        assert torch.equal(torch.cat([m.tokens_BT for m in again.micros]), first.micros[0].tokens_BT)
        # Those that were packed ahead, and those that are packed from now on.
        assert {len(run.loader.next().micros) for _ in range(6)} == {3}
        assert run.loader.at.rows_read == 7 * 8
