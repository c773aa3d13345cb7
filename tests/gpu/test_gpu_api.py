"""The public API on bf16 models on the GPU: losses against float32 on the CPU, loops, what is the caller's after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from on_gpu import DEVICE, DTYPE, no_waiting, small_twins
from safetensors.torch import load_model, save_model
from small_models import small_model
from torch import Tensor, nn

from cggr_ray import (
    AdamW,
    CGGRLoss,
    CGGRModel,
    CGGRWrapper,
    GaLore,
    Int8Blockwise,
    MatrixOptimizer,
    Muon,
    create_truncated_router,
)
from cggr_ray.schema import KEPT_LOSS, ROUTER_KEPT_FRACTION, TRAIN_LOSS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROWS, WIDTH, VOCABULARY = 4, 32, 96
Make = Callable[[Any], nn.Module]


def inputs_on(device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Rows padded on the right, as a collator makes them."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (ROWS, WIDTH), generator=g)
    mask = torch.arange(WIDTH) < torch.tensor([[WIDTH], [20], [WIDTH], [27]])
    labels = torch.where(mask, tokens, -100)
    return {name: x.to(device) for name, x in zip(("input_ids", "attention_mask", "labels"),
                                                  (tokens, mask.long(), labels), strict=True)}  # fmt: skip


def with_router(model: Any, **options: Any) -> CGGRModel:
    return CGGRModel(model, router=create_truncated_router(model, 1), **options)


FORMS: dict[str, Make] = {
    "own": partial(CGGRModel, warmup_steps=0),
    "router": partial(with_router, warmup_steps=0),
    "sequence": partial(CGGRModel, mode="sequence", min_tokens_ratio=0.5, warmup_steps=0),
    "wrapper": partial(CGGRWrapper, num_buckets=3, warmup_steps=0),
}
CASES = [(form, "llama") for form in FORMS] + [("own", "gemma3"), ("own", "gpt2")]


@pytest.mark.parametrize(("form", "family"), CASES)
def test_losses_are_near_those_of_float32(form: str, family: str) -> None:
    """The hardest positions of rounded scores may be others at the margin, where a loss is like the next."""
    for low, exact in small_twins(family):
        expected, found = FORMS[form](exact), FORMS[form](low)
        loss = found(**inputs_on(DEVICE))
        loss.backward()
        assert loss.item() == pytest.approx(expected(**inputs_on(torch.device("cpu"))).item(), rel=0.02)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters())
        seen, wanted = found.metrics(), expected.metrics()
        assert seen.keys() == wanted.keys() and (TRAIN_LOSS if form == "wrapper" else KEPT_LOSS) in seen
        if ROUTER_KEPT_FRACTION in seen:
            assert seen[ROUTER_KEPT_FRACTION] == pytest.approx(wanted[ROUTER_KEPT_FRACTION])


@pytest.mark.parametrize(("form", "family"), CASES)
def test_a_loop_learns_and_the_model_is_the_caller_s(form: str, family: str) -> None:
    model = small_model(family).to(DEVICE, DTYPE)
    model.set_attn_implementation("sdpa")
    untouched, inputs = copy.deepcopy(model), inputs_on(DEVICE)
    wrapped = FORMS[form](model)
    wrapped(**inputs).backward()
    wrapped.zero_grad()
    prompt = inputs["input_ids"][:, :5]
    generating = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.config._attn_implementation == "sdpa" and model.training
    generated = model.eval().generate(prompt, **generating)
    assert torch.equal(generated, untouched.eval().generate(prompt, **generating))

    first = model(**inputs).loss.item()
    assert first == pytest.approx(untouched(**inputs).loss.item(), rel=1e-3)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    wrapped.train()
    for _ in range(8):
        wrapped(**inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        wrapped.step()
    assert model.eval()(**inputs).loss.item() < first - 0.5
    assert model.config._attn_implementation == "sdpa"
    assert model.generate(prompt, **generating).shape == (ROWS, 9)


@pytest.mark.parametrize("form", FORMS)
def test_a_loop_never_waits(form: str) -> None:
    """But for what was measured two calls before, which has long arrived; the third call sees it, so three come first.

    Documented exception: packed rows, whose documents are counted.
    """
    model = small_model("llama").to(DEVICE, DTYPE)
    wrapped, inputs = FORMS[form](model), inputs_on(DEVICE)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.0)

    def step() -> Tensor:
        loss = wrapped(**inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wrapped.step()
        return loss.detach()

    losses = [step() for _ in range(3)]
    with no_waiting(events=False):
        losses += [step() for _ in range(3)]
    assert all(loss.isfinite() for loss in losses)


def hidden_states(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, head, labels): the same numbers, of bf16, in any dtype."""
    g = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(4, 50, 64, generator=g), torch.randn(300, 64, generator=g) / 4
    labels = torch.randint(300, (4, 50), generator=g)
    labels[torch.rand(4, 50, generator=g) < 0.2] = -100
    hidden, head = (x.bfloat16().to(device, dtype).requires_grad_() for x in (hidden, head))
    return hidden, head, labels.to(device)


@pytest.mark.parametrize("form", ["hidden", "logits"])
@pytest.mark.parametrize("options", [{"scoring": "combined"}, {"scoring": "loss", "selection": "sequence_aware"}])
def test_a_criterion_is_near_that_of_float32_and_never_waits(form: str, options: dict[str, Any]) -> None:
    def run(criterion: CGGRLoss, hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = criterion.from_hidden(hidden, head, labels) if form == "hidden" else criterion(hidden @ head.mT, labels)
        loss.backward()
        criterion.step()
        return loss.detach(), hidden.grad, head.grad

    criterion, exact = (CGGRLoss(warmup_steps=0, dynamic_threshold=False, **options) for _ in range(2))
    found = run(criterion, *hidden_states(DEVICE, DTYPE))
    expected = run(exact, *hidden_states(torch.device("cpu"), torch.float32))
    assert found[0].item() == pytest.approx(expected[0].item(), rel=0.01)
    for gradient, wanted in zip(found[1:], expected[1:], strict=True):
        # One position of forty may be another, and each is a fortieth of the squared norm.
        assert (gradient.float().cpu() - wanted).norm() <= 0.3 * wanted.norm()
    kept = found[1].abs().sum(-1) > 0
    assert int(kept.sum()) == int((expected[1].abs().sum(-1) > 0).sum())

    again = hidden_states(DEVICE, DTYPE)
    with no_waiting(events=False):
        repeated = run(criterion, *again)
    assert repeated[0].item() == pytest.approx(found[0].item(), rel=1e-3)


@pytest.mark.parametrize(
    "selection", ["topk", "stratified", "stratified_top", "sequence_aware", "fixed_quota", "importance"]
)
def test_no_selection_makes_the_host_wait(selection: str) -> None:
    options = {"weights": "inverse_probability", "scoring": "gnorm"} if selection == "importance" else {}
    criterion = CGGRLoss(warmup_steps=0, selection=selection, **options)
    hidden, head, labels = hidden_states(DEVICE, DTYPE)
    for _ in range(3):
        criterion.from_hidden(hidden, head, labels).backward()
    with no_waiting(events=False):
        loss = criterion.from_hidden(hidden, head, labels)
        loss.backward()
    assert loss.isfinite()


def test_float32_on_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="precision 'fp32' on a GPU"):
        CGGRModel(small_model("llama").to(DEVICE))


@pytest.mark.parametrize("rules", [(), (Muon(state=Int8Blockwise()), AdamW(state=Int8Blockwise())), (GaLore(rank=8),)])
def test_the_public_optimizer_learns_as_on_a_cpu(rules: tuple[Any, ...]) -> None:
    """bf16 with float32 masters, compiled, against float32, eager; a step waits for nothing."""
    losses = []
    for device, dtype in ((torch.device("cpu"), torch.float32), (DEVICE, DTYPE)):
        model, batch = small_model("llama").to(device, dtype), inputs_on(device)
        optimizer = MatrixOptimizer(model, *rules)
        found = []
        for step in range(12):
            loss = model(**batch).loss
            loss.backward()
            with no_waiting() if device.type == "cuda" and step > 2 else nullcontext():
                optimizer.step()
            found.append(loss.detach())
        losses.append(torch.stack(found).cpu())
    torch.testing.assert_close(losses[1], losses[0], rtol=0.03, atol=0.03)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_an_optimizer_made_before_the_model_came_here_learns_as_one_made_here(tmp_path: Path) -> None:
    found = []
    for first in ("cpu", "cuda"):
        model, batch = small_model("llama").to(first, DTYPE), inputs_on(DEVICE)
        optimizer = MatrixOptimizer(model, GaLore(rank=8), AdamW(state=Int8Blockwise()))
        model.to(DEVICE)
        for _ in range(6):
            model(**batch).loss.backward()
            optimizer.step()
        found.append({name: value.detach().clone() for name, value in model.named_parameters()})
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=0.02, atol=2e-3)
    # Its parameters are tensors of their own to safetensors.
    save_model(model, str(tmp_path / "model.safetensors"))
    other = small_model("llama", seed=7).to(DEVICE, DTYPE)
    load_model(other, str(tmp_path / "model.safetensors"))
    assert all(torch.equal(value, found[1][name]) for name, value in other.named_parameters())
