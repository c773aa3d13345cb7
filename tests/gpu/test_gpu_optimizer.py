"""Every optimizer compiled on a GPU against the same one eager."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from on_gpu import DEVICE, tiny
from transformers import PreTrainedModel

from cggr_ray.benchmarks.optimizers import OPTIMIZERS
from cggr_ray.models.adapter import Adapter
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.optimizer import Optimizer, StackedOptimizer
from cggr_ray.progress import Progress

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIGS = OPTIMIZERS | {"normuon": Optimizer(Muon(row_beta=0.95, weight_decay=0.1, cautious=True))}
STEPS = 6


def build(model: PreTrainedModel, config: Optimizer, device: torch.device) -> StackedOptimizer:
    adapter = Adapter(model)
    return config.build(adapter.named_parameters(), adapter.hidden_names(), device)


def trained(config: Optimizer, device: torch.device) -> StackedOptimizer:
    """The optimizer of a bf16 model after some steps of random gradients. On a `device` that is the CPU it is eager,
    with its rates there, although the model is on the GPU."""
    model = tiny()
    optimizer = build(model, config, device)
    g = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=g).to(parameter)
        optimizer.step(Progress(step, float(step), 1e3, 10**8))
    return optimizer


@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_updates_are_those_of_the_eager_optimizer(name: str) -> None:
    config = replace(CONFIGS[name], project_early=False)
    compiled, eager = (trained(config, device) for device in (DEVICE, torch.device("cpu")))
    start = {key: stack.master.clone() for key, stack in build(tiny(), config, DEVICE).stacks.items()}
    for key, stack in compiled.stacks.items():
        mine, theirs = (other.stacks[key].master - start[key] for other in (compiled, eager))
        assert (mine - theirs).norm() <= 0.02 * theirs.norm() and theirs.norm() > 0, key
        for part, value in stack.state.items():
            other = eager.stacks[key].state[part]
            assert value.dtype == other.dtype and value.shape == other.shape
            if part.endswith(".codes"):
                # A value near the middle between two codes may go either way.
                assert ((value.int() - other.int()).abs() > 1).float().mean() < 0.01, (key, part)
