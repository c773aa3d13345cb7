"""An arm's own rows a step and a micro-batch: what is accepted, its learning rate, and the rows that it reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TWO_ARMS, prepared, rows_of

from cggr_ray.batches import ArmBatch, smaller_sizes
from cggr_ray.loop import run_race
from cggr_ray.race import RaceSpec, plan_trials
from cggr_ray.routing.curriculum import Curriculum
from cggr_ray.routing.rows import AllRows, HardestRows
from cggr_ray.routing.scorers import Setting
from cggr_ray.routing.tokens import RandomTokens

CPU = torch.device("cpu")


def test_an_arm_may_have_rows_of_its_own(tmp_path: Path) -> None:
    own = {"random_tokens": {"global_rows": 64, "micro_rows": 32}}
    spec = RaceSpec.from_plain(TWO_ARMS.to_plain() | {"batches": own, "batch_lr_rule": "sqrt"})
    assert RaceSpec.from_plain(json.loads(json.dumps(spec.to_plain()))) == spec
    baseline, random = plan_trials(spec, tmp_path)
    assert (baseline.race.global_rows, baseline.race.micro_rows) == (16, 4)
    assert (random.race.global_rows, random.race.micro_rows) == (64, 32)
    assert baseline.recipe.optimizer.lr_scale == 1 and "optimizer.lr_scale" not in baseline.values
    assert random.recipe.optimizer.lr_scale == random.values["optimizer.lr_scale"] == 2
    assert random.race.rows_of("random_tokens") == (64, 32), "what is told to a trial is applied once"
    tuned = replace(spec, values={"optimizer.lr_scale": 0.5}, batch_lr_rule="linear")
    assert [tuned.recipe(name).optimizer.lr_scale for name in tuned.recipes] == [0.5, 2.0]
    assert replace(spec, batch_lr_rule="none").recipe("random_tokens").optimizer.lr_scale == 1
    assert replace(spec, batches={"baseline": ArmBatch(2)}).rows_of("baseline") == (2, 2)


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ({"random_token": {}}, r"batches\.random_token: no such recipe in the race; did you mean 'random_tokens'"),
        ({"baseline": {"rows": 3}}, r"unknown key 'batches\.baseline\.rows'"),
        ({"baseline": {"global_rows": 0}}, r"batches\.baseline: global_rows = 0; accepted: 1 or more"),
        ({"baseline": {"micro_rows": 17}}, r"batches\.baseline: micro_rows = 17; accepted: 1 to global_rows = 16"),
        ({"baseline": {"global_rows": "many"}}, r"batches\.baseline\.global_rows = 'many'"),
    ],
)
def test_mistakes_in_batches_are_named(batches: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RaceSpec.from_plain(TWO_ARMS.to_plain() | {"batches": batches})


def test_micro_batches_of_an_arm_are_checked_with_its_recipe() -> None:
    rows = {"kind": "hardest_rows", "keep": 0.25, "layers": 1}
    spec = replace(TWO_ARMS, arms={"baseline": {"rows": rows}}, batches={"baseline": ArmBatch(16, 8)})
    spec.check()
    with pytest.raises(ValueError, match=r"recipe 'baseline': keep = 0\.25 of a micro-batch of 2 rows"):
        replace(spec, batches={"baseline": ArmBatch(16, 2)}).check()


def test_sizes_after_memory_ran_out() -> None:
    assert list(smaller_sizes(AllRows(), 8, 16)) == [4, 3, 2, 1]
    assert list(smaller_sizes(HardestRows(keep=0.25), 12, 12)) == [4]
    assert list(smaller_sizes(HardestRows(keep=0.25), 4, 16)) == list(smaller_sizes(AllRows(), 1, 1)) == []


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(TWO_ARMS.data, tmp_path_factory)


def test_arms_of_other_batches_warm_up_on_the_same_tokens_of_one_order(data_folder: Path, tmp_path: Path) -> None:
    spec = replace(TWO_ARMS, batches={"random_tokens": ArmBatch(16, 8)}, batch_lr_rule="sqrt", global_rows=8)
    rates, orders = [], []
    for trial in plan_trials(spec, tmp_path):
        folder = tmp_path / trial.trial_id
        orders.append(run_race(trial.placed(folder, data_folder))["order"])
        steps = [row for row in rows_of(folder, "step") if row["fraction"] < 0.6]
        rates.append({row["tokens_seen"]: row["train/learning_rate"] for row in steps})
    small, large = rates
    both = sorted(small.keys() & large.keys())
    assert len(both) >= 2 and both[0] < 3000 < both[-1], "before and after the end of the warm-up"
    for tokens in both:
        assert large[tokens] == pytest.approx(2**0.5 * small[tokens], rel=1e-12)
    assert small[both[-1]] == 3e-3 and small[both[0]] == pytest.approx(3e-3 * both[0] / 3000)
    assert orders[0].items() <= orders[1].items() and len(orders[0]) == 1 and len(orders[1]) == 2


def test_what_a_curriculum_never_keeps_need_not_fit() -> None:
    setting = Setting(CPU, 4, 32, 100)
    at_once = Curriculum(target_at=0.0)
    assert RandomTokens(0.25, curriculum=at_once).build(0, setting).levels() == (0.25,)
    assert RandomTokens(0.25, curriculum=replace(at_once, full_from=0.9)).build(0, setting).levels() == (0.25, 1.0)
    assert RandomTokens(0.25, curriculum=replace(at_once, full_every=8)).build(0, setting).levels() == (0.25, 1.0)
    assert RandomTokens(0.25).build(0, setting).levels()[-1] == 1.0
