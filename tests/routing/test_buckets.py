"""The part `DepthBuckets` and its router: what it accepts, its staircase, its routes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from cggr_ray.data.batch import MicroBatch
from cggr_ray.progress import Progress
from cggr_ray.routing.buckets import DepthBuckets, learning_shares
from cggr_ray.routing.scorers import Setting
from cggr_ray.schema import (
    ROUTER_CONFIDENCE,
    ROUTER_ENTROPY,
    ROUTER_KEPT_FRACTION,
    ROUTER_SCORES,
    ROUTER_USAGE,
)
from cggr_ray.sparse.plan import Seen

WIDTH, VOCABULARY, LAYERS = 6, 19, 30


def bucket_sizes(labelled: int, num_buckets: int, last: int) -> list[int]:
    """Labelled positions by bucket where those after `last` are not told apart from it."""
    edges = [i * labelled // num_buckets for i in range(num_buckets + 1)]
    sizes = [end - start for start, end in itertools.pairwise(edges)]
    return sizes[:last] + [sum(sizes[last:])] + [0] * (num_buckets - 1 - last)


SETTING = Setting(torch.device("cpu"), num_layers=LAYERS, width=WIDTH, num_positions=1000)


def at(fraction: float) -> Progress:
    return Progress(0, train_seconds=100 * fraction, budget_seconds=100.0, tokens_seen=1)


def micro_of(labelled: torch.Tensor) -> MicroBatch:
    rows, width = labelled.shape
    g = torch.Generator().manual_seed(rows * 1000 + width)
    labels = torch.randint(VOCABULARY, (rows, width), generator=g)
    return MicroBatch(
        tokens_BT=labels,
        labels_BT=torch.where(labelled, labels, -100),
        positions_BT=torch.arange(width).repeat(rows, 1),
        position_ids_BT=torch.arange(rows * width).view(rows, width),
        document_starts=torch.tensor([*range(0, rows * width + 1, width)], dtype=torch.int32),
        longest_document=width,
        labelled_B=labelled.sum(1).numpy(),
        index=0,
    )


def odd_micro() -> MicroBatch:
    """Rows with all, many, two and no labels."""
    labelled = torch.rand(4, 37, generator=torch.Generator().manual_seed(1)) < 0.6
    labelled[0], labelled[2:] = True, False
    labelled[2, 17], labelled[2, 30] = True, True
    return micro_of(labelled)


def seen_of(micro: MicroBatch, scale: float = 1.0) -> Seen:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(micro.labels_BT.numel(), WIDTH, generator=g) * scale
    return Seen(hidden, hidden, torch.randn(VOCABULARY, WIDTH, generator=g))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_buckets": 0}, r"num_buckets = 0; accepted: at least 1"),
        ({"leak_rate": 0.1}, r"leak_rate = 0\.1 with engine 'sparse'; accepted: 0, or every, faithful"),
        ({"leak_rate": -0.1, "engine": "every"}, r"leak_rate = -0\.1, .*; accepted: 0 to 1"),
        ({"warm_up_until": 1.1}, r"warm_up_until = 1\.1; accepted: 0 to 1"),
        ({"detach": "const", "engine": "every"}, r"detach 'const' with engine 'every'; accepted: 'live'"),
    ],
)
def test_what_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DepthBuckets(**values)


def test_shares_by_hand() -> None:
    assert learning_shares(30, 4) == [1.0, 96 / 120, 82 / 120, 74 / 120]
    assert learning_shares(7, 1) == [1.0]
    assert learning_shares(2, 4) == [1.0, 5 / 8, 5 / 8, 4 / 8]


def test_the_staircase_begins_with_everything_and_takes_each_level_once() -> None:
    router = DepthBuckets(warm_up_until=0.3).build(0, SETTING)
    assert router.levels() == tuple(learning_shares(LAYERS, 4))
    fractions = [0.0, 0.05, 0.099, 0.101, 0.199, 0.201, 0.299, 0.3, 0.31, 0.5, 1.0]
    steps = [router.levels().index(router.ratio(at(fraction))) for fraction in fractions]
    assert steps == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert [router.reads(level) for level in router.levels()] == [0, LAYERS, LAYERS, LAYERS]
    at_once = DepthBuckets(warm_up_until=0.0).build(0, SETTING)
    assert at_once.ratio(at(0.0)) == at_once.levels()[-1]


def test_more_buckets_than_layers_make_no_level_twice() -> None:
    router = DepthBuckets(8).build(0, SETTING._replace(num_layers=3))
    levels = router.levels()
    assert levels[0] == 1.0 and list(levels) == sorted(set(levels), reverse=True)
    assert {router.ratio(at(i / 1000)) for i in range(200)} == set(levels)


def test_one_bucket_is_the_neutral_setting() -> None:
    micro, router = odd_micro(), DepthBuckets(1).build(0, SETTING)
    assert router.levels() == (1.0,) and router.reads(1.0) == 0
    assert {router.ratio(at(i / 10)) for i in range(11)} == {1.0}
    assert router.route(None, micro, 1.0) is None


@pytest.mark.parametrize("num_buckets", [2, 4, 5])
@pytest.mark.parametrize("score", ["entropy_confidence", "loss", "margin"])
def test_routes_have_exact_counts_and_all_positions(score: str, num_buckets: int) -> None:
    micro = odd_micro()
    router = DepthBuckets(num_buckets, score).build(0, SETTING)
    for last, ratio in enumerate(router.levels()[1:], start=1):
        route = router.route(seen_of(micro), micro, ratio)
        assert route.depth.last == last
        assert route.index_BK.tolist() == [list(range(37))] * 4 and (route.weights_BK == 1).all()
        assert (route.depth.bucket_BT[micro.labels_BT < 0] == last).all()
        counts = [bucket_sizes(int(n), num_buckets, last) for n in micro.labelled_B]
        for buckets, labels, expected in zip(route.depth.bucket_BT, micro.labels_BT, counts, strict=True):
            assert torch.bincount(buckets[labels >= 0], minlength=num_buckets).tolist() == expected
        counted = {ROUTER_SCORES, ROUTER_USAGE, ROUTER_KEPT_FRACTION}
        assert set(route.statistics) == {ROUTER_ENTROPY, ROUTER_CONFIDENCE} | counted
        assert route.statistics[ROUTER_USAGE].tolist() == [sum(sizes) for sizes in zip(*counts, strict=True)]
        learning = [LAYERS * (num_buckets - b) // num_buckets for b in range(num_buckets)]
        pairs = sum(size * layers for sizes in counts for size, layers in zip(sizes, learning, strict=True))
        assert route.statistics[ROUTER_KEPT_FRACTION].item() == pytest.approx(pairs / LAYERS, rel=1e-12)


def test_the_hardest_are_in_the_first_bucket() -> None:
    micro = odd_micro()
    router = DepthBuckets(4).build(0, SETTING)
    seen = seen_of(micro)
    p = (seen.final_ND @ seen.head_VD.mT).softmax(-1)
    difficulty = (-(p * p.log()).sum(-1) - p.amax(-1)).view(4, 37)[0]
    buckets = router.route(seen, micro, router.levels()[-1]).depth.bucket_BT[0]
    limits = [(difficulty[buckets == b].min(), difficulty[buckets == b].max()) for b in range(4)]
    assert all(harder[0] >= easier[1] for harder, easier in itertools.pairwise(limits))


def test_a_model_that_diverges_still_gets_a_route() -> None:
    micro = odd_micro()
    router = DepthBuckets(4).build(0, SETTING)
    route = router.route(seen_of(micro, scale=math.nan), micro, router.levels()[-1])
    counts = np.array([bucket_sizes(int(n), 4, 3) for n in micro.labelled_B])[:, :-1].cumsum(1)
    for m, limit in enumerate(counts.T):
        assert ((route.depth.bucket_BT <= m).sum(1) <= torch.from_numpy(limit)).all()
