"""Plans against their oracles: an ordinary Hugging Face model whose dropped positions are detached by hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import CONFIGS, small_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, PreTrainedModel

from cggr_ray.data.batch import MicroBatch
from cggr_ray.models.adapter import Adapter
from cggr_ray.models.attention import document_mask
from cggr_ray.models.checkpointing import Checkpointing
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.routing.route import TokenRoute
from cggr_ray.sparse.layers import Detach, SparseLayers, Trace
from cggr_ray.sparse.plan import Dense, KeptRows, Plan, Seen, Skip, TwoPass

VOCABULARY = 96
PLANS: dict[str, tuple[Callable[[Adapter, Any], Plan], int | None]] = {
    "after": (KeptRows, None),
    "before": (KeptRows, 0),
    "behind two layers": (KeptRows, 2),
    "two_pass": (TwoPass, None),
}


def micro_of(lengths: list[list[int]], width: int, seed: int = 0) -> MicroBatch:
    """Rows of documents of these lengths; what is left of a row is padding without labels, a document of its own."""
    g = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    positions = torch.stack([torch.cat([torch.arange(n) for n in (*row, width - sum(row))]) for row in lengths])
    labels = torch.randint(VOCABULARY, (rows, width), generator=g)
    for b, row in enumerate(lengths):
        labels[b, sum(row) :] = -100
    labels[torch.rand(rows, width, generator=g) < 0.2] = -100
    starts = torch.cat([(positions.flatten() == 0).nonzero().flatten(), torch.tensor([rows * width] * 2)])
    return MicroBatch(
        tokens_BT=torch.randint(VOCABULARY, (rows, width), generator=g),
        labels_BT=labels,
        positions_BT=positions,
        position_ids_BT=torch.arange(rows * width).view(rows, width),
        document_starts=starts.int(),
        longest_document=max(max(row) for row in lengths),
        labelled_B=(labels >= 0).sum(1).numpy(),
        index=0,
    )


PACKED = micro_of([[5, 11, 3], [21], [1, 1, 18]], width=21)
ODD = micro_of([[17]], width=17, seed=3)
LABELLED_TO_THE_END = micro_of([[17]], width=17, seed=0)


def route_of(micro: MicroBatch, keep: list[list[int]], slots: int) -> TokenRoute:
    """A route of given positions, in rows of `slots`, with odd weights."""
    g = torch.Generator().manual_seed(7)
    index = torch.full((len(keep), slots), micro.tokens_BT.shape[1] - 1)
    weights = torch.zeros(len(keep), slots)
    for b, places in enumerate(keep):
        index[b, : len(places)] = torch.tensor(sorted(places), dtype=torch.int64)
        weights[b, : len(places)] = torch.rand(len(places), generator=g) * 3 + 0.5
    return TokenRoute(index, weights)


def labelled_of(micro: MicroBatch) -> list[list[int]]:
    return [(row >= 0).nonzero().flatten().tolist() for row in micro.labels_BT]


ROUTES: dict[str, tuple[MicroBatch, TokenRoute]] = {
    "packed rows, empty slots": (PACKED, route_of(PACKED, [[0, 4, 5, 9, 18], [20], [1, 2, 12, 19]], 6)),
    "one position": (ODD, route_of(ODD, [[13]], 1)),
    "the first position": (ODD, route_of(ODD, [[0]], 2)),
    "a row with nothing kept": (PACKED, route_of(PACKED, [[], [3, 7], [20]], 2)),
    "empty slots at a labelled position": (LABELLED_TO_THE_END, route_of(LABELLED_TO_THE_END, [[3, 9]], 4)),
    "everything": (PACKED, route_of(PACKED, [list(range(21))] * 3, 21)),
    "every label": (PACKED, route_of(PACKED, labelled_of(PACKED), 21)),
}


def kept_mask(micro: MicroBatch, route: TokenRoute) -> Tensor:
    mask = torch.zeros(micro.tokens_BT.shape, dtype=torch.bool)
    for b in range(len(mask)):
        mask[b, route.index_BK[b][route.filled_BK[b]]] = True
    return mask


@contextmanager
def keep_only(model: PreTrainedModel, layers: list[nn.Module], keep_BT: Tensor, keys_too: bool) -> Iterator[None]:
    """Hidden states of dropped positions are constants at every block input; with `keys_too` their k and v are too."""

    def pre(module: nn.Module, args: Any, keywords: Any) -> Any:
        hidden = args[0] if args else keywords["hidden_states"]
        hidden = torch.where(keep_BT[..., None], hidden, hidden.detach())
        return ((hidden, *args[1:]), keywords) if args else (args, {**keywords, "hidden_states": hidden})

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        if keys_too:
            k, v = (torch.where(keep_BT[:, None, :, None], x, x.detach()) for x in (k, v))
        shared = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
        scores = (q @ k.mT * scaling).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    AttentionInterface.register("oracle", attention)
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, "oracle"
    handles = [layer.register_forward_pre_hook(pre, with_kwargs=True) for layer in layers]
    yield
    config._attn_implementation = before
    for handle in handles:
        handle.remove()


def oracle_gradients(
    model: PreTrainedModel, micro: MicroBatch, route: TokenRoute, keys_too: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradients) by the model's own forward, layer by layer, with the hooks."""
    adapter = Adapter(model)
    mask = kept_mask(micro, route)
    with keep_only(model, list(adapter.layers), mask, keys_too):
        hidden = adapter.run_layers(adapter.embed(micro), micro.positions_BT, adapter.documents(micro))
        logits = (adapter.family.norm(hidden) @ adapter.head_VD.mT).flatten(0, 1)
    index = route.flat_index(micro.tokens_BT.shape[1])
    nll = F.cross_entropy(logits[index], micro.labels_BT.flatten()[index], reduction="none", ignore_index=-100)
    loss = (nll * route.weights_BK.flatten()).sum() / micro.labelled
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def plan_gradients(
    model: PreTrainedModel,
    micro: MicroBatch,
    route: TokenRoute,
    name: str,
    detach: str,
    checkpointing: Checkpointing = "none",
) -> tuple[Tensor, dict[str, Tensor]]:
    adapter = Adapter(model, checkpointing)
    make, reads = PLANS[name]
    calls = []

    def decide(seen: Seen | None) -> TokenRoute:
        calls.append(seen)
        return route

    reads = len(adapter.layers) if reads is None else reads
    planned = make(adapter, detach).forward(micro, reads, decide)
    assert len(calls) == 1 and (calls[0] is None) == (reads == 0)
    loss = NextToken().loss(planned.stream, micro, planned.route, torch.tensor(1 / micro.labelled))
    loss.total.backward()
    return loss.reported, gradients(model)


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    # By norms; a gradient that nearly cancels is measured by a twentieth of the model's largest.
    largest = max(gradient.norm().item() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        scale = max(gradient.norm().item(), 5e-2 * largest)
        error = (found[1][name] - gradient).norm().item()
        assert error <= 1e-5 * scale, f"{name}: {error} of {scale}"


@pytest.mark.parametrize("detach", ["const", "live"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_of_the_oracle(family: str, plan: str, detach: str) -> None:
    micro, route = ROUTES["packed rows, empty slots"]
    model = small_model(family)
    expected = oracle_gradients(copy.deepcopy(model), micro, route, keys_too=detach == "const")
    assert sum(g.abs().sum() > 0 for g in expected[1].values()) == len(expected[1])
    assert_same(plan_gradients(model, micro, route, plan, detach), expected)


@pytest.mark.parametrize("detach", ["const", "live"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", ROUTES)
def test_odd_routes(case: str, plan: str, detach: str) -> None:
    micro, route = ROUTES[case]
    model = small_model("qwen3")
    expected = oracle_gradients(copy.deepcopy(model), micro, route, keys_too=detach == "const")
    assert_same(plan_gradients(model, micro, route, plan, detach), expected)


@pytest.mark.parametrize("checkpointing", ["block", "selective"])
@pytest.mark.parametrize("detach", ["const", "live"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_gradient_checkpointing_changes_nothing(
    family: str, plan: str, detach: str, checkpointing: Checkpointing
) -> None:
    micro, route = ROUTES["packed rows, empty slots"]
    model = small_model(family)
    expected = oracle_gradients(copy.deepcopy(model), micro, route, keys_too=detach == "const")
    assert_same(plan_gradients(model, micro, route, plan, detach, checkpointing=checkpointing), expected)


@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
@pytest.mark.parametrize("detach", ["const", "live"])
@pytest.mark.parametrize("plan", PLANS)
def test_kept_rows_alone_are_computed_again(
    plan: str, detach: str, checkpointing: Checkpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    micro, route = ROUTES["packed rows, empty slots"]
    model = small_model("llama")
    capture, replay = SparseLayers.capture, SparseLayers._replay
    left, rows = [], []

    def watched_capture(*args: Any, **keywords: Any) -> tuple[Tensor, Trace]:
        hidden_ND, trace = capture(*args, **keywords)
        left.append(trace.products is not None)
        return hidden_ND, trace

    def watched_replay(self: SparseLayers, shape: Any, w: Any, hidden_KD: Tensor, *rest: Any) -> Tensor:
        rows.append(len(hidden_KD))
        return replay(self, shape, w, hidden_KD, *rest)

    monkeypatch.setattr(SparseLayers, "capture", watched_capture)
    monkeypatch.setattr(SparseLayers, "_replay", watched_replay)
    plan_gradients(model, micro, route, plan, detach, checkpointing)
    layers = model.config.num_hidden_layers
    assert rows == [route.index_BK.numel()] * (layers if checkpointing == "none" else 2 * layers)
    # All rows pass each layer once; of the last one, kept rows may need no more than keys and values.
    assert len(left) in (layers - 1, layers)
    assert set(left) == {checkpointing != "block" and plan != "two_pass"}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", CONFIGS)
def test_everything_kept_is_plain_training(family: str, plan: str) -> None:
    micro = PACKED
    everything = route_of(micro, [list(range(21))] * 3, 21)
    ones = TokenRoute(everything.index_BK, torch.ones_like(everything.weights_BK))
    model = small_model(family)
    plain = copy.deepcopy(model)
    logits = []
    for row, positions in enumerate(micro.positions_BT.tolist()):
        starts = [i for i, p in enumerate(positions) if p == 0]
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
            logits.append(plain(input_ids=micro.tokens_BT[row, start:end].unsqueeze(0)).logits[0])
    loss = F.cross_entropy(torch.cat(logits), micro.labels_BT.flatten(), ignore_index=-100)
    loss.backward()
    assert_same(plan_gradients(model, micro, ones, plan, "const"), (loss.detach(), gradients(plain)))


@pytest.mark.parametrize("reads", [0, 2, 3])
def test_the_dense_plan_is_the_gradient_of_the_selected_loss(reads: int) -> None:
    micro, route = ROUTES["packed rows, empty slots"]
    model = small_model("llama")
    plain = copy.deepcopy(model)
    adapter = Adapter(plain)
    logits = adapter.forward(micro).hidden_RD @ adapter.head_VD.mT
    index = route.flat_index(21)
    nll = F.cross_entropy(logits[index], micro.labels_BT.flatten()[index], reduction="none", ignore_index=-100)
    loss = (nll * route.weights_BK.flatten()).sum() / micro.labelled
    loss.backward()
    planned = Dense(Adapter(model)).forward(micro, reads, lambda seen: route)
    found = NextToken().loss(planned.stream, micro, planned.route, torch.tensor(1 / micro.labelled))
    found.total.backward()
    assert_same((found.reported, gradients(model)), (loss.detach(), gradients(plain)))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("plan", ["after", "two_pass"])
def test_a_router_sees_what_the_model_computes(family: str, plan: str) -> None:
    micro, route = ROUTES["packed rows, empty slots"]
    adapter = Adapter(small_model(family))
    shown = []

    def decide(seen: Seen | None) -> TokenRoute:
        shown.append(seen)
        return route

    PLANS[plan][0](adapter, "const").forward(micro, 3, decide)
    with torch.no_grad():
        expected = adapter.forward(micro)
    torch.testing.assert_close(shown[0].final_ND, expected.hidden_RD, rtol=1e-5, atol=1e-5)
    assert not shown[0].final_ND.requires_grad and not shown[0].head_VD.requires_grad


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("detach", ["const", "live"])
def test_the_whole_model_can_be_seen_afterwards(family: str, plan: str, detach: str) -> None:
    micro, route = ROUTES["packed rows, empty slots"]
    adapter = Adapter(small_model(family))
    build, reads = PLANS[plan]
    layers = len(adapter.layers) if reads is None else reads
    planned = build(adapter, detach).forward(micro, layers, lambda seen: route)
    with torch.no_grad():
        expected = adapter.forward(micro)
    assert planned.whole is not None
    for _ in range(2):
        torch.testing.assert_close(planned.whole().final_ND, expected.hidden_RD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("detach", ["const", "live"])
def test_behind_the_last_layer_dropped_positions_are_not_computed(detach: Detach) -> None:
    """Its matrices but those of keys and values multiply kept rows alone, forward and backward."""
    micro, route = ROUTES["packed rows, empty slots"]
    model = small_model("llama")
    adapter = Adapter(model)
    weights = adapter.family.weights(len(adapter.layers) - 1)
    seen: dict[str, list[int]] = {name: [] for name in ("o", "gate", "up", "down")}
    pointers = {getattr(weights, name).data_ptr(): name for name in seen}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for tensor in args:
                if isinstance(tensor, Tensor) and tensor.data_ptr() in pointers and func is torch.ops.aten.mm.default:
                    seen[pointers[tensor.data_ptr()]].append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    with Watch():
        KeptRows(adapter, detach).forward(micro, 0, lambda _: route)
    slots = route.index_BK.numel()
    assert seen == {name: [slots] for name in seen}


# Skip


def skip_by_hand(model: PreTrainedModel, micro: MicroBatch, route: TokenRoute, entry: int, exit: int) -> Tensor:
    """The loss of all positions, one document at a time, by the model's layers."""
    adapter = Adapter(model)
    mask = kept_mask(micro, route)
    total = torch.zeros(())
    for row, positions in enumerate(micro.positions_BT.tolist()):
        starts = [i for i, p in enumerate(positions) if p == 0]
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
            places = torch.arange(end - start).unsqueeze(0)
            hidden = adapter.family.embed(micro.tokens_BT[row : row + 1, start:end], places)
            kept = mask[row, start:end]

            def run(x: Tensor, at: Tensor, layers: range) -> Tensor:
                for i in layers:
                    shape = adapter.shapes[i]
                    rotary = adapter.family.rotary(x, at)
                    extra = {} if shape.rotary is None else {"position_embeddings": rotary[shape.rotary]}
                    seen = document_mask(torch.zeros(1, x.shape[1], dtype=torch.int64), shape.window)
                    out = adapter.layers[i](x, attention_mask=seen, **extra)
                    x = out if isinstance(out, Tensor) else out[0]
                return x

            count = len(adapter.layers)
            hidden = run(hidden, places, range(entry))
            if kept.any():
                middle = run(hidden[:, kept], places[:, kept], range(entry, count - exit))
                hidden = hidden.masked_scatter(kept[None, :, None], middle)
            hidden = run(hidden, places, range(count - exit, count))
            logits = adapter.family.norm(hidden)[0] @ adapter.head_VD.mT
            total = total + F.cross_entropy(logits, micro.labels_BT[row, start:end], ignore_index=-100, reduction="sum")
    return total / micro.labelled


SKIPS = [
    "packed rows, empty slots",
    "one position",
    "a row with nothing kept",
    "empty slots at a labelled position",
    "everything",
]


@pytest.mark.parametrize(
    ("family", "case", "entry", "exit"),
    [
        *((family, case, 1, 1) for family in CONFIGS for case in SKIPS),
        *(("qwen3", case, *span) for case in SKIPS for span in ((0, 0), (0, 2), (2, 0))),
    ],
)
def test_skip_equals_one_document_at_a_time(family: str, case: str, entry: int, exit: int) -> None:
    micro, route = ROUTES[case]
    model = small_model(family)
    plain = copy.deepcopy(model)
    loss = skip_by_hand(plain, micro, route, entry, exit)
    loss.backward()
    planned = Skip(Adapter(model), entry, exit).forward(micro, 0, lambda seen: route)
    assert planned.route is None
    found = NextToken().loss(planned.stream, micro, planned.route, torch.tensor(1 / micro.labelled))
    found.total.backward()
    assert_same((found.reported, gradients(model)), (loss.detach(), gradients(plain)))


@pytest.mark.parametrize(("entry", "exit"), [(2, 1), (0, 3), (-1, 1)])
def test_a_span_that_leaves_no_layer_is_refused(entry: int, exit: int) -> None:
    with pytest.raises(ValueError, match="accepted: at least one layer"):
        Skip(Adapter(small_model("llama")), entry, exit)
