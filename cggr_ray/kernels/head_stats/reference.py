"""Statistics of the next-token distribution at every position, in float32: the definition, in plain PyTorch.

With z the logits, p = softmax(z), y the label, p_(1) >= p_(2) the two largest:

    lse = log sum e^z   nll = lse - z_y   entropy H = -sum p log p (nats)   confidence p_(1)   margin p_(1) - p_(2)
    gnorm = |p - e_y|_2 = sqrt((sum_{v != y} p_v)^2 + sum_{v != y} p_v^2)   correct: y is the argmax, as torch.argmax
                                                                            has it: the lowest of those that tie

gnorm and nll are summed without column y: 1 - 2 p_y + sum p^2 cancels, even below zero in float32, and lse - z_y loses
what a certain label leaves to the others. Shapes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A label this far below the largest logit has nll beyond it, where lse - z_y loses nothing.
FAR_BELOW = -30.0


class HeadStats(NamedTuple):
    """One float32 value a row; NaN where the row has no label, so that a selector that kept it would fail loudly.

    `correct` is bool, and False where the row has no label.
    """

    nll: Tensor
    entropy: Tensor
    confidence: Tensor
    margin: Tensor
    gnorm: Tensor
    lse: Tensor
    correct: Tensor


def soft_capped(logits_NV: Tensor, softcap: float | None) -> Tensor:
    """c tanh(z / c), or the logits themselves without a cap."""
    if softcap is None:
        return logits_NV
    return softcap * torch.tanh(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / softcap)


def chunk_stats(logits_NV: Tensor, labels_N: Tensor) -> HeadStats:
    """The statistics of rows of logits, in float64 for logits in float64. -inf is a token that cannot come."""
    labelled, target = labels_N >= 0, labels_N.clamp_min(0).unsqueeze(-1)
    logits = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    first, where_first = logits.max(-1)
    below = logits - first.unsqueeze(-1)
    e = below.exp()
    total = e.sum(-1)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    others = torch.where(columns == target, 0.0, e)
    rest = others.sum(-1)
    below_y = below.gather(-1, target).squeeze(-1)
    # Masking one position, not one value, keeps a tie for the largest as margin 0.
    second = torch.where(columns == where_first.unsqueeze(-1), -torch.inf, below).amax(-1)
    values = (
        torch.where(below_y < FAR_BELOW, total.log() - below_y, (rest / below_y.exp()).log1p()),
        total.log() - torch.where(e > 0, e * below, 0.0).sum(-1) / total,
        1 / total,
        (1 - second.exp()) / total,
        (rest.square() + others.square().sum(-1)).sqrt() / total,
        first + total.log(),
    )
    correct = labelled & (where_first == labels_N)
    return HeadStats._make([*(torch.where(labelled, value, torch.nan) for value in values), correct])
