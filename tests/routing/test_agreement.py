"""Rank correlation against scipy's, recall against sets."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from cggr_ray.routing.agreement import recall_at_k, spearman


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("slope", [-3.0, 0.0, 0.3, 2.0])
def test_spearman_is_scipys_where_both_have_a_score(seed: int, slope: float) -> None:
    g = torch.Generator().manual_seed(seed)
    first = torch.randn(5, 41, generator=g)
    second = slope * first + torch.randn(5, 41, generator=g).exp()
    missing = torch.rand(2, 5, 41, generator=g) < torch.tensor([0.2, 0.6])[:, None, None]
    # What is missing in one only must not move the ranks of the other.
    first[missing[0]], second[missing[1]] = -torch.inf, -torch.inf
    if seed == 5:
        first[0, :9], second[1, :9] = torch.nan, torch.nan
    both = first.isfinite() & second.isfinite()
    assert 20 < both.sum() < 120 and len(first[both].unique()) == len(second[both].unique()) == both.sum()
    found = spearman(first, second)
    assert found.shape == () and found.dtype == torch.float32
    assert found.item() == pytest.approx(spearmanr(first[both], second[both]).statistic, abs=1e-6)


def test_spearman_of_one_order_and_its_reverse() -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    x[0, :20] = -torch.inf
    reverse = torch.where(x.isfinite(), -x, -torch.inf)
    assert spearman(x, x.exp().where(x.isfinite(), -torch.inf)).item() == pytest.approx(1, abs=1e-6)
    assert spearman(x, reverse).item() == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_recall_is_the_share_of_a_set(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    found, own = torch.rand(2, 6, 30, generator=g) < torch.tensor([0.5, 0.2])[:, None, None]
    sets = [{(b, t) for b in range(6) for t in range(30) if mask[b, t]} for mask in (found, own)]
    expected = len(sets[0] & sets[1]) / len(sets[1])
    assert 0 < expected < 1
    assert recall_at_k(found, own).item() == pytest.approx(expected)
    assert recall_at_k(own, own).item() == 1 and recall_at_k(~own, own).item() == 0


def test_nothing_to_find_is_no_division_by_zero() -> None:
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    assert recall_at_k(~nothing, nothing).item() == 0
