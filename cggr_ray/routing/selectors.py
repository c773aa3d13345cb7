"""Selections: which positions of a row are kept, given their scores. Exactly `keep` a row, deterministic, no host sync.

A selector returns a mask_BT with exactly keep_B true entries a row, and the probability with which each position was
kept where it draws at random (else None). Unlabelled positions have score -inf and are never kept.
Shapes: B rows, T positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cggr_ray.kernels.select.op import rank_classes


class Selection(NamedTuple):
    mask_BT: Tensor
    probability_BT: Tensor | None


def without_tails(scores_BT: Tensor, labelled_B: Tensor, easiest: float, hardest: float) -> tuple[Tensor, Tensor]:
    """(scores without the easiest and the hardest parts of each row, rounded down, which become -inf; how many are
    left). What is hardest of all is often noise in the labels, and what is easiest has no gradient (arXiv 2404.07965).
    """
    low, high = ((part * labelled_B.double() + 1e-9).floor().long() for part in (easiest, hardest))
    inside = rank_classes(scores_BT, torch.stack([high, labelled_B - low], dim=1)) == 1
    return torch.where(inside, scores_BT, -torch.inf), labelled_B - low - high


def top_k(scores_BT: Tensor, keep_B: Tensor) -> Selection:
    """The keep_B hardest positions of each row."""
    return Selection(rank_classes(scores_BT, keep_B.unsqueeze(1)) == 0, None)


def sequence_aware(scores_BT: Tensor, keep_B: Tensor, documents_BT: Tensor, minimum: int) -> Selection:
    """Top-k that first gives every document its `minimum` hardest positions, as far as keep_B allows.

    Differs from upstream, which adds these on top, so that its count is not fixed.
    """
    by_score = scores_BT.sort(dim=1, descending=True, stable=True).indices
    by_document = documents_BT.gather(1, by_score).sort(dim=1, stable=True)
    order = by_score.gather(1, by_document.indices)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    new = torch.ones_like(order, dtype=torch.bool)
    new[:, 1:] = by_document.values[:, 1:] != by_document.values[:, :-1]
    first = torch.where(new, places, 0).cummax(dim=1).values
    within = torch.empty_like(order).scatter_(1, order, places - first)
    reserved = (within < minimum) & (scores_BT > -torch.inf)
    # Reserved positions come before all others; among themselves, and among the rest, the score decides.
    others = (~reserved).to(torch.int32)
    return Selection(rank_classes(scores_BT, keep_B.unsqueeze(1), others, num_groups=2) == 0, None)


def stratified(
    scores_BT: Tensor,
    keep_B: Tensor,
    labelled_B: Tensor,
    strata: int,
    generator: torch.Generator,
    every_stratum: bool = False,
) -> Selection:
    """Uniform draws from quantiles of difficulty; the hardest of S strata gets S parts, the easiest one part.

    Quotas are whole numbers (largest remainder); what a stratum cannot hold flows to the next easier one, then back.
    Weights of 1/pi are unbiased only if every position can be drawn, which short rows break: `every_stratum` gives each
    stratum that has members at least one draw, and a row that keeps fewer than it has strata is drawn from as a whole.
    Upstream takes the top of each stratum instead, as `stratified_top`.
    """
    starts_BS, quota_BS = strata_plan(keep_B, labelled_B, strata, every_stratum)
    size_BS, bounds = starts_BS.diff(dim=1), quota_bounds(starts_BS, quota_BS)
    stratum = rank_classes(scores_BT, starts_BS[:, 1:-1])
    # Unlabelled positions are a last group of their own, past every quota.
    labelled = scores_BT > -torch.inf
    groups = torch.where(labelled, stratum, strata)
    # Two equal draws (24 bits each) go to the lower index, which moves pi by less than 1e-7.
    draw = torch.rand(scores_BT.shape, generator=generator, device=scores_BT.device)
    # Ranks by stratum, then by draw.
    kept = rank_classes(-draw, bounds, groups, num_groups=strata + 1) % 2 == 1
    quota, size = quota_BS.gather(1, stratum.long()), size_BS.gather(1, stratum.long())
    return Selection(kept & labelled, quota / size.clamp_min(1))


def stratified_top(scores_BT: Tensor, keep_B: Tensor, labelled_B: Tensor, strata: int) -> Selection:
    """The hardest of each quantile of difficulty, by the quotas of `stratified`: upstream's rule, without chance.

    Differs from upstream, whose quotas lose what a stratum cannot hold (a ratio of 1 keeps four fifths), and which on a
    GPU never reads the easiest stratum.
    """
    bounds = quota_bounds(*strata_plan(keep_B, labelled_B, strata, every_stratum=False))
    return Selection((rank_classes(scores_BT, bounds) % 2 == 1) & (scores_BT > -torch.inf), None)


def quota_bounds(starts_BS: Tensor, quota_BS: Tensor) -> Tensor:
    """Ranks between which a position is kept, two a stratum: `rank_classes` gives it an odd class."""
    return torch.stack([starts_BS[:, :-1], starts_BS[:, :-1] + quota_BS], dim=2).flatten(1)


def strata_plan(keep_B: Tensor, labelled_B: Tensor, strata: int, every_stratum: bool) -> tuple[Tensor, Tensor]:
    """(first rank of every stratum and the end of the last, (B, S + 1); draws from each, (B, S))."""
    keep, count = keep_B.unsqueeze(1), labelled_B.unsqueeze(1)
    edges = torch.arange(strata + 1, device=keep.device)
    starts_BS = (edges * count + strata - 1).div(strata, rounding_mode="floor")
    if every_stratum:
        whole = keep < count.clamp_max(strata)
        starts_BS = torch.where(whole & (edges > 0), count, starts_BS)
    size_BS = starts_BS.diff(dim=1)
    quota_BS = fill_quotas(strata_quotas(keep, strata), size_BS)
    return starts_BS, one_each(quota_BS, size_BS) if every_stratum else quota_BS


def strata_quotas(keep_B1: Tensor, strata: int) -> Tensor:
    """keep split in the ratio S : S-1 : ... : 1, hardest first, whole numbers by largest remainder. Shape (B, S)."""
    parts = torch.arange(strata, 0, -1, device=keep_B1.device)
    total = strata * (strata + 1) // 2
    scaled = keep_B1 * parts
    floor = scaled.div(total, rounding_mode="floor")
    missing = keep_B1 - floor.sum(dim=1, keepdim=True)
    # Of equal remainders the harder stratum's is the larger, so no two are equal.
    remainder = (scaled - floor * total) * strata + parts
    larger = (remainder.unsqueeze(1) > remainder.unsqueeze(2)).sum(dim=2)
    return floor + (larger < missing)


def fill_quotas(quota_BS: Tensor, size_BS: Tensor) -> Tensor:
    """Caps each quota at its stratum's size; the excess flows to easier strata, what is left then to harder ones."""
    columns = list(quota_BS.unbind(1))
    excess = torch.zeros_like(columns[0])
    for s in [*range(len(columns)), *reversed(range(len(columns)))]:
        wanted = columns[s] + excess
        columns[s] = torch.minimum(wanted, size_BS[:, s])
        excess = wanted - columns[s]
    return torch.stack(columns, dim=1)


def one_each(quota_BS: Tensor, size_BS: Tensor) -> Tensor:
    """Lifts the quota of every stratum with members to one, each time at the cost of the largest (easiest of equals).

    The sum stays what it was where it is at least the number of such strata.
    """
    strata = quota_BS.shape[1]
    lifted = torch.maximum(quota_BS, size_BS.clamp_max(1))
    surplus = (lifted - quota_BS).sum(dim=1, keepdim=True)
    places = torch.arange(strata, device=quota_BS.device)
    for taken in range(strata - 1):
        largest = (lifted * strata + places).argmax(dim=1, keepdim=True)
        lifted = lifted - ((places == largest) & (surplus > taken)).long()
    return lifted


def inclusion_probabilities(importance_BT: Tensor, keep_B: Tensor, smallest: float) -> Tensor:
    """pi_t = clamp(c s_t, smallest, 1) with sum pi = keep in every row; 0 where the importance is 0. float64.

    In a row whose whole number keep is less than smallest * labelled, the smallest is keep / labelled: else the sum
    could not be met, and 1/pi would be biased. The water level c is found by bisection in logarithms, to 1e-12.
    """
    s = importance_BT.double()
    present = s > 0
    keep = keep_B.double().unsqueeze(1)
    least = (keep / present.sum(dim=1, keepdim=True).clamp_min(1)).clamp_max(smallest)

    def at(log_level: Tensor) -> Tensor:
        return torch.where(present, (s * log_level.exp()).clamp_max(1.0).maximum(least), 0.0)

    tiny = torch.finfo(torch.float32).tiny
    low = -(s.amax(dim=1, keepdim=True).clamp_min(tiny)).log() + least.clamp_min(tiny).log() - 1
    high = -(torch.where(present, s, torch.inf).amin(dim=1, keepdim=True).clamp(tiny, 1e30)).log() + 1
    for _ in range(60):
        middle = (low + high) / 2
        above = at(middle).sum(dim=1, keepdim=True) > keep
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return at((low + high) / 2)


def systematic(probability_BT: Tensor, keep_B: Tensor, generator: torch.Generator) -> Selection:
    """Systematic sampling in a random order: position t is kept with probability pi_t, exactly keep_B a row."""
    shape, device = probability_BT.shape, probability_BT.device
    draw = torch.rand(shape, generator=generator, device=device)
    order = torch.where(probability_BT > 0, draw, 2.0).argsort(dim=1)
    pi = probability_BT.gather(1, order)
    # Crossings of whole numbers by the running sum mark the kept ones; the last sum is forced onto keep exactly. It is
    # of units of 2^-40: whole numbers have one sum, in whatever order a GPU adds them.
    total = (pi * 2**40).round().long().cumsum(dim=1).double()
    total = total * (keep_B.double().unsqueeze(1) / total[:, -1:].clamp_min(1e-300))
    start = torch.rand((shape[0], 1), generator=generator, device=device, dtype=torch.float64)
    wanted = torch.arange(shape[1], device=device, dtype=torch.float64).expand(shape) + start
    crossing = torch.searchsorted(total, wanted.contiguous())
    # Rounding could send two crossings to one position, or one past the end: spread them, then pull them back.
    places = torch.arange(shape[1], device=device)
    spread = (crossing - places).cummax(dim=1).values + places
    count = keep_B.unsqueeze(1)
    present = (probability_BT > 0).sum(dim=1, keepdim=True)
    limited = torch.minimum(spread, present - count + places)
    kept_in_order = torch.zeros(shape, dtype=torch.bool, device=device)
    valid = places < count
    # Too few present positions (scores of a diverging model are NaN) must not reach outside the row.
    kept_in_order.scatter_(1, torch.where(valid, limited, limited[:, :1]).clamp(0, shape[1] - 1), True)
    kept_in_order &= count > 0
    return Selection(torch.zeros_like(kept_in_order).scatter_(1, order, kept_in_order), probability_BT)
