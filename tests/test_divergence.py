"""Gradients, weights and losses that are no finite numbers: what a run skips, when it ends, and what it says then."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import STEP_SECONDS, TWELVE_STEPS, prepared, rows_of, trial_of

from cggr_ray.learner import Learner
from cggr_ray.loop import run_race
from cggr_ray.progress import Progress


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(TWELVE_STEPS.data, tmp_path_factory)


def test_a_run_that_diverges_says_so_and_stops(data_folder: Path, tmp_path: Path) -> None:
    long = replace(TWELVE_STEPS, budget_seconds=1000 * STEP_SECONDS)
    values = {"optimizer.matrix.lr": 1e30, "optimizer.rest.lr": 1e30}
    summary = run_race(trial_of(long, "baseline", tmp_path, data_folder, **values))
    assert summary["status"] == "diverged" and summary["steps"] < 60


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: range, poison: Callable[[Learner], None]) -> None:
    """Something happens after the backward passes of these steps of a run, none of its warm-up."""
    gradients = Learner._gradients

    def changed(learner: Learner, batch: object, levels: object, progress: Progress) -> object:
        found = gradients(learner, batch, levels, progress)
        if progress.step in steps and progress.budget_seconds > 1:
            poison(learner)
        return found

    monkeypatch.setattr(Learner, "_gradients", changed)


def nan_gradient(learner: Learner) -> None:
    next(p.grad for _, p in learner.named_parameters() if p.grad is not None).view(-1)[3] = math.nan


def nan_weight(learner: Learner) -> None:
    nan_gradient(learner)
    with torch.no_grad():
        learner.named_parameters()[0][1].view(-1)[:] = math.nan


@pytest.mark.parametrize("recipe", ["baseline", "galore", "muon_8bit", "cggr_model"])
def test_steps_without_a_finite_gradient_change_nothing_and_are_counted(
    recipe: str, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One evaluation just before the bad steps, one within, one after a few that are good again.
    spec = replace(TWELVE_STEPS, milestones=(4 / 12, 7 / 12))
    poisoned(monkeypatch, range(4, 8), nan_gradient)
    values = {"tokens.router.layers": 1} if recipe == "cggr_model" else {}
    summary = run_race(trial_of(spec, recipe, tmp_path, data_folder, **values))
    before, within, after = (row["val/loss"] for row in rows_of(tmp_path, "milestone"))
    assert before == within != after and math.isfinite(after)
    assert summary["status"] == "finished" and summary["skipped_steps"] == 4


def test_a_run_whose_last_validation_is_not_finite_has_diverged(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few steps before the end of the budget for their gradients to say so."""
    poisoned(monkeypatch, range(9, 12), nan_weight)
    summary = run_race(trial_of(replace(TWELVE_STEPS, milestones=(0.5,)), "baseline", tmp_path, data_folder))
    assert (summary["status"], summary["steps"], summary["skipped_steps"]) == ("diverged", 12, 3)
    assert summary["message"] == "the last validation loss is not finite"
    assert summary["last_good"]["fraction"] == 0.5 and math.isfinite(summary["best_val_loss"])


@pytest.mark.parametrize("poison", [nan_gradient, nan_weight])
def test_a_run_that_diverges_keeps_its_last_good_validation(
    poison: Callable[[Learner], None],
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = replace(TWELVE_STEPS, budget_seconds=100 * STEP_SECONDS, milestones=(0.04,))
    poisoned(monkeypatch, range(4, 100), poison)
    run_race(trial_of(long, "baseline", tmp_path, data_folder))
    summary = json.loads((tmp_path / "summary.json").read_text())
    first, last = rows_of(tmp_path, "milestone")
    assert (summary["status"], summary["steps"], summary["skipped_steps"]) == ("diverged", 24, 20)
    good = first if poison is nan_weight else last
    assert summary["last_good"]["val/loss"] == good["val/loss"] == first["val/loss"] == summary["best_val_loss"]
    assert summary["last_good"]["fraction"] == good["fraction"]
    # Twenty-four steps of a hundred; the last milestone comes early.
    assert [row["fraction"] for row in (first, last)] == pytest.approx([0.04, 0.24])
    assert summary["train_seconds"] == pytest.approx(24 * STEP_SECONDS) and summary["overrun_seconds"] == 0
    assert summary["val/loss"] == (None if poison is nan_weight else last["val/loss"])
