"""Every optimizer compiled on a GPU against the same one eager, and Muon's direction there against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from on_gpu import DEVICE, DTYPE, tiny
from polar_oracle import published
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from cggr_ray.benchmarks.optimizers import OPTIMIZERS
from cggr_ray.models.adapter import Adapter
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.optimizer import Optimizer, StackedOptimizer
from cggr_ray.optim.polar import orthogonalise
from cggr_ray.progress import Progress
from cggr_ray.updates.schedule import Active

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIGS = OPTIMIZERS | {
    "normuon": Optimizer(Muon(row_beta=0.95, weight_decay=0.1, cautious=True)),
    "galore_corrected": Optimizer(GaLore(Muon(), refresh_every=3, full_rank=0.25)),
}
GPT2 = {"vocab_size": 128, "n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 64}
STEPS = 6
LEARNING: dict[str, Active] = {
    "every layer": (True,) * 4,
    "suffix": (False, False, True, True),
    "scattered": (True, False, True, False),
}


def build(model: PreTrainedModel, config: Optimizer, device: torch.device) -> StackedOptimizer:
    adapter = Adapter(model)
    return config.build(adapter.named_parameters(), adapter.hidden_names(), device, fused=adapter.fused_names())


def gpt2() -> PreTrainedModel:
    """Four layers whose queries, keys and values are in one matrix."""
    config = GPT2Config(**GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(device=DEVICE, dtype=DTYPE)


def trained(
    config: Optimizer, device: torch.device, active: Active, make: Callable[[], PreTrainedModel]
) -> StackedOptimizer:
    """The optimizer of a bf16 model after some steps of random gradients of the layers that learn. With the CPU as
    `device` it is eager, with its rates there, although the model is on the GPU."""
    model = make()
    optimizer = build(model, config, device)
    Adapter(model).set_active_layers(active)
    g = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=g).to(parameter)
            parameter.grad = gradient if parameter.requires_grad else None
        optimizer.step(Progress(step, float(step), 1e3, 10**8))
    return optimizer


# With the correction of GaLore's bias layers do not rest.
CASES = [
    (name, which) for name in CONFIGS for which in LEARNING if name != "galore_corrected" or which == "every layer"
]


@pytest.mark.parametrize("name, which", CASES)
@pytest.mark.parametrize("make", [tiny, gpt2])
def test_compiled_updates_are_those_of_the_eager_optimizer(
    make: Callable[[], PreTrainedModel], name: str, which: str
) -> None:
    config = replace(CONFIGS[name], project_early=False)
    compiled, eager = (trained(config, device, LEARNING[which], make) for device in (DEVICE, torch.device("cpu")))
    start = {key: stack.master.clone() for key, stack in build(make(), config, DEVICE).stacks.items()}
    for key, stack in compiled.stacks.items():
        mine, theirs = (other.stacks[key].master - start[key] for other in (compiled, eager))
        assert (mine - theirs).norm() <= 0.02 * theirs.norm() and theirs.norm() > 0, key
        for part, value in stack.state.items():
            other = eager.stacks[key].state[part]
            assert value.dtype == other.dtype and value.shape == other.shape
            if part.endswith(".codes"):
                # A value near the middle between two codes may go either way.
                assert ((value.int() - other.int()).abs() > 1).float().mean() < 0.01, (key, part)


@pytest.mark.parametrize("method", ["newton_schulz", "polar_express"])
@pytest.mark.parametrize("decay", [0.0, 1.0])
@pytest.mark.parametrize("length", [1e-6, 1.0, 1e9])
def test_a_direction_is_exact_for_gradients_of_any_length(length: float, decay: float, method: str) -> None:
    g = torch.Generator().manual_seed(2)
    left, _, right = torch.linalg.svd(torch.randn(512, 1536, generator=g), full_matrices=False)
    matrix = (length * left * torch.arange(1, 513) ** -decay @ right).bfloat16()
    found, expected = orthogonalise(matrix[None].to(DEVICE), method)[0].cpu().double(), published(matrix, method)
    assert (found - expected).norm() <= 0.01 * expected.norm()
