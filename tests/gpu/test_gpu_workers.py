"""Two workers on two GPUs: both hold the same weights, and train as one does, with CUDA graphs and without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pairs import Job, run, together
from safetensors.torch import load_file
from small_runs import prepared

from cggr_ray.data.dataset import DataSpec
from cggr_ray.data.sources import Problems
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import RaceSpec, Trial, plan_trials

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

SPEC = RaceSpec(
    budget_seconds=12.0,
    step_seconds=1.0,
    global_rows=16,
    micro_rows=8,
    milestones=(0.5,),
    model=ModelSpec(preset="tiny"),
    data=DataSpec(sources=(Problems(count=600),), row_tokens=256, val_documents=8),
    values={"optimizer.schedule.warmup_tokens": 1000},
    device="cuda",
    checkpoint_every_seconds=1000.0,
)
PROBE = {"kind": "selected_tokens", "score": "loss", "plan": "before", "router": {"kind": "probe", "layers": 1}}
ARMS = {"baseline": {}, "cggr_loss": {"tokens": PROBE}, "galore": {}, "dynamic_suffix": {}}
CASES = [("baseline", False), ("baseline", True), ("cggr_loss", True), ("galore", False), ("dynamic_suffix", True)]


def trial_of(recipe: str, graphs: bool, workers: int, folder: Path, data: Path) -> Trial:
    values = ARMS[recipe] | {"execution.cuda_graphs": graphs}
    spec = replace(SPEC, recipes=(recipe,), arms={recipe: values}, workers=workers)
    return plan_trials(spec, folder)[0].placed(folder / f"{recipe}-{graphs}", data)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(SPEC.data, tmp_path_factory)


@pytest.fixture(scope="module")
def pairs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    jobs = [Job(trial_of(recipe, graphs, 2, folder, data)) for recipe, graphs in CASES]
    together(jobs, trial_of("baseline", False, 2, folder / "killed", data), on_gpu=True)
    return folder


@pytest.mark.parametrize(("recipe", "graphs"), CASES)
def test_two_gpus_train_as_one(recipe: str, graphs: bool, pairs: Path, data: Path, tmp_path: Path) -> None:
    where = pairs / f"{recipe}-{graphs}"
    first, second = (load_file(where / f"held-{rank}.safetensors") for rank in range(2))
    # Each process has compiled its own kernels, whose rounding may differ.
    for key in (key for key in first if key.startswith("model.")):
        torch.testing.assert_close(first[key], second[key], rtol=1e-2, atol=1e-3)
    found, expected = (
        json.loads((where / "summary.json").read_text()),
        run(Job(trial_of(recipe, graphs, 1, tmp_path, data))),
    )
    assert found["order"] == expected["order"] and found["tokens_seen"] == expected["tokens_seen"]
    assert found["val/loss"] == pytest.approx(expected["val/loss"], rel=0.02)
