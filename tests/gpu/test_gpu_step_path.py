"""Learner.step of the recipes: nothing on it waits for the device, launch by launch or through graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_gpu import DEVICE, POSITIONS, ROWS, batches_of, no_waiting, tiny, warmed

from cggr_ray.data.packing import RowOrder
from cggr_ray.learner import Learner, Levels
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress
from cggr_ray.recipe import load_recipe
from cggr_ray.schema import AUXILIARY_LOSS, GRAD_NORM, ROUTER_SPEARMAN

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# What a model of four layers can do.
RECIPES: dict[str, dict[str, Any]] = {
    "baseline": {},
    "random_tokens": {},
    "cggr_loss": {},
    "cggr_importance": {},
    "cggr_importance_sparse": {},
    "cggr_model": {"tokens.router.layers": 2},
    "cggr_seed": {"tokens.router.layers": 2},
    "cggr_skip": {"tokens.entry": 1, "tokens.exit": 1},
    "cggr_wrapper": {},
    "mtp_shared_logits": {},
    "mtp_heads": {},
    "mtp_trunk_heads": {},
    "mtp_sequential": {},
    "collider": {},
    "muon_8bit": {},
    "galore": {"optimizer.matrix.refresh_every": 2},
    "static_suffix": {"updates.full_until": 0.2},
    "dynamic_suffix_seed": {
        "updates.full_until": 0.0,
        "updates.threshold": 0.3,
        "updates.cadence": {"first": 2, "shortest": 2, "longest": 2},
    },
    "random_suffix": {"updates.every": 1, "updates.full_until": 0.0},
}
# Those whose layers rest: more of what a step may run at.
RESTING = {"static_suffix", "dynamic_suffix_seed", "random_suffix"}
ONE_LEVEL = {"baseline", "collider", "muon_8bit", "galore", *(name for name in RECIPES if name.startswith("mtp_"))}
# The start, the middle, a step that compares a router with the model's own scores, the end.
STEPS = [Progress(step, used, 1.0, 10**6) for step, used in ((1, 0.0), (2, 0.3), (3, 0.3), (64, 0.3), (65, 0.9))]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_nothing_waits_after_the_warm_up(name: str, graphs: bool, order: RowOrder) -> None:
    recipe = load_recipe(name).with_values(RECIPES[name] | {"execution.cuda_graphs": graphs})
    learner = Learner(recipe, Adapter(tiny()), 7, POSITIONS)
    if name in RESTING:
        levels = learner.levels()
    else:
        levels = sorted(
            {Levels(learner.rows.ratio(at), learner.router.ratio(at), learner.updates.begin(at)) for at in STEPS}
        )
        assert len(levels) == (1 if name in ONE_LEVEL else 2)
    batches = batches_of(order, len(STEPS), ROWS // 2)
    weights = [p.detach().clone() for _, p in learner.named_parameters()]
    warmed(learner, levels, order, ROWS // 2)
    after = [p for _, p in learner.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, weights, strict=True))
    torch.cuda.synchronize()
    with no_waiting():
        rows = [learner.step(batch, progress) for batch, progress in zip(batches, STEPS, strict=True)]
    assert all(row.device_values[GRAD_NORM] > 0 for row in rows)
    assert all(value.isfinite().all() for row in rows for value in row.device_values.values())
    compared = [step.step for step, row in zip(STEPS, rows, strict=True) if ROUTER_SPEARMAN in row.device_values]
    assert compared == ([64] if name in ("cggr_model", "cggr_seed") else [])


@pytest.mark.parametrize("graphs", [False, True])
def test_weights_that_fade_are_read_where_they_are(graphs: bool, order: RowOrder) -> None:
    recipe = load_recipe("mtp_shared_logits").with_values({"execution.cuda_graphs": graphs})
    learner = Learner(recipe, Adapter(tiny()), 7, POSITIONS)
    warmed(learner, learner.levels(), order, ROWS)
    early, late = batches_of(order, 2)
    beside = [
        learner.step(batch, Progress(step, used, 1.0, 10**6)).device_values[AUXILIARY_LOSS].item()
        for step, (batch, used) in enumerate(((early, 0.0), (late, 0.9)))
    ]
    assert beside[0] > 1 and abs(beside[1]) < 1e-4


def test_waiting_is_noticed() -> None:
    """Else the tests above would say nothing."""
    values = torch.ones(4, device=DEVICE)
    for waits in (lambda: values.sum().item(), lambda: values.nonzero(), lambda: torch.cuda.synchronize()):
        with pytest.raises((RuntimeError, AssertionError)), no_waiting():
            waits()
    assert torch.cuda.get_sync_debug_mode() == 0
