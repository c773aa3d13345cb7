"""A small model, its batches and a loop of anybody's, for the tests of MatrixOptimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from small_models import CONFIGS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cggr_ray import AdamW, GaLore, Int8Blockwise, Muon

BOTH8 = Int8Blockwise()
RULES: dict[str, Callable[[], tuple[Muon | GaLore | AdamW, AdamW]]] = {
    "muon": lambda: (Muon(lr=0.01, weight_decay=0.1), AdamW(lr=0.01)),
    "muon_8bit": lambda: (Muon(lr=0.01, state=BOTH8), AdamW(lr=0.01, state=BOTH8)),
    "galore": lambda: (GaLore(Muon(lr=0.01), rank=4, refresh_every=3, smallest=8), AdamW(lr=0.01)),
    "galore_8bit": lambda: (
        GaLore(AdamW(lr=0.01, state=BOTH8), rank=4, refresh_every=3, smallest=8, basis=BOTH8),
        AdamW(lr=0.01, state=BOTH8),
    ),
}


def model_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS["llama"]()).to(dtype)


def batch(step: int) -> Tensor:
    return torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: Any, steps: range, after: Callable[[], object] = lambda: None) -> list[float]:
    losses = []
    for step in steps:
        loss = model(batch(step), labels=batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
