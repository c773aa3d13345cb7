"""The plans that run whole layers, and buckets of depth, in bf16 on the GPU against float32 on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from on_gpu import DEVICE, Found, assert_as_good, moved, moved_route, relative_error, small_twins, twins
from small_models import CONFIGS
from test_depth_plan import by_hand, keys_too_by_hand, plain, random_buckets
from test_gpu_plans import eager_gradients, long_rows, wide_llama
from test_plans import PACKED, ROUTES, gradients, skip_by_hand
from torch import Tensor
from transformers import PreTrainedModel

from cggr_ray.data.batch import MicroBatch
from cggr_ray.models.adapter import Adapter
from cggr_ray.models.checkpointing import Checkpointing
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.routing.buckets import DepthBuckets
from cggr_ray.routing.depth import cut_layers
from cggr_ray.routing.route import Depth, TokenRoute
from cggr_ray.sparse.plan import Dense, Plan, Skip

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BUCKETS = 3


def planned_gradients(plan: Plan, adapter: Adapter, micro: MicroBatch, reads: int, route: TokenRoute | None) -> Found:
    planned = plan.forward(micro, reads, lambda seen: route)
    scale = torch.tensor(1 / micro.labelled, device=adapter.device)
    loss = NextToken().loss(planned.stream, micro, planned.route, scale)
    loss.total.backward()
    return loss.reported, gradients(adapter.model)


def all_of(micro: MicroBatch) -> Tensor:
    return torch.ones_like(micro.labels_BT, dtype=torch.bool)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_dense_plan_and_the_plan_that_skips_layers(family: str) -> None:
    """A pass that skips may be off by what the ordinary dense pass is off by."""
    micro, route = ROUTES["packed rows, empty slots"]
    here, routed, models = moved(micro), moved_route(route), small_twins(family)
    expected = [eager_gradients(model.exact, micro, route, all_of(micro), keys_too=False) for model in models]
    dense = [eager_gradients(model.low, here, routed, all_of(here), keys_too=False) for model in models]
    adapters = [Adapter(model.low) for model in models]
    for reads in (0, 2):
        found = [planned_gradients(Dense(adapter), adapter, here, reads, routed) for adapter in adapters]
        assert_as_good(found, dense, expected)
    by_hand = [skipped_by_hand(model.exact, micro, route) for model in models]
    skipped = [planned_gradients(Skip(adapter, 1, 1), adapter, here, 0, routed) for adapter in adapters]
    assert_as_good(skipped, as_far(dense, expected, by_hand), by_hand)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("checkpointing", ["block", "selective"])
def test_gradient_checkpointing_changes_nothing(family: str, checkpointing: Checkpointing) -> None:
    micro, model = moved(PACKED), small_twins(family)[0].low
    modes: tuple[Checkpointing, ...] = ("none", checkpointing)
    adapters = [Adapter(copy.deepcopy(model), mode) for mode in modes]
    (loss, plain), (again, found) = (planned_gradients(Dense(a), a, micro, 0, None) for a in adapters)
    assert again.item() == pytest.approx(loss.item(), rel=1e-3)
    assert relative_error(found, plain) < 0.01


def skipped_by_hand(model: PreTrainedModel, micro: MicroBatch, route: TokenRoute) -> Found:
    loss = skip_by_hand(model, micro, route, 1, 1)
    loss.backward()
    return loss.detach(), gradients(model)


def as_far(dense: list[Found], exact: list[Found], others: list[Found]) -> list[Found]:
    """Gradients that are as far from `others`, relative to their size, as `dense` ones are from the exact ones."""
    return [
        (loss, {name: g.double() * (1 + relative_error(a, b)) for name, g in other.items()})
        for (_, a), (_, b), (loss, other) in zip(dense, exact, others, strict=True)
    ]


def depth_gradients(model: PreTrainedModel, micro: MicroBatch, bucket_BT: Tensor, part: DepthBuckets) -> Found:
    """With buckets that are given: those of the model's scores would depend on rounding."""
    adapter = Adapter(model)
    bucket = bucket_BT.to(DEVICE, torch.int32)
    every = torch.arange(bucket.shape[1], device=DEVICE).expand_as(bucket)
    route = TokenRoute(every, torch.ones(bucket.shape, device=DEVICE), {}, Depth(bucket, BUCKETS - 1))
    return planned_gradients(part.plan_for(adapter), adapter, micro, len(adapter.layers), route)


def long_buckets() -> Tensor:
    """A third of the row each, at most, in the first two of three buckets."""
    g = torch.Generator().manual_seed(8)
    bucket = torch.full((2, 256), BUCKETS - 1)
    for row, (first, second) in zip(bucket, ((70, 85), (85, 41)), strict=True):
        places = torch.randperm(256, generator=g)
        row[places[:first]], row[places[first : first + second]] = 0, 1
    return bucket


@pytest.mark.parametrize("case", ["gemma3", "gpt2", "rows of several tiles"])
def test_buckets_of_depth(case: str) -> None:
    """Rows that learn alone, against gates on a dense pass, and these against a dense pass without."""
    wide = case == "rows of several tiles"
    models = [twins(wide_llama())] if wide else small_twins(case)
    micro, bucket = (long_rows()[0], long_buckets()) if wide else (PACKED, random_buckets(1))
    assert set(bucket.unique().tolist()) == {0, 1, 2}
    here, cuts = moved(micro), torch.tensor(cut_layers(3, BUCKETS))[bucket]
    expected = [by_hand(copy.deepcopy(model.exact), micro, cuts) for model in models]
    gated = [depth_gradients(model.low, here, bucket, DepthBuckets(BUCKETS, engine="every")) for model in models]
    full = [plain(model.exact, micro) for model in models]
    dense = [ungated(model.low, here) for model in models]
    assert_as_good(gated, as_far(dense, full, expected), expected)
    found = [depth_gradients(model.low, here, bucket, DepthBuckets(BUCKETS)) for model in models]
    assert_as_good(found, gated, expected)
    if not wide:
        return
    const = [keys_too_by_hand(model.exact, micro, cuts) for model in models]
    found = [depth_gradients(model.low, here, bucket, DepthBuckets(BUCKETS, detach="const")) for model in models]
    assert_as_good(found, as_far(gated, expected, const), const)


def ungated(model: PreTrainedModel, micro: MicroBatch) -> Found:
    """All positions through all layers."""
    every = torch.arange(micro.tokens_BT.shape[1], device=DEVICE).expand_as(micro.tokens_BT)
    route = TokenRoute(every, torch.ones(every.shape, device=DEVICE))
    return eager_gradients(model, micro, route, all_of(micro), keys_too=False)
