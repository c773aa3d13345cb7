"""With deterministic algorithms a run on a GPU repeats to the bit, and so does what is stopped and goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import prepared, rows_of, step_losses

from cggr_ray.data.dataset import DataSpec
from cggr_ray.data.sources import Problems
from cggr_ray.loop import run_race
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import RaceSpec, Trial, plan_trials
from cggr_ray.reproduce import reproduce
from cggr_ray.schema import GRAD_NORM
from cggr_ray.stopping import StoppedError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STEPS, STOPPED_AFTER = 24, 13
SPEC = RaceSpec(
    global_rows=16,
    micro_rows=8,
    budget_seconds=STEPS * 1.0,
    step_seconds=1.0,
    milestones=(),
    model=ModelSpec(preset="llama-24m"),
    data=DataSpec(sources=(Problems(count=2000),), row_tokens=512, val_documents=8),
    values={"optimizer.schedule.warmup_tokens": 20000, "execution.deterministic": True},
    device="cuda",
    save_model=True,
)
GRAPHS = {"execution.cuda_graphs": True}


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(SPEC.data, tmp_path_factory)


def trial_of(recipe: str, values: dict[str, Any], folder: Path, data_folder: Path) -> Trial:
    spec = replace(SPEC, recipes=(recipe,), values={**SPEC.values, **values})
    return plan_trials(spec, folder)[0].placed(folder, data_folder)


def steps_of(folder: Path) -> list[tuple[Any, ...]]:
    """(step, loss, gradient norm) of every step that counts, the last written where there are two."""
    norms = {row["step"]: row[GRAD_NORM] for row in rows_of(folder, "step")}
    return [(step, loss, norms[step]) for step, loss in step_losses(folder).items()]


@pytest.mark.parametrize(
    "recipe, values",
    [
        ("baseline", {}),
        ("baseline", GRAPHS),
        ("cggr_tuned", GRAPHS),
        ("cggr_importance", {}),
        ("dynamic_suffix", {}),
        ("e3/full", {}),
    ],
)
def test_a_run_repeats_and_resumes_to_the_bit(
    recipe: str, values: dict[str, Any], data_folder: Path, tmp_path: Path
) -> None:
    whole, again, parts = (tmp_path / name for name in ("whole", "again", "parts"))
    expected = run_race(trial_of(recipe, values, whole, data_folder))
    repeated = run_race(trial_of(recipe, values, again, data_folder))
    questions = iter([False] * STOPPED_AFTER + [True])
    cut = trial_of(recipe, values, parts, data_folder)
    with pytest.raises(StoppedError):
        run_race(cut, stop=lambda: next(questions))
    resumed = run_race(cut)
    assert len(steps_of(whole)) == expected["steps"] > STOPPED_AFTER
    assert steps_of(again) == steps_of(whole)
    assert steps_of(parts) == steps_of(whole)
    assert repeated["val/loss"] == expected["val/loss"] == resumed["val/loss"]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, again, parts)]
    assert weights[0] == weights[1] == weights[2]
    verdict = reproduce(parts, tmp_path / "replay", print)
    assert verdict.agrees and verdict.lines[0].startswith("agrees bit for bit"), verdict.lines
