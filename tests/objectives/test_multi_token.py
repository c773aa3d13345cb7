"""Every form of multi-token prediction against loops over positions: Hugging Face alone, a document at a time, float64.

The truth puts an extra layer where the model's last one stands (`trunk_heads`), or alone into an empty model
(`sequential`), and calls the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_batches import LENGTHS, VOCABULARY, document_spans, packed
from small_models import CONFIGS, small_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from cggr_ray.data.batch import MicroBatch
from cggr_ray.kernels.selected_ce import op
from cggr_ray.models.adapter import Adapter, Stream
from cggr_ray.objectives.multi_token import Heads, MultiToken, Sequential, SharedLogits, TrunkHeads
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.objectives.objective import Loss, Objective
from cggr_ray.progress import Progress
from cggr_ray.routing.route import TokenRoute
from cggr_ray.sparse.plan import Dense, Skip

WIDTH = 21
MICRO = packed(LENGTHS, WIDTH)
ODD = packed([[13], [2, 10], [1, 1]], 13, seed=4)
FRACTION = 0.25
PROGRESS = Progress(3, FRACTION, 1.0, 100)
Own = dict[str, Tensor]

FORMS: dict[str, Any] = {
    "shared_logits": SharedLogits((0.5, 0.25), (0.5, 0.75)),
    "heads": Heads(3, 0.2),
    "trunk_heads": TrunkHeads(3, 0.7),
    "sequential": Sequential(0.3, 0.1, 0.0, 0.5),
}
# Weights of the targets two, three, ... steps ahead at a quarter of the budget, worked out by hand.
WEIGHTS = {
    "shared_logits": [0.5, 0.125],
    "heads": [0.2, 0.1, 0.05],
    "trunk_heads": [0.7, 0.7],
    "sequential": [0.2],
}


def body_of(model: Any) -> tuple[Any, str]:
    return (model.transformer, "h") if hasattr(model, "transformer") else (model.model, "layers")


@contextmanager
def layers_are(model: Any, layers: list[nn.Module]) -> Iterator[None]:
    body, name = body_of(model)
    before = getattr(body, name)
    setattr(body, name, nn.ModuleList(layers))
    try:
        yield
    finally:
        setattr(body, name, before)


def logits_ahead(name: str, model: Any, own: nn.Module, tokens: Tensor) -> list[Tensor]:
    """(T, V) of every target after the next one, for one document."""
    body, layers = body_of(model)
    hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
    if name == "heads":
        return [(hidden @ weight.T)[0] for weight in own.parameters()]
    if name == "trunk_heads":
        found = []
        for layer in own.get_submodule("layers").children():
            with layers_are(model, [*list(getattr(body, layers))[:-1], layer]):
                found.append(model(input_ids=tokens).logits[0])
        return found
    parts: Any = own
    embedded = model.get_input_embeddings()(torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1))
    joined = torch.cat([parts.embedding_norm(embedded), parts.hidden_norm(hidden)], dim=-1) @ parts.join.weight.T
    if hasattr(body, "wpe"):
        joined = joined - body.wpe(torch.arange(tokens.shape[1]))
    with layers_are(model, list(parts.layers)):
        return [model(inputs_embeds=joined).logits[0]]


def truth(
    name: str, model: Any, own: nn.Module, micro: MicroBatch, weights_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, next-token part, auxiliary part), position by position."""
    main, auxiliary = torch.zeros(2, dtype=torch.float64).unbind()
    for row, span in document_spans(micro):
        tokens = micro.tokens_BT[row : row + 1, span]
        first = model(input_ids=tokens).logits[0]
        ahead = [first] * len(WEIGHTS[name]) if name == "shared_logits" else logits_ahead(name, model, own, tokens)
        labels, weights = micro.labels_BT[row, span].tolist(), weights_BT[row, span].tolist()
        for t, weight in enumerate(weights):
            if labels[t] >= 0:
                main = main + weight * F.cross_entropy(first[t], torch.tensor(labels[t]))
            for j, (logits, share) in enumerate(zip(ahead, WEIGHTS[name], strict=True)):
                if t + 1 + j < len(labels) and labels[t + 1 + j] >= 0:
                    loss = F.cross_entropy(logits[t], torch.tensor(labels[t + 1 + j]))
                    auxiliary = auxiliary + weight * share * loss
    total = (main + auxiliary) / micro.labelled
    total.backward()
    return total.detach(), main.detach() / micro.labelled, auxiliary.detach() / micro.labelled


def route_of(micro: MicroBatch, slots: int) -> TokenRoute:
    """Labelled positions by chance, empty slots where a row has fewer, weights that are no ones."""
    g = torch.Generator().manual_seed(slots)
    index, weights = [], []
    for labels in micro.labels_BT:
        labelled = (labels >= 0).nonzero().flatten()
        kept = labelled[torch.randperm(len(labelled), generator=g)[:slots]].sort().values
        empty = slots - len(kept)
        index.append(F.pad(kept, (0, empty), value=int(kept[-1]) if len(kept) else 0))
        weights.append(F.pad(torch.rand(len(kept), generator=g) + 0.5, (0, empty)))
    return TokenRoute(torch.stack(index), torch.stack(weights))


def weights_of(micro: MicroBatch, route: TokenRoute | None) -> Tensor:
    weights = torch.ones(micro.labels_BT.shape)
    return weights if route is None else torch.zeros_like(weights).scatter_add_(1, route.index_BK, route.weights_BK)


def scale_of(micro: MicroBatch) -> Tensor:
    return torch.tensor(1 / micro.labelled)


def randomised(objective: Objective) -> nn.Module:
    """What the objective owns, with random norms and biases, so that no term of a gradient vanishes; or nothing."""
    own: nn.Module = getattr(objective, "own", nn.Module())
    g = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.2)
    return own


class Case:
    """A form on a model, and the same model and parameters in float64 for the truth."""

    def __init__(
        self, name: str, family: str, checkpointing: bool = False, next_token: NextToken | None = None
    ) -> None:
        self.name, model = name, small_model(family)
        self.exact: PreTrainedModel = copy.deepcopy(model).double()
        self.adapter = Adapter(model, checkpointing)
        self.objective = MultiToken(FORMS[name], next_token or NextToken()).build(self.adapter, 5)
        self.own = randomised(self.objective)
        self.exact_own = copy.deepcopy(self.own).double()
        self.objective.begin(PROGRESS)

    def stream(self, micro: MicroBatch) -> Stream:
        return Dense(self.adapter).forward(micro, 0, lambda seen: None).stream

    def loss(self, micro: MicroBatch, route: TokenRoute | None) -> Loss:
        return self.objective.loss(self.stream(micro), micro, route, scale_of(micro))

    def named(self) -> list[tuple[str, Tensor, Tensor]]:
        """(name, ours, the truth's) of every parameter."""
        pairs = zip(self.adapter.model.named_parameters(), self.exact.parameters(), strict=True)
        more = zip(self.own.named_parameters(), self.exact_own.parameters(), strict=True)
        return [(name, p, q) for (name, p), q in (*pairs, *more)]

    def check(self, micro: MicroBatch, route: TokenRoute | None) -> None:
        found = self.loss(micro, route)
        found.total.backward()
        total, main, auxiliary = truth(self.name, self.exact, self.exact_own, micro, weights_of(micro, route))
        assert found.auxiliary is not None
        for mine, exact in ((found.total, total), (found.reported, main), (found.auxiliary, auxiliary)):
            assert mine.item() == pytest.approx(exact.item(), rel=2e-5)
        for name, p, q in self.named():
            assert p.grad is not None and q.grad is not None, name
            assert p.grad.any(), name
            error = (p.grad.double() - q.grad).norm() / q.grad.norm()
            assert error < 5e-4, (name, error)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_loss_and_gradients_are_those_of_a_loop_over_positions(name: str, routed: bool) -> None:
    for family in ("llama", "llama_biased"):
        route = route_of(MICRO, 7) if routed else None
        assert route is None or not route.filled_BK.all()
        Case(name, family).check(MICRO, route)


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"llama", "llama_biased"}))
@pytest.mark.parametrize("name", ["trunk_heads", "sequential"])
def test_extra_layers_run_as_the_familys_own(name: str, family: str) -> None:
    Case(name, family).check(ODD, None)


@pytest.mark.parametrize("name", FORMS)
def test_chunks_checkpoints_and_rows_of_an_odd_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(op.CHUNK_BYTES, "cpu", 5 * VOCABULARY * 4)
    Case(name, "llama", checkpointing=True).check(ODD, route_of(ODD, 3))


@pytest.mark.parametrize("name", FORMS)
def test_nothing_of_all_rows_by_the_vocabulary_exists(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 40
    monkeypatch.setitem(op.CHUNK_BYTES, "cpu", rows * VOCABULARY * 4)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else [out]:
                if isinstance(value, Tensor) and value.ndim and value.shape[-1] == VOCABULARY:
                    largest = max(largest, value.numel() // VOCABULARY)
            return out

    case = Case(name, "llama")
    with Watch():
        case.loss(MICRO, None).total.backward()
    assert 0 < largest <= rows < MICRO.labels_BT.numel()


def taken(case: Case, loss: Loss) -> dict[str, Tensor]:
    loss.total.backward()
    found = {name: p.grad.clone() for name, p, _ in case.named() if p.grad is not None}
    for _, p, _ in case.named():
        p.grad = None
    return found


@pytest.mark.parametrize("name", ["shared_logits", "heads"])
def test_a_stream_of_kept_rows_is_enough_where_no_layer_is_added(name: str) -> None:
    case, route = Case(name, "llama"), route_of(MICRO, 7)
    assert FORMS[name].runs_on_kept_rows()
    index = route.flat_index(WIDTH)
    expected = case.loss(MICRO, route)
    gradients = taken(case, expected)
    whole = case.stream(MICRO)
    kept = replace(whole, hidden_RD=whole.hidden_RD.index_select(0, index), index_R=index, trunk_BTD=None)
    found = case.objective.loss(kept, MICRO, route, scale_of(MICRO))
    assert torch.equal(found.total, expected.total) and torch.equal(found.index_K, expected.index_K)
    assert torch.equal(found.nll_K.isnan(), ~route.filled_BK.flatten())
    for key, gradient in taken(case, found).items():
        torch.testing.assert_close(gradient, gradients[key], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", FORMS)
def test_the_reported_loss_is_the_next_tokens(name: str) -> None:
    case, route = Case(name, "llama"), route_of(MICRO, 7)
    found = case.loss(MICRO, route)
    expected = NextToken().loss(case.stream(MICRO), MICRO, route, scale_of(MICRO))
    assert torch.equal(found.reported, expected.reported)
    assert torch.equal(found.nll_K.nan_to_num(-1), expected.nll_K.nan_to_num(-1))
    assert not found.nll_K.requires_grad and not found.reported.requires_grad


@pytest.mark.parametrize("name", FORMS)
def test_the_next_tokens_settings_are_added_once(name: str) -> None:
    settings = NextToken(label_smoothing=0.1, entropy_bonus=0.05)
    plain, more = Case(name, "llama"), Case(name, "llama", next_token=settings)
    stream = plain.stream(MICRO)
    without = NextToken().loss(stream, MICRO, None, scale_of(MICRO))
    difference = settings.loss(stream, MICRO, None, scale_of(MICRO)).total - without.total
    found, expected = more.loss(MICRO, None), plain.loss(MICRO, None)
    torch.testing.assert_close(found.total, expected.total + difference, rtol=1e-5, atol=0)
    assert found.auxiliary is not None and torch.equal(found.reported, expected.reported)
    torch.testing.assert_close(found.reported + found.auxiliary, found.total.detach())


@pytest.mark.parametrize("name", FORMS)
def test_positions_that_skipped_layers_have_targets_too(name: str) -> None:
    """Under `Skip` every position is in the stream, and in what enters the last layer."""
    case = Case(name, "llama")
    every = TokenRoute(torch.arange(WIDTH).repeat(len(LENGTHS), 1), torch.ones(len(LENGTHS), WIDTH))
    skipped = Skip(case.adapter, 1, 1).forward(MICRO, 0, lambda seen: every)
    assert skipped.route is None
    found = case.objective.loss(skipped.stream, MICRO, None, scale_of(MICRO))
    torch.testing.assert_close(found.total, case.loss(MICRO, None).total, rtol=1e-5, atol=0)
    fewer = Skip(case.adapter, 1, 1).forward(MICRO, 0, lambda seen: route_of(MICRO, 4)).stream
    assert not torch.equal(case.objective.loss(fewer, MICRO, None, scale_of(MICRO)).total, found.total)
