"""Difficulty scores: higher is harder, float32, one value a labelled position, -inf where there is no label.

`entropy` and `loss` are the plain quantities in nats; `entropy_confidence` is D_t = H - p_(1) of the CGGR whitepaper;
`margin` is 1 - (p_(1) - p_(2)); `combined` is upstream's default sum of D_t, margin and NLL, units mixed as there;
`gnorm` is the norm of the loss gradient at the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from cggr_ray.kernels.head_stats.op import HeadStats

ScoreName = Literal["entropy", "entropy_confidence", "margin", "loss", "combined", "gnorm"]

SCORES: dict[str, Callable[[HeadStats], Tensor]] = {
    "entropy": lambda s: s.entropy,
    "entropy_confidence": lambda s: s.entropy - s.confidence,
    "margin": lambda s: 1 - s.margin,
    "loss": lambda s: s.nll,
    "combined": lambda s: (s.entropy - s.confidence) + (1 - s.margin) + s.nll,
    "gnorm": lambda s: s.gnorm,
}
# The logged histogram: 24 bins of half a nat from -1; the first and last take what lies outside.
HISTOGRAM_START, HISTOGRAM_WIDTH, HISTOGRAM_BINS = -1.0, 0.5, 24


def score(name: ScoreName, stats: HeadStats) -> Tensor:
    """The score of every position, -inf where it has no label."""
    values = SCORES[name](stats)
    return torch.where(values.isnan(), -torch.inf, values)


def score_histogram(scores: Tensor) -> Tensor:
    """Counts of the labelled scores by bin, float32 of length HISTOGRAM_BINS."""
    flat = scores.flatten()
    labelled = flat > -torch.inf
    bins = ((flat - HISTOGRAM_START) / HISTOGRAM_WIDTH).clamp(0, HISTOGRAM_BINS - 1).long()
    return torch.zeros(HISTOGRAM_BINS, device=flat.device).index_add_(0, bins, labelled.float())


def histogram_edges() -> list[float]:
    return [HISTOGRAM_START + HISTOGRAM_WIDTH * i for i in range(HISTOGRAM_BINS + 1)]
