"""What other people's loops do with the API beside its plain use, and the README's own loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import small_model
from torch import Tensor
from transformers import PreTrainedModel

from cggr_ray import CGGRModel, CGGRWrapper

ROOT = Path(__file__).resolve().parents[2]
ROWS, WIDTH, VOCABULARY = 3, 17, 96


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (ROWS, WIDTH), generator=torch.Generator().manual_seed(seed))


def selecting(model: PreTrainedModel, **options: Any) -> CGGRModel:
    return CGGRModel(model, **{"dynamic_threshold": False, "warmup_steps": 0, "min_tokens_ratio": 0.3} | options)


@pytest.mark.parametrize("count", [0, torch.tensor(0)])
def test_a_step_without_labels_changes_nothing(count: int | Tensor) -> None:
    """Every micro-batch of a step may be prompts alone: the count of its labels is then 0."""
    for wrap in (selecting, lambda m: CGGRModel(m, mode="sequence", warmup_steps=0), lambda m: CGGRWrapper(m)):
        model = small_model("llama")
        loss = wrap(model)(input_ids=tokens(), labels=torch.full((ROWS, WIDTH), -100), num_items_in_batch=count)
        loss.backward()
        assert loss.item() == 0
        assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
