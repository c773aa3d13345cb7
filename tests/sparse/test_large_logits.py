"""Attention logits in the thousands, bf16: what a backward computes again must be what its forward normalised."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from small_batches import packed
from test_plans import PLANS, oracle_gradients, plan_gradients, route_of
from transformers import LlamaConfig, LlamaForCausalLM

from cggr_ray.models.checkpointing import Checkpointing

CONFIG = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
MICRO = packed([[200], [120, 80]], 200, 3)
LABELLED = [[t for t, label in enumerate(labels) if label >= 0] for labels in MICRO.labels_BT.tolist()]
ROUTE = route_of(MICRO, [places[::3] for places in LABELLED], 80)


@cache
def large_llama() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG, num_attention_heads=4, use_cache=False))
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(150)
        layer.self_attn.k_proj.weight.data.mul_(150)
    return model


@cache
def exact(detach: str) -> float:
    return size(oracle_gradients(copy.deepcopy(large_llama()).double(), MICRO, ROUTE, detach == "const")[1])


def size(found: dict[str, torch.Tensor]) -> float:
    return torch.cat([gradient.double().flatten() for gradient in found.values()]).norm().item()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize("detach", ["const", "live"])
@pytest.mark.parametrize("plan", sorted(PLANS))
def test_gradients_are_of_the_size_they_have_in_float64(plan: str, detach: str, checkpointing: Checkpointing) -> None:
    """Which key a query sees alone turns on the last bit here, so that sizes are all that can be compared."""
    model = copy.deepcopy(large_llama()).bfloat16()
    assert size(plan_gradients(model, MICRO, ROUTE, plan, detach, checkpointing)[1]) < 100 * exact(detach)
