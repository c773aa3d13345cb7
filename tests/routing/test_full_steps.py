"""Full steps in between: which ones they are, by counting, and that they are the full steps of a run without them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_batches import batches_of
from small_models import small_model
from transformers import PreTrainedModel

from cggr_ray.data.batch import Batch
from cggr_ray.data.packing import RowOrder
from cggr_ray.data.store import TokenStore
from cggr_ray.learner import Learner
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress
from cggr_ray.recipe import Recipe
from cggr_ray.routing.collider import Collider
from cggr_ray.routing.curriculum import Curriculum, DynamicThreshold
from cggr_ray.routing.rows import HardestRows, RandomRows
from cggr_ray.routing.scorers import Setting
from cggr_ray.routing.tokens import RandomTokens, SelectedTokens, SkippedTokens
from cggr_ray.schema import KEPT_LOSS, ROUTER_KEPT_FRACTION, TRAIN_LOSS

STEPS, EVERY = 8, 3
SETTING = Setting(torch.device("cpu"), num_layers=4, width=32, num_positions=1000)
PARTS: list[Any] = [
    SelectedTokens(0.25),
    SelectedTokens(0.25, dynamic=DynamicThreshold()),
    RandomTokens(0.25),
    SkippedTokens(0.25),
    Collider(0.25),
    HardestRows(0.25, layers=1),
    RandomRows(0.25),
]


def at(step: int, fraction: float = 0.5) -> Progress:
    return Progress(step, 100 * fraction, 100.0, 10**6)


@pytest.mark.parametrize("every", [2, 3, 8])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_the_last_of_every_so_many_steps_is_full(part: Any, every: int) -> None:
    part = replace(part, curriculum=Curriculum(0.0, 0.0, 1.0, every))
    rows = isinstance(part, HardestRows | RandomRows)
    built = part.build(0, Adapter(small_model("llama")) if rows else SETTING)
    expected = ([0.25] * (every - 1) + [1.0]) * 10
    assert [built.ratio(at(step)) for step in range(len(expected))] == expected
    # All that a step may be is compiled, and has to fit, before the run.
    assert {*expected} <= {*built.levels()}


def test_they_leave_the_rest_of_the_curriculum_alone() -> None:
    plain = Curriculum(0.2, 0.6, 0.9)
    paced = replace(plain, full_every=4)
    for step in range(40):
        now = at(step, step / 40)
        assert paced.ratio(0.5, now) == (1.0 if step in range(3, 40, 4) else plain.ratio(0.5, now))


@pytest.fixture
def batches(make_store: Callable[..., TokenStore]) -> list[Batch]:
    rng = random.Random(0)
    store = make_store([rng.randint(3, 60) for _ in range(30)])
    return batches_of(RowOrder([store], (1.0,), (None,), 32, True, 2), STEPS, 4, 2, torch.device("cpu"))


@pytest.mark.parametrize("plan", ["dense", "after", "two_pass"])
def test_they_are_the_full_steps_of_a_run_that_is_told_so(
    plan: str, tiny_model: PreTrainedModel, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told step by step at what level to run, without a period: the same losses and the same weights to the bit."""
    tokens = {"kind": "selected_tokens", "keep": 0.5, "score": "loss", "plan": plan}
    learners = []
    for curriculum in ({"target_at": 0.0, "full_every": EVERY}, {"target_at": 0.0}):
        values = {"tokens": tokens | {"curriculum": curriculum}, "optimizer.schedule.warmup_tokens": 100}
        learners.append(Learner(Recipe("x").with_values(values), Adapter(copy.deepcopy(tiny_model)), 4, 10**4))
    paced, told = learners
    for step, batch in enumerate(batches):
        full, now = step in (2, 5), at(step, step / STEPS)
        monkeypatch.setattr(told.router, "ratio", lambda progress, ratio=1.0 if full else 0.5: ratio)
        found, expected = paced.step(batch, now), told.step(batch, now)
        name = TRAIN_LOSS if full else KEPT_LOSS
        assert found.device_values[name] == expected.device_values[name]
        kept = found.device_values[ROUTER_KEPT_FRACTION].item()
        assert kept == 1 if full else 0.4 < kept < 0.7
    for (name, a), (_, b) in zip(paced.named_parameters(), told.named_parameters(), strict=True):
        assert torch.equal(a, b), name
