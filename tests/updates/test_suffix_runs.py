"""Whole runs whose layers rest: their decisions follow from what they logged, and what rests keeps its bits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import test_dynamic
import torch
from safetensors.torch import load_file
from small_runs import prepared

from cggr_ray.data.dataset import DataSpec, prepare
from cggr_ray.data.sources import Problems
from cggr_ray.loop import run_race
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import RaceSpec, plan_trials
from cggr_ray.schema import ACTIVE_LAYERS, PROBE, RELEVANCE, ROUTER_ACTIVE_PARAMS, TRAIN_LOSS
from cggr_ray.updates.dynamic import Cadence, DynamicSuffix, Limits

STEPS, STEP_SECONDS = 60, 0.5
QUICK = DynamicSuffix(
    beta=0.5, threshold=0.6, levels=4, hysteresis=1, cadence=Cadence(3, 2, 12), limits=Limits(1.01, 0.99)
)


@pytest.fixture(scope="module")
def spec() -> RaceSpec:
    return RaceSpec(
        recipes=("dynamic_suffix",),
        budget_seconds=STEPS * STEP_SECONDS,
        step_seconds=STEP_SECONDS,
        global_rows=2,
        micro_rows=2,
        milestones=(),
        model=ModelSpec(preset="tiny"),
        data=DataSpec(sources=(Problems(count=300),), row_tokens=48, val_documents=4),
        values={"optimizer.schedule.warmup_tokens": 1000},
        device="cpu",
        save_model=True,
    )


@pytest.fixture(scope="module")
def data_folder(spec: RaceSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(spec.data, tmp_path_factory)


def run(spec: RaceSpec, folder: Path, data_folder: Path, **values: object) -> list[dict]:
    changed = replace(spec, arms={spec.recipes[0]: values})
    run_race(plan_trials(changed, folder)[0].placed(folder, data_folder))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "step"]


@pytest.mark.parametrize("relevance", ["gradient_norm", "decrease"])
def test_decisions_follow_from_the_log(
    relevance: str, spec: RaceSpec, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {f"updates.{key}": value for key, value in QUICK.__dict__.items() if key not in ("cadence", "limits")}
    tables = {"updates.cadence": vars(QUICK.cadence), "updates.limits": vars(QUICK.limits)}
    values |= tables | {"updates.relevance": relevance}
    rows = run(spec, tmp_path, data_folder, **{key: v for key, v in values.items() if v is not None})
    found = {row["step"] - 1: row for row in rows}
    assert all((RELEVANCE in row) == (row[PROBE] == 1) for row in rows)
    monkeypatch.setattr(test_dynamic, "STEPS", STEPS)
    relevances = [found.get(step, {}).get(RELEVANCE, []) for step in range(STEPS)]
    losses = [found.get(step, {}).get(TRAIN_LOSS, math.nan) for step in range(STEPS)]
    answers = test_dynamic.replay(QUICK, 4, relevances, losses)
    # Not every step has a row, but every probe has.
    assert {step for step, answer in enumerate(answers) if answer.probe} <= found.keys()
    for step, row in found.items():
        assert (row[ACTIVE_LAYERS], row[PROBE]) == (sum(answers[step].active), answers[step].probe), step
    assert len({row[ACTIVE_LAYERS] for row in rows}) > 1
    assert all(row[ACTIVE_LAYERS] == 4 for row in rows if row["fraction"] >= 0.9)


def test_what_rests_keeps_its_bits(spec: RaceSpec, data_folder: Path, tmp_path: Path) -> None:
    static = replace(spec, recipes=("static_suffix",), budget_seconds=5 * STEP_SECONDS)
    rows = run(static, tmp_path, data_folder, **{"updates.keep": 0.5, "updates.full_from": 1.0})
    after = load_file(tmp_path / "model" / "model.safetensors")
    start = static.model.build(len(after["model.embed_tokens.weight"]), 0, torch.device("cpu"), torch.float32)
    moved = {name: not torch.equal(p, after[name]) for name, p in start.named_parameters()}
    for name, changed in moved.items():
        # Tied: the head learns.
        assert changed == (not name.startswith(("model.layers.0.", "model.layers.1."))), name
    learning = sum(p.numel() for name, p in start.named_parameters() if moved[name])
    assert {(row[ACTIVE_LAYERS], row[ROUTER_ACTIVE_PARAMS]) for row in rows} == {(2.0, float(learning))}


@pytest.mark.parametrize("recipe", ["static_suffix", "dynamic_suffix"])
def test_a_cache_of_activations_changes_no_loss(recipe: str, spec: RaceSpec, tmp_path: Path) -> None:
    # Few documents, so that they come again; the first epoch finds nothing kept.
    data = DataSpec(sources=(Problems(count=14),), row_tokens=48, val_documents=2, val_per_mille=100)
    prepare(data, tmp_path / "data")
    untied = ModelSpec(preset="tiny", tie_embeddings=False)
    few = replace(spec, recipes=(recipe,), budget_seconds=40 * STEP_SECONDS, data=data, save_model=False, model=untied)
    often = {
        "updates.cadence": {"first": 9, "shortest": 9, "longest": 9},
        "updates.hysteresis": 1,
        "updates.threshold": 0.3,
    }
    values = {"updates.full_until": 0.1, **(often if recipe == "dynamic_suffix" else {})}
    plain = run(few, tmp_path / "plain", tmp_path / "data", **values)
    kept = {"execution.activation_cache": {"memory_gib": 1e-4, "disk_gib": 1.0}}
    found = run(few, tmp_path / "kept", tmp_path / "data", **values, **kept)
    assert [row["step"] for row in found] == [row["step"] for row in plain]
    assert [row[TRAIN_LOSS] for row in found] == pytest.approx([row[TRAIN_LOSS] for row in plain], rel=1e-4)
    assert not (tmp_path / "kept" / "activations.bin").exists()


def test_a_cache_counts_the_steps_that_rest_before_and_after_a_restart(spec: RaceSpec, tmp_path: Path) -> None:
    data = DataSpec(sources=(Problems(count=14),), row_tokens=48, val_documents=2, val_per_mille=100)
    prepare(data, tmp_path / "data")
    untied, values = ModelSpec(preset="tiny", tie_embeddings=False), {"execution.activation_cache": {"memory_gib": 1.0}}
    often = replace(spec, recipes=("static_suffix",), data=data, save_model=False, model=untied,
                    checkpoint_every_seconds=7 * STEP_SECONDS, arms={"static_suffix": values})  # fmt: skip
    trial = plan_trials(often, tmp_path / "run")[0].placed(tmp_path / "run", tmp_path / "data")

    def kill(row: dict) -> None:
        if row["train_seconds"] > 40 * STEP_SECONDS:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_race(trial, kill)
    found = run_race(trial)["activation_cache"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("resumed") == 1
    resting = {line["step"] for line in lines if line.get(ACTIVE_LAYERS) == 2}
    assert found["hits"] + found["misses"] == len(resting) > 40 and found["hits"] > 0


def test_an_embedding_that_two_objectives_read_rests_all_the_same(
    spec: RaceSpec, data_folder: Path, tmp_path: Path
) -> None:
    untied = replace(
        spec,
        recipes=("mtp_sequential",),
        budget_seconds=4 * STEP_SECONDS,
        model=ModelSpec(preset="tiny", tie_embeddings=False),
    )
    run(untied, tmp_path, data_folder, **{"updates": {"kind": "static_suffix", "keep": 0.5}})
    after = load_file(tmp_path / "model" / "model.safetensors")
    start = untied.model.build(len(after["model.embed_tokens.weight"]), 0, torch.device("cpu"), torch.float32)
    moved = {name for name, p in start.named_parameters() if not torch.equal(p, after[name])}
    assert "model.embed_tokens.weight" not in moved and {"lm_head.weight", "model.norm.weight"} <= moved
