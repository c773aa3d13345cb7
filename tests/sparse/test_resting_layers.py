"""Layers that rest: the others get the same gradient, and below the lowest that learns nothing is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from small_models import CONFIGS, small_model
from test_plans import PLANS, ROUTES, Tensor, assert_same
from torch import nn
from transformers import PreTrainedModel

from cggr_ray.models.adapter import Adapter
from cggr_ray.models.checkpointing import Checkpointing
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.sparse.layers import Detach
from cggr_ray.sparse.plan import Dense, Skip

MICRO, ROUTE = ROUTES["packed rows, empty slots"]
RESTING = [(False, True, True), (False, False, True), (True, False, True)]
MAKE: dict[str, tuple[Callable[[Adapter, Detach], Any], int]] = {
    "dense": (lambda adapter, detach: Dense(adapter), 3),
    "skip": (lambda adapter, detach: Skip(adapter, 1, 1), 1),
    **{name: (make, 3 if reads is None else reads) for name, (make, reads) in PLANS.items()},
}


def learned(
    model: PreTrainedModel, plan: str, detach: Detach, active: Sequence[bool], checkpointing: Checkpointing = "none"
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """(loss, gradients), None where a parameter has none."""
    adapter = Adapter(model, checkpointing)
    adapter.set_active_layers(active)
    make, reads = MAKE[plan]
    planned = make(adapter, detach).forward(MICRO, reads, lambda seen: ROUTE)
    loss = NextToken().loss(planned.stream, MICRO, planned.route, torch.tensor(1 / MICRO.labelled))
    loss.total.backward()
    return loss.reported, {name: p.grad for name, p in model.named_parameters()}


def check(family: str, plan: str, detach: Detach, active: Sequence[bool], checkpointing: Checkpointing) -> None:
    model, whole = small_model(family), small_model(family)
    if not active[0]:
        # A constant as the embedding is all that a first layer at rest means for a head that is tied to it.
        whole.get_input_embeddings().register_forward_hook(lambda module, args, out: out.detach())
        if family == "gpt2":
            whole.transformer.wpe.register_forward_hook(lambda module, args, out: out.detach())
    loss, found = learned(model, plan, detach, active, checkpointing)
    expected_loss, expected = learned(whole, plan, detach, [True] * 3)
    adapter = Adapter(whole)
    resting = {id(p) for i, learns in enumerate(active) if not learns for p in adapter.layer_parameters(i)}
    names = {name for name, p in whole.named_parameters() if id(p) in resting}
    assert {name for name, gradient in found.items() if gradient is None} == names
    kept = {name: g for name, g in expected.items() if name not in names and g is not None}
    assert_same((loss, {name: g for name, g in found.items() if g is not None}), (expected_loss, kept))


@pytest.mark.parametrize("active", RESTING, ids=str)
@pytest.mark.parametrize("plan", MAKE)
@pytest.mark.parametrize("family", CONFIGS)
def test_the_others_learn_the_same(family: str, plan: str, active: Sequence[bool]) -> None:
    check(family, plan, "const", active, "none")


@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
@pytest.mark.parametrize("active", RESTING, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_others_learn_the_same_with_live_constants(
    family: str, plan: str, active: Sequence[bool], checkpointing: Checkpointing
) -> None:
    check(family, plan, "live", active, checkpointing)


def saved_inside(modules: Sequence[nn.Module], run: Callable[[], Any]) -> int:
    """Tensors that autograd saves while one of the modules runs."""
    inside, saved = [0], [0]

    def pack(tensor: Tensor) -> Tensor:
        saved[0] += inside[0] > 0
        return tensor

    handles = [m.register_forward_pre_hook(lambda *_: inside.__setitem__(0, inside[0] + 1)) for m in modules]
    handles += [m.register_forward_hook(lambda *_: inside.__setitem__(0, inside[0] - 1)) for m in modules]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    for handle in handles:
        handle.remove()
    return saved[0]


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("plan", MAKE)
@pytest.mark.parametrize("family", ["llama", "mistral"])  # tied, and not
def test_nothing_is_kept_below(family: str, plan: str, checkpointing: Checkpointing) -> None:
    def saved(active: Sequence[bool]) -> int:
        model = small_model(family)
        below = [model.get_input_embeddings(), *model.model.layers[:2]]
        return saved_inside(below, lambda: learned(model, plan, "const", active, checkpointing))

    assert saved([False, False, True]) == 0
    # Plans for kept rows run the layers that learn by their weights, not as modules: there the embedding is what tells.
    assert saved([True, True, True]) > 0
