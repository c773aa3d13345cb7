"""A warm-up takes steps of every kind and leaves no trace: not in weights and state, nor in the steps after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_batches import batches_of
from small_learners import NoHeldOut, everything, same, values
from transformers import PreTrainedModel

from cggr_ray.data.batch import Batch
from cggr_ray.data.packing import RowOrder
from cggr_ray.data.store import TokenStore
from cggr_ray.learner import Learner
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress
from cggr_ray.recipe import Recipe
from cggr_ray.warmup import warm_up

STEPS, ROWS, MICRO_ROWS = 6, 4, 2
GALORE = {"kind": "galore", "rank": 4, "largest_fraction": 1.0, "smallest": 8, "refresh_every": 3}
EIGHT_BITS = {"kind": "muon", "state": {"kind": "int8_blockwise"}}
SUFFIX = {"kind": "random_suffix", "smallest": 0.25, "largest": 0.5, "levels": 2}
PROBE = {"kind": "selected_tokens", "keep": 0.5, "score": "loss", "router": {"kind": "probe", "layers": 1}}
RECIPES: dict[str, dict[str, Any]] = {
    "full": {"optimizer.rest.weight_decay": 0.1, "optimizer.matrix.row_beta": 0.9},
    "8 bits": {"optimizer.matrix": EIGHT_BITS},
    "low rank": {"optimizer.matrix": GALORE},
    "low rank, early": {"optimizer.matrix": GALORE, "optimizer.project_early": True},
    "low rank, corrected": {"optimizer.matrix": GALORE | {"full_rank": 0.5}},
    "layers rest": {"optimizer.matrix": GALORE, "updates": SUFFIX},
    "a router that learns": {"tokens": PROBE},
    "several tokens": {"objective": {"kind": "multi_token", "form": {"kind": "trunk_heads"}}},
}


@pytest.fixture
def order(make_store: Callable[..., TokenStore]) -> RowOrder:
    return RowOrder([make_store([20, 11, 32, 7, 30, 25, 9, 14], vocabulary=96)], (1.0,), (None,), 32, False, 2)


@pytest.fixture
def batches(order: RowOrder) -> list[Batch]:
    return batches_of(order, STEPS, ROWS, MICRO_ROWS, torch.device("cpu"))


def train(learner: Learner, batches: list[Batch], steps: range) -> list[dict[str, Any]]:
    """What these steps say."""
    return [values(learner.step(batches[n], Progress(n, n / STEPS, 1.0, 64 * n))) for n in steps]


@pytest.mark.usefixtures("small_tensors_in_8_bits")
@pytest.mark.parametrize("trained", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RECIPES)
def test_all_is_as_it_was(
    name: str, dtype: torch.dtype, trained: int, tiny_model: PreTrainedModel, order: RowOrder, batches: list[Batch]
) -> None:
    """At the start of a run and in the middle of one, where layers rest and averages are not zero."""
    recipe = Recipe("x").with_values({"optimizer.schedule.warmup_tokens": 100} | RECIPES[name])
    learner, twin = (Learner(recipe, Adapter(copy.deepcopy(tiny_model).to(dtype)), 4, 200) for _ in range(2))
    assert (name == "8 bits") == any(t.dtype == torch.int8 for t in learner.optimizer.state_dict().values())
    for one in (learner, twin):
        train(one, batches, range(trained))
    rest = range(trained, STEPS)
    before, host, rehearsed = everything(learner), copy.deepcopy(learner.state_dict()), []
    rehearse = learner.rehearse
    learner.rehearse = lambda *args: rehearsed.append(rehearse(*args))  # type: ignore[method-assign, func-returns-value]
    warm_up(learner, NoHeldOut(), order, ROWS, MICRO_ROWS, learner.levels())  # type: ignore[arg-type]
    assert len(rehearsed) == 2 * len(learner.levels())
    assert same(everything(learner), before) and learner.state_dict() == host
    assert train(learner, batches, rest) == train(twin, batches, rest)
    assert same(everything(learner), everything(twin)) and not same(everything(learner), before)
