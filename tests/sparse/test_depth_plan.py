"""Depth buckets, from scores to gradients, against hooks on a plain Hugging Face model, one document at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import COMMON, CONFIGS, small_model
from test_plans import ODD, PACKED, assert_same, gradients, keep_only, micro_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cggr_ray.data.batch import MicroBatch
from cggr_ray.models.adapter import Adapter
from cggr_ray.models.checkpointing import Checkpointing
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.progress import Progress
from cggr_ray.routing.buckets import DepthBuckets
from cggr_ray.routing.depth import cut_layers
from cggr_ray.routing.route import Depth, TokenRoute
from cggr_ray.routing.scorers import Setting
from cggr_ray.sparse.depth import Stage, rows_up_to, stages

Found = tuple[Tensor, dict[str, Tensor]]


def few_labels() -> MicroBatch:
    """Rows of which one has few labels, one has none, and all end in padding."""
    micro = micro_of([[5, 9], [13, 2], [4, 4, 4]], width=18, seed=4)
    labels = micro.labels_BT.clone()
    labels[1], labels[2, 3:] = -100, -100
    return replace(micro, labels_BT=labels, labelled_B=(labels >= 0).sum(1).numpy())


MICROS = {"packed": PACKED, "one odd row": ODD, "few labels": few_labels()}


def deep_llama(layers: int) -> PreTrainedModel:
    """Weights a third of the small models': through so many layers those would lose more digits than the bound allows,
    in the oracle as in the plans."""
    changed = COMMON | {"num_hidden_layers": layers, "initializer_range": 0.1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(layers)
        return LlamaForCausalLM(LlamaConfig(**changed, tie_word_embeddings=True))


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def documents_of(micro: MicroBatch) -> Iterator[tuple[int, int, int]]:
    for row, positions in enumerate(micro.positions_BT.tolist()):
        starts = [i for i, p in enumerate(positions) if p == 0]
        yield from ((row, a, b) for a, b in zip(starts, [*starts[1:], len(positions)], strict=True))


def cuts_by_hand(model: PreTrainedModel, micro: MicroBatch, num_buckets: int, last: int) -> Tensor:
    """The cut layer of every position: entropy less confidence, ranked in its row by sorting."""
    scores = torch.full(micro.labels_BT.shape, torch.nan)
    with torch.no_grad():
        for row, a, b in documents_of(micro):
            p = model(input_ids=micro.tokens_BT[row : row + 1, a:b]).logits[0].softmax(-1)
            scores[row, a:b] = -(p * p.log()).sum(-1) - p.amax(-1)
    cuts, count = torch.empty_like(micro.labels_BT), len(layers_of(model))
    for row, labels in enumerate(micro.labels_BT.tolist()):
        ranked = sorted((t for t, label in enumerate(labels) if label >= 0), key=lambda t: scores[row, t].item())
        for t in range(len(labels)):
            easiest = num_buckets - 1
            bucket = easiest - ranked.index(t) * num_buckets // len(ranked) if t in ranked else easiest
            cuts[row, t] = count - count * (num_buckets - min(bucket, last)) // num_buckets - 1
    return cuts


def by_hand(
    model: PreTrainedModel, micro: MicroBatch, cuts_BT: Tensor, leak: float = 0.0, only: list[int] | None = None
) -> Found:
    """(loss, gradients) with a tensor hook on the output of every layer and the input of the first, or of some layers
    alone; one document at a time by the model's own forward."""
    layers, at = layers_of(model), (0, 0, 0)

    def masked(hidden: Tensor, layer: int) -> None:
        row, a, b = at
        mask = torch.where(cuts_BT[row, a:b] < layer, 1.0, leak)
        hidden.register_hook(lambda grad: grad * mask[None, :, None])

    def after(layer: int) -> Callable[..., None]:
        return lambda module, args, out: masked(out if isinstance(out, Tensor) else out[0], layer)

    for i, layer in enumerate(layers):
        if only is None or i in only:
            layer.register_forward_hook(after(i))
    if only is None:
        layers[0].register_forward_pre_hook(
            lambda module, args, keywords: masked(args[0] if args else keywords["hidden_states"], 0), with_kwargs=True
        )
    total = torch.zeros(())
    for at in documents_of(micro):
        row, a, b = at
        logits = model(input_ids=micro.tokens_BT[row : row + 1, a:b]).logits[0]
        total = total + F.cross_entropy(logits, micro.labels_BT[row, a:b], ignore_index=-100, reduction="sum")
    loss = total / micro.labelled
    loss.backward()
    return loss.detach(), gradients(model)


def plain(model: PreTrainedModel, micro: MicroBatch) -> Found:
    return by_hand(copy.deepcopy(model), micro, torch.full_like(micro.labels_BT, -2))


def found_by(
    part: DepthBuckets,
    model: PreTrainedModel,
    micro: MicroBatch,
    fraction: float = 1.0,
    checkpointing: Checkpointing = "none",
) -> Found:
    """(loss, gradients) by the part's own router and plan."""
    adapter = Adapter(model, checkpointing)
    router = part.build(0, Setting(adapter.device, len(adapter.layers), adapter.head_VD.shape[1], 1000))
    ratio = router.ratio(Progress(0, fraction, 1.0, 0))
    assert ratio < 1
    planned = part.plan_for(adapter).forward(micro, router.reads(ratio), lambda seen: router.route(seen, micro, ratio))
    assert planned.route is None and planned.statistics
    loss = NextToken().loss(planned.stream, micro, planned.route, torch.tensor(1 / micro.labelled))
    loss.total.backward()
    return loss.reported, gradients(model)


def differs(found: Found, other: Found) -> bool:
    error = sum((found[1][name] - other[1][name]).square().sum() for name in other[1])
    return error > 1e-2 * sum(gradient.square().sum() for gradient in other[1].values())


@pytest.mark.parametrize("engine", ["sparse", "every", "faithful"])
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_of_hooks_by_hand(family: str, engine: str) -> None:
    model = small_model(family)
    cuts = cuts_by_hand(model, PACKED, 3, last=2)
    assert set(cuts.unique().tolist()) == {-1, 0, 1}
    only = [0, 1] if engine == "faithful" else None
    expected = by_hand(copy.deepcopy(model), PACKED, cuts, only=only)
    assert differs(expected, plain(model, PACKED))
    assert_same(found_by(DepthBuckets(3, engine=engine), model, PACKED), expected)


@pytest.mark.parametrize("micro", MICROS)
@pytest.mark.parametrize("num_buckets", [2, 3, 4, 8])
@pytest.mark.parametrize("layers", [6, 8])
def test_deeper_models_more_buckets_odd_rows(layers: int, num_buckets: int, micro: str) -> None:
    model, rows = deep_llama(layers), MICROS[micro]
    cuts = cuts_by_hand(model, rows, num_buckets, last=num_buckets - 1)
    expected = by_hand(copy.deepcopy(model), rows, cuts)
    for engine in ("sparse", "every"):
        assert_same(found_by(DepthBuckets(num_buckets, engine=engine), copy.deepcopy(model), rows), expected)


@pytest.mark.parametrize("engine", ["sparse", "every", "faithful"])
@pytest.mark.parametrize("num_buckets", [4, 7])
def test_more_buckets_than_layers(num_buckets: int, engine: str) -> None:
    """The easiest buckets reach no layer: the last norm and the head alone learn from them."""
    model = small_model("qwen3")
    cuts = cuts_by_hand(model, PACKED, num_buckets, last=num_buckets - 1)
    assert cuts.max() == 2
    only = [0, 1, 2] if engine == "faithful" else None
    expected = by_hand(copy.deepcopy(model), PACKED, cuts, only=only)
    assert_same(found_by(DepthBuckets(num_buckets, engine=engine), model, PACKED), expected)


@pytest.mark.parametrize("engine", ["sparse", "every", "faithful"])
@pytest.mark.parametrize(("fraction", "last"), [(0.04, 1), (0.07, 2), (0.1, 3)])
def test_the_curriculum_tells_one_bucket_more_apart_at_a_time(fraction: float, last: int, engine: str) -> None:
    model = deep_llama(6)
    cuts = cuts_by_hand(model, PACKED, 4, last)
    assert len(cuts.unique()) == last + 1
    only = [1, 2, 4] if engine == "faithful" else None
    expected = by_hand(copy.deepcopy(model), PACKED, cuts, only=only)
    assert_same(found_by(DepthBuckets(4, engine=engine), model, PACKED, fraction), expected)


@pytest.mark.parametrize("engine", ["every", "faithful"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_leak_passes_every_gate(family: str, engine: str) -> None:
    model = small_model(family)
    cuts = cuts_by_hand(model, PACKED, 3, last=2)
    only = [0, 1] if engine == "faithful" else None
    expected = by_hand(copy.deepcopy(model), PACKED, cuts, leak=0.3, only=only)
    closed = by_hand(copy.deepcopy(model), PACKED, cuts, only=only)
    found = found_by(DepthBuckets(3, engine=engine, leak_rate=0.3), copy.deepcopy(model), PACKED)
    assert_same(found, expected)
    assert differs(found, closed)
    assert_same(found_by(DepthBuckets(3, engine=engine, leak_rate=1.0), model, PACKED), plain(model, PACKED))


@pytest.mark.parametrize("checkpointing", ["block", "selective"])
@pytest.mark.parametrize("engine", ["sparse", "every", "faithful"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_gradient_checkpointing_changes_nothing(family: str, engine: str, checkpointing: Checkpointing) -> None:
    model = small_model(family)
    part = DepthBuckets(3, engine=engine)
    assert_same(
        found_by(part, copy.deepcopy(model), PACKED, checkpointing=checkpointing), found_by(part, model, PACKED)
    )


def keys_too_by_hand(model: PreTrainedModel, micro: MicroBatch, cuts_BT: Tensor) -> Found:
    """As `by_hand`, and in layer l the keys and values of positions cut off above it are constants too."""
    adapter, documents = Adapter(model), Adapter(model).documents(micro)
    hidden = adapter.embed(micro)
    for i, layer in enumerate(adapter.layers):
        hidden = torch.where((cuts_BT < max(i - 1, 0))[..., None], hidden, hidden.detach())
        with keep_only(model, [layer], cuts_BT < i if i else cuts_BT < 0, keys_too=True):
            hidden = adapter.run_layers(hidden, micro.positions_BT, documents, slice(i, i + 1))
    hidden = torch.where((cuts_BT < len(adapter.layers) - 1)[..., None], hidden, hidden.detach())
    logits = adapter.final_norm(hidden) @ adapter.head_VD.mT
    nll = F.cross_entropy(logits.flatten(0, 1), micro.labels_BT.flatten(), ignore_index=-100, reduction="sum")
    loss = nll / micro.labelled
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
@pytest.mark.parametrize("family", CONFIGS)
def test_constant_keys_and_values(family: str, checkpointing: Checkpointing) -> None:
    model = small_model(family)
    cuts = cuts_by_hand(model, PACKED, 3, last=2)
    expected = keys_too_by_hand(copy.deepcopy(model), PACKED, cuts)
    part = DepthBuckets(3, detach="const")
    assert_same(found_by(part, model, PACKED, checkpointing=checkpointing), expected)


@pytest.mark.parametrize("engine", ["sparse", "every", "faithful"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_bucket_is_plain_training(family: str, engine: str) -> None:
    """The learner does not ask the plan for it; the plan could do it."""
    model = small_model(family)
    adapter = Adapter(copy.deepcopy(model))
    plan = DepthBuckets(1, engine=engine).plan_for(adapter)
    full = route_of(Depth(torch.zeros_like(PACKED.labels_BT), 0))
    planned = plan.forward(PACKED, len(adapter.layers), lambda seen: full)
    loss = NextToken().loss(planned.stream, PACKED, planned.route, torch.tensor(1 / PACKED.labelled))
    loss.total.backward()
    assert_same((loss.reported, gradients(adapter.model)), plain(model, PACKED))


def route_of(depth: Depth) -> TokenRoute:
    index = torch.arange(depth.bucket_BT.shape[1]).expand_as(depth.bucket_BT)
    return TokenRoute(index, torch.ones(index.shape), {}, depth)


def random_buckets(seed: int) -> Tensor:
    """At most a third of every row in each of the first two of three buckets."""
    g = torch.Generator().manual_seed(seed)
    bucket = torch.full((3, 21), 2)
    for row in bucket:
        places = torch.randperm(21, generator=g)
        first, second = (int(torch.randint(8, (), generator=g)) for _ in range(2))
        row[places[:first]], row[places[7 : 7 + second]] = 0, 1
    return bucket


BUCKETS = {f"random {seed}": random_buckets(seed) for seed in range(8)} | {
    "the easiest first": torch.tensor([[2] * 7 + [1] * 7 + [0] * 7] * 3),
    "the easiest last": torch.tensor([[0] * 7 + [1] * 7 + [2] * 7] * 3),
    "empty slots before a full set": torch.tensor([[0] * 3 + [1] * 11 + [2] * 7] * 3),
    "the easiest alone": torch.full((3, 21), 2),
}


@pytest.mark.parametrize("case", BUCKETS)
def test_empty_slots_count_for_nothing(case: str) -> None:
    """Whatever the buckets, where every position has a label, the last of a row too, which empty slots repeat."""
    micro, bucket = micro_of([[21], [10, 11], [7, 5, 9]], width=21), BUCKETS[case]
    g = torch.Generator().manual_seed(1)
    micro = replace(micro, labels_BT=torch.randint(96, (3, 21), generator=g), labelled_B=np.array([21] * 3))
    model = deep_llama(6)
    expected = by_hand(copy.deepcopy(model), micro, torch.tensor(cut_layers(6, 3))[bucket])
    plan = DepthBuckets(3).plan_for(Adapter(model))
    planned = plan.forward(micro, 6, lambda seen: route_of(Depth(bucket.int(), 2)))
    loss = NextToken().loss(planned.stream, micro, planned.route, torch.tensor(1 / micro.labelled))
    loss.total.backward()
    assert_same((loss.reported, gradients(model)), expected)


def test_stages_by_hand() -> None:
    assert stages(30, 4, last=3) == [Stage(0, 0), Stage(8, 1), Stage(15, 2), Stage(23, 3)]
    assert stages(30, 4, last=1) == [Stage(0, 0), Stage(8, 1)]
    assert stages(30, 4, last=0) == [Stage(0, 0)]
    assert stages(2, 4, last=3) == [Stage(0, 0), Stage(1, 2), Stage(2, 3)]


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 5, 30])
def test_slots_depend_on_no_data(num_buckets: int) -> None:
    sizes = set()
    for bucket in (0, num_buckets // 2, num_buckets - 1):
        depth = Depth(torch.full((2, 21), bucket), num_buckets - 1)
        sets = [rows_up_to(b, depth, num_buckets) for b in range(num_buckets)]
        sizes.add(tuple(len(rows.index_K) for rows in sets))
        assert all((rows.index_K.diff() >= 0).all() and rows.index_K.max() <= 41 for rows in sets)
    assert sizes == {tuple([2 * -(-(b + 1) * 21 // num_buckets) for b in range(num_buckets - 1)] + [42])}
