"""Batches for models of every family, and calls of CGGRModel on them."""

from __future__ import annotations

from typing import Any

import torch
from small_models import CONFIGS
from torch import Tensor, nn
from transformers import PreTrainedModel

from cggr_ray import CGGRModel

ROTARY = [name for name in CONFIGS if name != "gpt2"]
ROWS, WIDTH, VOCABULARY = 3, 17, 96
Batch = dict[str, Tensor]


def batch(padding: str = "none", seed: int = 0) -> Batch:
    """Input ids, mask and labels as a collator makes them; a left-padded row has no label for its first token."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (ROWS, WIDTH), generator=g)
    labels = torch.where(torch.rand(ROWS, WIDTH, generator=g) < 0.15, -100, tokens)
    if padding == "none":
        return {"input_ids": tokens, "labels": labels}
    mask = torch.ones_like(tokens)
    for row, pads in enumerate((4, 0, 9)):
        places = slice(0, pads) if padding == "left" else slice(WIDTH - pads, WIDTH)
        mask[row, places] = 0
        labels[row, places] = -100
        if padding == "left":
            labels[row, pads] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def packed() -> Batch:
    """Rows of documents; the first label of each is left out, as collators of packed rows do."""
    found = batch()
    positions = torch.cat([torch.arange(n) for n in (5, 11, 1)]), torch.arange(17), torch.arange(17) % 6
    found["position_ids"] = torch.stack(positions)
    found["labels"] = torch.where(found["position_ids"] == 0, -100, found["labels"])
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(gradient.norm().item() for gradient in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm().item()
        assert error <= 1e-5 * max(gradient.norm().item(), 0.05 * largest), name


def keep_all(model: PreTrainedModel, **options: Any) -> CGGRModel:
    return CGGRModel(model, **{"dynamic_threshold": False} | options)


def selecting(model: PreTrainedModel, ratio: float = 0.3, **options: Any) -> CGGRModel:
    return CGGRModel(model, **{"dynamic_threshold": False, "warmup_steps": 0, "min_tokens_ratio": ratio} | options)


CASES = [(family, padding) for family in CONFIGS for padding in ("none", "right", "packed")]
