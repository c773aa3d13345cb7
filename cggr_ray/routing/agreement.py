"""How well a router's scores agree with the model's own: rank correlation, and how many of the hardest it finds.

A router whose recall at k is near the kept ratio selects by chance.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spearman(first_BT: Tensor, second_BT: Tensor) -> Tensor:
    """Spearman's rank correlation over the positions where both are finite, ties by index. 0-d float32."""
    both = first_BT.isfinite() & second_BT.isfinite()
    ranks = [_ranks(torch.where(both, scores, torch.inf).flatten()) for scores in (first_BT, second_BT)]
    weight = both.flatten().double()
    count = weight.sum()
    a, b = ((rank - (count - 1) / 2) * weight for rank in ranks)
    return ((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()).float()


def recall_at_k(found_BT: Tensor, own_BT: Tensor) -> Tensor:
    """The share of the positions kept by the model's own scores that the router keeps too; boolean masks, 0-d."""
    return (found_BT & own_BT).sum() / own_BT.sum().clamp_min(1)


def _ranks(scores_N: Tensor) -> Tensor:
    order = scores_N.argsort(stable=True)
    places = torch.arange(len(order), device=order.device, dtype=torch.float64)
    return torch.empty_like(places).scatter_(0, order, places)
