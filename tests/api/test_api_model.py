"""CGGRModel and its router against plain Hugging Face models, hooks and brute force."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_calls import (
    CASES,
    ROTARY,
    ROWS,
    WIDTH,
    Batch,
    assert_close,
    batch,
    gradients,
    keep_all,
    packed,
    selecting,
)
from small_models import CONFIGS, small_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from cggr_ray import CGGRModel, create_truncated_router
from cggr_ray.api.batches import prepare
from cggr_ray.api.model import mean_loss
from cggr_ray.models.adapter import Stream
from cggr_ray.routing.route import TokenRoute
from cggr_ray.schema import KEPT_LOSS, ROUTER_KEPT_FRACTION, TRAIN_LOSS
from cggr_ray.sparse.plan import Planned

CASES += [(family, "left") for family in ROTARY]


@pytest.mark.parametrize(("family", "padding"), CASES)
def test_before_the_warm_up_it_is_the_model_s_own_loss(family: str, padding: str) -> None:
    inputs = packed() if padding == "packed" else batch(padding)
    model = small_model(family)
    expected = copy.deepcopy(model)(**inputs).loss
    expected_model = copy.deepcopy(model)
    expected_model(**inputs).loss.backward()
    cggr = keep_all(model)
    loss = cggr(**inputs)
    loss.backward()
    assert loss.ndim == 0
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_close(gradients(model), gradients(expected_model))
    assert cggr.metrics() == {TRAIN_LOSS: pytest.approx(expected.item(), rel=1e-5), ROUTER_KEPT_FRACTION: 1.0}


def labels_by_hand(inputs: Batch) -> list[list[int]]:
    rows = []
    for b, labels in enumerate(inputs["labels"].tolist()):
        mask = inputs["attention_mask"][b].tolist() if "attention_mask" in inputs else [1] * WIDTH
        places = inputs["position_ids"][b].tolist() if "position_ids" in inputs else [1] * WIDTH
        row = [-100] * WIDTH
        for t in range(WIDTH - 1):
            if mask[t] and mask[t + 1] and places[t + 1] != 0:
                row[t] = labels[t + 1]
        rows.append(row)
    return rows


@pytest.mark.parametrize("kind", ["none", "right", "left", "packed"])
def test_labels_documents_and_positions_of_a_batch(kind: str) -> None:
    inputs = packed() if kind == "packed" else batch(kind)
    masked = dict(inputs, labels=inputs["input_ids"])
    for given in (inputs, masked):
        micro, faults = prepare(
            given["input_ids"], given.get("attention_mask"), given["labels"], given.get("position_ids"), False
        )
        assert micro.labels_BT.tolist() == labels_by_hand(given) and not faults.any()
    starts = (micro.positions_BT.flatten() == 0).nonzero().flatten().tolist()
    offsets = micro.document_starts.tolist()
    assert offsets[: len(starts)] == starts and set(offsets[len(starts) :]) == {ROWS * WIDTH}
    if kind == "left":
        assert micro.positions_BT[0].tolist() == [*range(4), *range(13)]
    if kind == "packed":
        assert torch.equal(micro.positions_BT, inputs["position_ids"])


def combined(logits: Tensor, labels: Tensor) -> Tensor:
    """Scores by the definition, in float64; -inf without a label."""
    p = logits.double().softmax(-1)
    top = p.topk(2).values
    nll = -p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1).log()
    found = -(p * p.log()).sum(-1) - top[..., 0] + 1 - (top[..., 0] - top[..., 1]) + nll
    return torch.where(labels >= 0, found, -torch.inf)


def kept_by_hand(logits: Tensor, labels: Tensor, ratio: float) -> Tensor:
    count = round(ratio * int((labels >= 0).sum()))
    kept = combined(logits, labels).flatten().topk(count).indices
    return torch.zeros(labels.numel(), dtype=torch.bool).index_fill_(0, kept, True).view(labels.shape)


def detached_loss(model: PreTrainedModel, inputs: Batch, kept_BT: Tensor) -> Tensor:
    """The loss of the kept positions by the model itself; at every layer's input the others are constants."""

    def pre(module: nn.Module, args: Any, keywords: Any) -> Any:
        hidden = args[0] if args else keywords["hidden_states"]
        hidden = torch.where(kept_BT.unsqueeze(-1), hidden, hidden.detach())
        return ((hidden, *args[1:]), keywords) if args else (args, keywords | {"hidden_states": hidden})

    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    handles = [layer.register_forward_pre_hook(pre, with_kwargs=True) for layer in layers]
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask")).logits
    for handle in handles:
        handle.remove()
    return F.cross_entropy(logits[kept_BT], torch.tensor(labels_by_hand(inputs))[kept_BT])


@pytest.mark.parametrize("family", CONFIGS)
def test_token_mode_is_the_gradient_of_the_hardest_positions(family: str) -> None:
    inputs = batch("right")
    model = small_model(family)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        logits = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    labels = torch.tensor(labels_by_hand(inputs))
    kept = kept_by_hand(logits, labels, 0.3)
    expected = detached_loss(plain, inputs, kept)
    expected.backward()
    cggr = selecting(model, detach="live")
    loss = cggr(**inputs)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_close(gradients(model), gradients(plain))
    found = cggr.metrics()
    assert found[KEPT_LOSS] == pytest.approx(expected.item(), rel=1e-5)
    assert found[ROUTER_KEPT_FRACTION] == pytest.approx(int(kept.sum()) / int((labels >= 0).sum()))


@pytest.mark.parametrize("options", [{"plan": "two_pass"}, {"gradient_checkpointing": True}, {"plan": "dense"}])
def test_other_plans_have_the_same_loss(options: dict[str, Any]) -> None:
    inputs, model = batch("left"), small_model("qwen3")
    expected = selecting(model)(**inputs)
    expected.backward()
    one = gradients(model)
    found = selecting(model, **options)(**inputs)
    found.backward()
    torch.testing.assert_close(found, expected)
    if "plan" not in options or options["plan"] == "two_pass":
        assert_close(gradients(model), one)


def truncated(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A copy with fewer layers."""
    found = copy.deepcopy(model)
    if hasattr(found, "transformer"):
        found.transformer.h = found.transformer.h[:layers]
    else:
        found.model.layers = found.model.layers[:layers]
        found.config.num_hidden_layers = layers
    return found


@pytest.mark.parametrize(("family", "padding"), [case for case in CASES if case[1] in ("right", "left")])
def test_a_truncated_router_is_the_model_cut_off(family: str, padding: str) -> None:
    inputs, model = batch(padding), small_model(family)
    mask, labels = inputs["attention_mask"], torch.tensor(labels_by_hand(inputs))
    before = dict(model.named_parameters())
    router = create_truncated_router(model, num_layers=2)
    expected = truncated(model, 2)(input_ids=inputs["input_ids"], attention_mask=mask).logits
    found = router(inputs["input_ids"], mask)
    torch.testing.assert_close(found[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-4)
    scores = router.scores(**inputs)
    assert scores.dtype == torch.float32 and not found.requires_grad and not isinstance(router, nn.Module)
    torch.testing.assert_close(scores.double(), combined(expected, labels), rtol=1e-4, atol=1e-4)
    assert dict(model.named_parameters()).keys() == before.keys()


def test_a_router_decides_and_shares_its_layers() -> None:
    inputs, model = batch("right"), small_model("llama")
    router = create_truncated_router(model, num_layers=1)
    kept = kept_by_hand(
        router(inputs["input_ids"], inputs["attention_mask"]), torch.tensor(labels_by_hand(inputs)), 0.3
    )
    plain = copy.deepcopy(model)
    expected = detached_loss(plain, inputs, kept)
    expected.backward()
    cggr = selecting(model, router=router, detach="live")
    calls: list[int] = []
    handle = model.model.norm.register_forward_hook(lambda *_: calls.append(0))
    loss = cggr(**inputs)
    handle.remove()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_close(gradients(model), gradients(plain))
    assert len(calls) == 2, "one norm for the router, one for the loss"
    own = {f"model.{name}" for name in model.state_dict()}
    assert set(cggr.state_dict()) == own | {"curriculum.num_steps", "curriculum.confidence"}
    assert [id(p) for p in cggr.parameters()] == [id(p) for p in model.parameters()]


@pytest.mark.parametrize("layers", [None, 2])
def test_sequence_mode_trains_the_hardest_rows(layers: int | None) -> None:
    inputs, model = batch("right", seed=4), small_model("qwen2")
    inputs["labels"][2] = -100
    plain, labels = copy.deepcopy(model), torch.tensor(labels_by_hand(inputs))
    scorer = plain if layers is None else truncated(plain, layers)
    scores = combined(scorer(input_ids=inputs["input_ids"]).logits, labels)
    means = torch.stack([row[row > -torch.inf].mean() for row in scores[:2]])
    row = int(means.argmax())
    expected = plain(**{name: value[row : row + 1] for name, value in inputs.items()}).loss
    expected.backward()
    router = None if layers is None else create_truncated_router(model, layers)
    cggr = selecting(model, mode="sequence", router=router)
    loss = cggr(**inputs)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_close(gradients(model), gradients(plain))
    share = int((labels[row] >= 0).sum()) / int((labels >= 0).sum())
    assert cggr.metrics()[ROUTER_KEPT_FRACTION] == pytest.approx(share)


def test_the_kept_count_follows_the_steps_and_the_confidence() -> None:
    inputs, model = batch(), small_model("llama")
    labelled = sum(label >= 0 for row in labels_by_hand(inputs) for label in row)
    cggr = CGGRModel(model, warmup_steps=4)
    for step in range(7):
        cggr(**inputs)
        base = 1 - min(1, step / 4) * 0.75
        found = cggr.metrics()
        kept = round(found[ROUTER_KEPT_FRACTION] * labelled)
        # Nothing has been scored at a ratio of 1, and what is scored counts two calls later.
        raised = base * (1 + 0.5 * (1 - found["router/confidence"])) if step >= 3 else base
        assert kept == round(min(1, raised) * labelled), step
        cggr.step()


def test_autocast_changes_nothing() -> None:
    model = small_model("llama")
    expected = selecting(model)(**batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selecting(model)(**batch()), expected)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_loop_learns(family: str) -> None:
    model = small_model(family)
    cggr = CGGRModel(model, router=create_truncated_router(model, 1), warmup_steps=3)
    optimizer = torch.optim.AdamW(cggr.parameters(), lr=1e-2)
    inputs = batch("right")
    first = cggr.eval()(**inputs).loss.item()
    cggr.train()
    for _ in range(8):
        cggr(**inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        cggr.step()
    assert cggr.eval()(**inputs).loss.item() < first - 0.5


def test_a_saved_model_goes_on_as_if_nothing_had_been() -> None:
    def make() -> tuple[CGGRModel, torch.optim.Optimizer]:
        cggr = CGGRModel(small_model("llama"), selection="stratified", warmup_steps=4, seed=3)
        return cggr, torch.optim.SGD(cggr.parameters(), lr=0.05)

    def run(cggr: CGGRModel, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for step in steps:
            loss = cggr(**batch(seed=step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            cggr.step()
            losses.append(loss.item())
        return losses

    whole = run(*make(), range(8))
    first, second = make(), make()
    assert run(*first, range(5)) == whole[:5]
    second[0].load_state_dict(first[0].state_dict())
    assert run(*second, range(5, 8)) == whole[5:]


def test_micro_batches_add_up_with_the_count_of_the_step() -> None:
    inputs, model = batch("right"), small_model("llama")
    plain = copy.deepcopy(model)
    plain(**inputs).loss.backward()
    count = sum(label >= 0 for row in labels_by_hand(inputs) for label in row)
    cggr = keep_all(model, return_dict=True)
    for rows in (slice(0, 1), slice(1, 3)):
        part = {name: value[rows] for name, value in inputs.items()}
        cggr(**part, num_items_in_batch=torch.tensor(count)).loss.backward()
    assert_close(gradients(model), gradients(plain))
    assert cggr(**inputs, return_dict=False).ndim == 0


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_scaled_loss_in_fp16_is_as_exact_as_plain_pytorch(
    routed: bool, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many labels that 1 / labelled, times the probability of a word, is below the smallest number of fp16."""
    rows, width, words, factor = 2, 1024, 1024, 1024.0
    if chunked:
        monkeypatch.setattr("cggr_ray.kernels.selected_ce.op.CHUNK_BYTES", {"cpu": words * 2 * 700})
    g = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(rows * width, 16, generator=g).half()
    head_VD = (torch.randn(words, 16, generator=g) / 4).half()
    labels_BT = torch.randint(words, (rows, width), generator=g)
    labels_BT[:, :9] = -100
    micro, _ = prepare(labels_BT.clamp_min(0), None, labels_BT, None, False)
    route = None
    if routed:
        route = TokenRoute(torch.arange(width).repeat(rows, 1), torch.ones(rows, width), {})

    def gradients_of(loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (hidden_ND, head_VD)]
        scaled = loss(*leaves) * factor
        return tuple(grad.double() / factor for grad in torch.autograd.grad(scaled, leaves))

    def plain(hidden: Tensor, head: Tensor) -> Tensor:
        logits = hidden @ head.mT
        return F.cross_entropy(logits.float() if logits.dtype == torch.half else logits, micro.labels_BT.flatten())

    exact = gradients_of(plain, torch.float64)
    expected = gradients_of(plain, torch.half)
    found = gradients_of(lambda hidden, head: mean_loss(Planned(Stream(hidden, head), route, {}), micro), torch.half)
    for ours, theirs, wanted in zip(found, expected, exact, strict=True):
        error, usual = ((got - wanted).norm() / wanted.norm() for got in (ours, theirs))
        assert error < 1e-2 and error <= 1.5 * usual


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_are_whole_numbers_of_any_type(dtype: torch.dtype) -> None:
    model, inputs = small_model("llama"), batch()["input_ids"]
    for cggr in (keep_all(model), selecting(model)):
        assert torch.equal(cggr(inputs, labels=inputs.to(dtype)), cggr(inputs, labels=inputs))


def test_without_a_label_the_loss_is_zero() -> None:
    model = small_model("llama")
    for cggr in (keep_all(model), selecting(model), selecting(model, mode="sequence")):
        loss = cggr(input_ids=batch()["input_ids"], labels=torch.full((ROWS, WIDTH), -100))
        loss.backward()
        assert loss.item() == 0 and not any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"plan": "two_pass"}, {"plan": "dense"}, {"mode": "sequence"}, {"router": 1}])
def test_hidden_states_that_are_no_numbers_show_in_the_loss(options: dict[str, Any]) -> None:
    """In those of one token, which top-k by scores of NaN would never keep."""
    model, inputs = small_model("llama"), batch()
    router = create_truncated_router(model, options["router"]) if "router" in options else None
    cggr = selecting(model, **options | {"router": router})
    tokens = inputs["input_ids"].remainder(90)
    with torch.no_grad():
        model.get_input_embeddings().weight[95] = torch.nan
        model.get_output_embeddings().weight = nn.Parameter(torch.randn(96, 32))
    assert cggr(input_ids=tokens, labels=tokens).isfinite()
    tokens[1, 9] = 95
    loss = cggr(input_ids=tokens, labels=tokens)
    loss.backward()
    assert loss.isnan() and model.model.layers[0].mlp.up_proj.weight.grad.isnan().any()
