"""Statistics of the next-token distribution at every position, in float32: the definition, in plain PyTorch.

With p = softmax(z), y the label, p_(1) >= p_(2) the two largest:

    nll = lse - z_y     entropy H = -sum p log p (nats)     confidence p_(1)     margin p_(1) - p_(2)
    gnorm = |p - e_y|_2 = sqrt((sum_{v != y} p_v)^2 + sum_{v != y} p_v^2)

gnorm is summed without column y: 1 - 2 p_y + sum p^2 cancels, even below zero in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HeadStats(NamedTuple):
    """One float32 value a row; NaN where the row has no label, so that a selector that kept it would fail loudly."""

    nll: Tensor
    entropy: Tensor
    confidence: Tensor
    margin: Tensor
    gnorm: Tensor


def chunk_stats(logits_NV: Tensor, labels_N: Tensor) -> HeadStats:
    """The statistics of rows of logits."""
    logits = logits_NV.float()
    labelled, target = labels_N >= 0, labels_N.clamp_min(0).unsqueeze(-1)
    log_p = torch.log_softmax(logits, dim=-1)
    p = log_p.exp()
    columns = torch.arange(p.shape[-1], device=p.device)
    first, where_first = p.max(-1)
    # Masking one position, not one value, keeps a tie for the largest as margin 0.
    second = torch.where(columns == where_first.unsqueeze(-1), 0.0, p).amax(-1)
    others = torch.where(columns == target, 0.0, p)
    stats = HeadStats(
        nll=-log_p.gather(-1, target).squeeze(-1),
        entropy=-torch.where(p > 0, p * log_p, 0.0).sum(-1),
        confidence=first,
        margin=first - second,
        gnorm=(others.sum(-1).square() + others.square().sum(-1)).sqrt(),
    )
    return HeadStats(*(torch.where(labelled, value, torch.nan) for value in stats))
