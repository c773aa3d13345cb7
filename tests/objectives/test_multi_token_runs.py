"""Training with several tokens ahead: what is trained, saved, resumed, put back after a warm-up, and exported."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_batches import batches_of
from small_learners import NoHeldOut, everything, same
from transformers import AutoModelForCausalLM, PreTrainedModel

from cggr_ray import checkpoint
from cggr_ray.data.batch import Batch
from cggr_ray.data.packing import RowOrder
from cggr_ray.data.store import TokenStore
from cggr_ray.learner import Learner, StepRow
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress
from cggr_ray.recipe import Recipe
from cggr_ray.schema import AUXILIARY_LOSS, ROUTER_ACTIVE_PARAMS, TRAIN_LOSS
from cggr_ray.warmup import warm_up

CPU = torch.device("cpu")
FORMS = ("shared_logits", "heads", "trunk_heads", "sequential")
OWNING = FORMS[1:]
STEPS = 6


@pytest.fixture
def order(make_store: Callable[..., TokenStore]) -> RowOrder:
    rng = random.Random(0)
    return RowOrder([make_store([rng.randint(3, 60) for _ in range(60)])], (1.0,), (None,), 32, False, 2)


@pytest.fixture
def batches(order: RowOrder) -> list[Batch]:
    return batches_of(order, STEPS, 4, 2, CPU)


def learner_of(name: str | None, model: PreTrainedModel, **values: Any) -> Learner:
    objective = {"objective": {"kind": "multi_token", "form": {"kind": name}}} if name else {}
    recipe = Recipe("x").with_values(objective | {"optimizer.schedule.warmup_tokens": 100} | values)
    return Learner(recipe, Adapter(copy.deepcopy(model)), 4, 3600)


def train(learner: Learner, batches: list[Batch], first: int = 0) -> list[StepRow]:
    return [
        learner.step(batch, Progress(step, float(step), float(STEPS), 128 * (step + 1)))
        for step, batch in enumerate(batches[first:], first)
    ]


@pytest.mark.parametrize("name", FORMS)
def test_everything_learns_and_every_matrix_has_its_rule(
    name: str, tiny_model: PreTrainedModel, batches: list[Batch]
) -> None:
    learner = learner_of(name, tiny_model)
    own = dict(learner.objective.named_parameters())
    before = everything(learner)
    rows = train(learner, batches)
    assert all(not torch.equal(p, before[key]) for key, p in learner.named_parameters())
    groups = {
        group: {id(p) for key, stack in learner.optimizer.stacks.items() if key.startswith(group)
                for p in stack.parameters}
        for group in ("matrix.", "rest.")
    }  # fmt: skip
    for key, p in own.items():
        matrix = key.startswith("objective.layers.") and p.ndim == 2
        assert id(p) in groups["matrix." if matrix else "rest."], key
    count = sum(p.numel() for p in tiny_model.parameters()) + sum(p.numel() for p in own.values())
    assert {row.host_values[ROUTER_ACTIVE_PARAMS] for row in rows} == {float(count)} == {float(learner.parameters)}


@pytest.mark.parametrize("name", FORMS)
def test_a_step_reports_the_next_tokens_loss_and_what_is_beside_it(
    name: str, tiny_model: PreTrainedModel, batches: list[Batch]
) -> None:
    found, plain = learner_of(name, tiny_model), learner_of(None, tiny_model)
    row, expected = train(found, batches[:1])[0].device_values, train(plain, batches[:1])[0].device_values
    assert torch.equal(row[TRAIN_LOSS], expected[TRAIN_LOSS]) and AUXILIARY_LOSS not in expected
    # Two micro-batches make one: parts of the loss add up.
    joined = Batch(tuple(micro_of_all(batches[0])), batches[0].tokens)
    whole = train(learner_of(name, tiny_model), [joined])[0].device_values
    torch.testing.assert_close(row[AUXILIARY_LOSS], whole[AUXILIARY_LOSS], rtol=1e-4, atol=0)
    assert row[AUXILIARY_LOSS] > 0.1


def micro_of_all(batch: Batch) -> list[Any]:
    """The rows of two micro-batches in one."""
    a, b = batch.micros
    rows = {
        name: torch.cat([getattr(a, name), getattr(b, name)])
        for name in ("tokens_BT", "labels_BT", "positions_BT", "position_ids_BT")
    }
    starts = (rows["positions_BT"].flatten() == 0).nonzero().flatten()
    ends = torch.cat([starts, torch.tensor([rows["positions_BT"].numel()])]).int()
    return [replace(a, **rows, document_starts=ends, longest_document=rows["positions_BT"].shape[1])]


@pytest.mark.parametrize("name", FORMS)
def test_without_a_weight_the_model_is_trained_as_ever(
    name: str, tiny_model: PreTrainedModel, batches: list[Batch]
) -> None:
    """Bit for bit where nothing is clipped: more zeros round the norm in another order."""
    ends = {"objective.form.weight_end": 0.0} if name == "sequential" else {}
    weight = {"objective.form.weights": [0.0, 0.0]} if name == "shared_logits" else {"objective.form.weight": 0.0}
    found = learner_of(name, tiny_model, **weight, **ends, **{"optimizer.clip_norm": float("inf")})
    plain = learner_of(None, tiny_model, **{"optimizer.clip_norm": float("inf")})
    train(found, batches)
    train(plain, batches)
    for (key, p), q in zip(found.adapter.named_parameters(), plain.adapter.model.parameters(), strict=True):
        assert torch.equal(p, q), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_training_goes_on_exactly_where_it_was_saved(
    name: str, dtype: torch.dtype, tmp_path: Path, tiny_model: PreTrainedModel, batches: list[Batch]
) -> None:
    model = tiny_model.to(dtype)
    whole = learner_of(name, model)
    train(whole, batches[:3])
    saved = everything(whole)
    folder = checkpoint.save(tmp_path, 3, whole, {})
    train(whole, batches, 3)
    resumed = learner_of(name, model)
    train(resumed, batches[:1])
    checkpoint.load(folder, resumed)
    assert same(everything(resumed), saved)
    train(resumed, batches, 3)
    assert same(everything(resumed), everything(whole)) and not same(everything(whole), saved)


@pytest.mark.parametrize("name", FORMS)
def test_the_objectives_weights_lie_beside_the_models(name: str, tmp_path: Path, tiny_model: PreTrainedModel) -> None:
    learner = learner_of(name, tiny_model)
    folder = checkpoint.save(tmp_path, 1, learner, {})
    own = {key for key, _ in learner.objective.named_parameters()}
    assert bool(own) == (name in OWNING)
    assert load_file(folder / "objective.safetensors").keys() == own
    assert load_file(folder / "model.safetensors").keys() == {key for key, _ in tiny_model.named_parameters()}
    if own:
        with pytest.raises(ValueError, match="holds another objective: \\['objective\\."):
            checkpoint.load(folder, learner_of(None, tiny_model))


@pytest.mark.parametrize("name", OWNING)
def test_an_exported_model_is_an_ordinary_one(
    name: str, tmp_path: Path, tiny_model: PreTrainedModel, batches: list[Batch]
) -> None:
    learner = learner_of(name, tiny_model)
    train(learner, batches[:2])
    learner.adapter.model.save_pretrained(tmp_path, safe_serialization=True)
    saved, plain = load_file(tmp_path / "model.safetensors"), dict(tiny_model.named_parameters())
    assert saved.keys() == plain.keys() and all(saved[key].shape == p.shape for key, p in plain.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for (key, p), q in zip(learner.adapter.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), key


@pytest.mark.parametrize("name", FORMS)
def test_a_warm_up_leaves_no_trace(name: str, tiny_model: PreTrainedModel, order: RowOrder) -> None:
    learner = learner_of(name, tiny_model)
    before, steps = everything(learner), []
    rehearse = learner.rehearse
    learner.rehearse = lambda *args: steps.append(rehearse(*args))  # type: ignore[method-assign, func-returns-value]
    warm_up(learner, NoHeldOut(), order, 4, 2)  # type: ignore[arg-type]
    assert steps and same(everything(learner), before)


@pytest.mark.parametrize("name", FORMS)
def test_kept_positions_alone_with_every_form(name: str, tiny_model: PreTrainedModel, batches: list[Batch]) -> None:
    """Dense execution with a route, and kept rows where the form can do with them."""
    for plan in ("dense", "before") if name not in ("trunk_heads", "sequential") else ("dense",):
        tokens = {"kind": "random_tokens", "plan": plan, "keep": 0.5, "curriculum": {"target_at": 0.0}}
        rows = train(learner_of(name, tiny_model, tokens=tokens), batches[:2])
        assert all(value.isfinite().all() for row in rows for value in row.device_values.values())
        assert all(AUXILIARY_LOSS in row.device_values and TRAIN_LOSS not in row.device_values for row in rows)
