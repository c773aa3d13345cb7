"""Difficulty scores: higher is harder, float32, one value a labelled position, -inf where there is no label.

`entropy` and `loss` are the plain quantities in nats; `entropy_confidence` is D_t = H - p_(1) of the CGGR whitepaper;
`margin` is 1 - (p_(1) - p_(2)); `combined` is upstream's default sum of D_t, margin and NLL, units mixed as there;
`gnorm` is the norm of the loss gradient at the logits; `surprise` is NLL - H, which a calibrated model has around 0.
`combined_rank` is the mean of the percentile ranks of the terms of `combined`, so that each counts alike.
Two read more than the head's statistics: `excess` is NLL - NLL of a reference model (Rho-1, arXiv 2404.07965), and
`random`, a uniform draw, is the control that costs exactly what a score costs.
Shapes: B rows that positions have their ranks in, of T positions; N = B T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cggr_ray.kernels.head_stats.op import HeadStats

HeadScore = Literal["entropy", "entropy_confidence", "margin", "loss", "combined", "gnorm", "surprise", "combined_rank"]
ScoreName = Literal[HeadScore, "random", "excess"]

SCORES: dict[str, Callable[[HeadStats], Tensor]] = {
    "entropy": lambda s: s.entropy,
    "entropy_confidence": lambda s: s.entropy - s.confidence,
    "margin": lambda s: 1 - s.margin,
    "loss": lambda s: s.nll,
    "combined": lambda s: (s.entropy - s.confidence) + (1 - s.margin) + s.nll,
    "gnorm": lambda s: s.gnorm,
    "surprise": lambda s: s.nll - s.entropy,
}
TERMS: tuple[HeadScore, ...] = ("entropy_confidence", "margin", "loss")
HISTOGRAM_BINS = 24


class Bins(NamedTuple):
    """Equal bins of a logged histogram, from `start` on; the first and last take what lies outside."""

    start: float
    width: float

    def counts(self, values: Tensor) -> Tensor:
        """How many values lie in each bin, float32 of length HISTOGRAM_BINS; -inf is no value."""
        flat = values.flatten()
        known = flat > -torch.inf
        bins = ((flat - self.start) / self.width).clamp(0, HISTOGRAM_BINS - 1).long()
        # Not added up by index: all of them to a few addresses would wait for one another.
        return (known[:, None] & (bins[:, None] == torch.arange(HISTOGRAM_BINS, device=flat.device))).sum(0).float()

    @property
    def edges(self) -> list[float]:
        return [self.start + self.width * i for i in range(HISTOGRAM_BINS + 1)]


# Each covers what its score can be at 60,000 tokens and more: `combined` is up to 2 log V + 1, shares up to 1.
NATS, DIFFERENCES, SHARES = Bins(-1.0, 0.5), Bins(-9.0, 0.75), Bins(0.0, 1 / 16)
SCORE_BINS: dict[ScoreName, Bins] = {
    **dict.fromkeys(("entropy", "entropy_confidence", "loss"), NATS),
    **dict.fromkeys(("surprise", "excess"), DIFFERENCES),
    **dict.fromkeys(("margin", "gnorm", "combined_rank", "random"), SHARES),
    "combined": Bins(-1.0, 1.25),
}


def score(
    name: ScoreName,
    stats: HeadStats,
    reference_N: Tensor | None = None,
    generator: torch.Generator | None = None,
    rows: int = 1,
) -> Tensor:
    """The score of every position, -inf where it has no label.

    Args:
        reference_N: what a reference model loses there; for `excess`. generator: of the draws; for `random`.
        rows: of equal length, whose positions are compared with one another; for `combined_rank`.
    """
    if name == "random":
        assert generator is not None, "draws of a run depend on its seed"
        draw = torch.rand(stats.nll.shape, generator=generator, device=stats.nll.device)
        values = torch.where(stats.nll.isnan(), torch.nan, draw)
    elif name == "excess":
        assert reference_N is not None, "no reference"
        values = stats.nll - reference_N
    elif name == "combined_rank":
        values = mean_rank([SCORES[term](stats).view(rows, -1) for term in TERMS]).flatten()
    else:
        values = SCORES[name](stats)
    return torch.where(values.isnan(), -torch.inf, values).float()


def mean_rank(terms_BT: list[Tensor]) -> Tensor:
    """The mean of each position's percentile ranks in its row, from 0 to 1: the share of positions below, and half of
    those that are equal, itself included. NaN where a term is, which no rank counts."""
    missing = torch.stack(terms_BT).isnan().any(0)
    count = (~missing).sum(1, keepdim=True)
    twice = torch.zeros_like(count)
    for term in terms_BT:
        # What is missing comes last, beside what is infinite.
        keys = torch.where(missing, torch.inf, term).contiguous()
        ordered = keys.sort(1).values
        ends = [torch.searchsorted(ordered, keys, right=right) for right in (False, True)]
        twice = twice + ends[0] + ends[1].minimum(count)
    # Whole numbers until here: means that are equal have equal bits.
    return torch.where(missing, torch.nan, twice.double() / (2 * len(terms_BT) * count.clamp_min(1)))
