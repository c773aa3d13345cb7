"""Buckets of depth against the equation in plain Python."""

import math
import random

import pytest
import torch

from cggr_ray.routing.depth import (
    cut_layers,
    deepest_bucket,
    depth_buckets,
    keep_layers,
)

INF = math.inf


def brute_buckets(scores, num_buckets):
    """b = (B - 1) - floor(rho B / N) over the labelled positions; of equals the last is the easier."""
    labelled = sorted((t for t, s in enumerate(scores) if s > -INF), key=lambda t: (scores[t], -t))
    buckets = [num_buckets - 1] * len(scores)
    for rho, t in enumerate(labelled):
        buckets[t] = num_buckets - 1 - rho * num_buckets // len(labelled)
    return buckets


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 4, 8, 11])
@pytest.mark.parametrize("distinct", [None, 3, 1])
def test_buckets_against_brute_force(num_buckets, distinct):
    rng = random.Random(num_buckets)
    for width in (1, 2, 5, 16, 101):
        rows = []
        for share in (0.0, 0.5, 1.0, rng.random()):
            value = (lambda: rng.gauss(0, 3)) if distinct is None else (lambda: float(rng.randrange(distinct)))
            rows.append([value() if rng.random() < share else -INF for _ in range(width)])
        scores = torch.tensor(rows)
        labelled = (scores > -INF).sum(1)
        buckets = depth_buckets(scores, labelled, num_buckets)
        assert buckets.tolist() == [brute_buckets(row, num_buckets) for row in scores.tolist()]


def test_counts_hold_where_a_model_diverges():
    scores = torch.tensor([[-INF, math.nan, math.nan, INF, -INF, math.nan, INF, 0.5]])
    buckets = depth_buckets(scores, torch.tensor([6]), 3)
    assert buckets.tolist() == [[2, 1, 2, 0, 2, 2, 0, 1]]


def test_layers_by_hand():
    assert keep_layers(30, 4) == [30, 22, 15, 7]
    assert cut_layers(30, 4) == [-1, 7, 14, 22]
    assert keep_layers(32, 4) == [32, 24, 16, 8] and cut_layers(32, 4) == [-1, 7, 15, 23]
    assert keep_layers(34, 4) == [34, 25, 17, 8] and cut_layers(34, 4) == [-1, 8, 16, 25]
    assert cut_layers(12, 1) == [-1]
    assert keep_layers(2, 4) == [2, 1, 1, 0]
    # In floating point, floor(L / B * (B - b)) loses a layer here.
    assert keep_layers(47, 47) == list(range(47, 0, -1))
    for layers, buckets in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            keep_layers(layers, buckets)


def test_the_curriculum_is_a_staircase():
    assert [deepest_bucket(4, p) for p in (-1, 0, 0.2, 1 / 3, 0.6, 2 / 3, 0.99, 1, 7)] == [0, 0, 0, 1, 1, 2, 2, 3, 3]
