"""Buckets of depth: how many layers, counted from the top, learn from a position (CGGRWrapper).

With rho the rank of a labelled position among the N of its row, ascending in difficulty, and L layers:

    bucket   b = (B - 1) - floor(rho B / N)          0 is the hardest; each has N / B positions up to rounding
    kept     keep_b = floor(L (B - b) / B)           layers cut_b + 1 .. L - 1 learn, cut_b = L - keep_b - 1
    so far   min(b, floor(p (B - 1)))                p grows to 1: full depth for all, then one bucket more at a time

Shapes: B rows, T positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cggr_ray.kernels.select.op import rank_classes


def depth_buckets(scores_BT: Tensor, labelled_B: Tensor, num_buckets: int) -> Tensor:
    """The bucket of every position, int32; of equal scores the lower index is the harder. No host sync.

    Unlabelled positions (score -inf) are in the easiest bucket. A labelled NaN is the easiest of the labelled ones, so
    that the counts hold in a diverging model too.
    """
    keys = torch.where(scores_BT.isnan(), torch.finfo(torch.float32).min, scores_BT)
    # b >= m exactly where the descending rank N - 1 - rho reaches floor(m N / B).
    edges = torch.arange(1, num_buckets, device=keys.device)
    return rank_classes(keys, (edges * labelled_B.unsqueeze(1)).div(num_buckets, rounding_mode="floor"))


def deepest_bucket(num_buckets: int, p: float) -> int:
    """The easiest bucket that is told apart once the share p of the curriculum has passed."""
    return math.floor(min(max(p, 0.0), 1.0) * (num_buckets - 1))


def keep_layers(num_layers: int, num_buckets: int) -> list[int]:
    """Layers that learn from a position, by bucket; with fewer layers than buckets the easiest keep none."""
    if num_layers < 1 or num_buckets < 1:
        raise ValueError(f"num_layers = {num_layers}, num_buckets = {num_buckets}; accepted: at least 1 of both")
    return [num_layers * (num_buckets - b) // num_buckets for b in range(num_buckets)]


def cut_layers(num_layers: int, num_buckets: int) -> list[int]:
    """The highest layer that does not learn from a position, by bucket; -1 where all do."""
    return [num_layers - keep - 1 for keep in keep_layers(num_layers, num_buckets)]
