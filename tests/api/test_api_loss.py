"""CGGRLoss and CGGRScorer against float64, brute force and loops written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cggr_ray import CGGRLoss, CGGRScorer
from cggr_ray.api.curriculum import StepCurriculum
from cggr_ray.routing.curriculum import DynamicThreshold
from cggr_ray.schema import KEPT_LOSS, ROUTER_CONFIDENCE, ROUTER_ENTROPY, ROUTER_KEPT_FRACTION, TRAIN_LOSS

SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "entropy": lambda p, y: -(p * p.log()).sum(),
    "entropy_confidence": lambda p, y: -(p * p.log()).sum() - p.max(),
    "margin": lambda p, y: 1 - (p.topk(2).values[0] - p.topk(2).values[1]),
    "loss": lambda p, y: -p[y].log(),
    "combined": lambda p, y: (
        -(p * p.log()).sum() - p.max() + 1 - (p.topk(2).values[0] - p.topk(2).values[1]) - p[y].log()
    ),
    "gnorm": lambda p, y: (p - F.one_hot(y, len(p))).norm(),
}


def batch(rows: int = 3, width: int = 14, vocabulary: int = 17, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocabulary, (rows, width), generator=g)
    targets[torch.rand(rows, width, generator=g) < 0.3] = -100
    return torch.randn(rows, width, vocabulary, generator=g) * 2, targets


def scores_by_hand(logits: Tensor, targets: Tensor, scoring: str) -> Tensor:
    found = torch.full(targets.shape, -torch.inf, dtype=torch.float64)
    for place in (targets >= 0).nonzero().tolist():
        at = tuple(place)
        found[at] = SCORES[scoring](logits[at].double().softmax(-1), targets[at])
    return found


def kept_by_hand(logits: Tensor, targets: Tensor, scoring: str, ratio: float) -> Tensor:
    """Flat positions of the hardest round(ratio labelled)."""
    count = max(1, round(ratio * int((targets >= 0).sum())))
    return scores_by_hand(logits, targets, scoring).flatten().topk(count).indices.sort().values


def plain(ratio: float = 0.25, **options: Any) -> CGGRLoss:
    return CGGRLoss(**{"min_tokens_ratio": ratio, "warmup_steps": 0, "dynamic_threshold": False} | options)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.6])
@pytest.mark.parametrize("scoring", SCORES)
def test_the_loss_is_the_mean_over_the_hardest_positions(scoring: str, ratio: float) -> None:
    logits, targets = batch()
    kept = kept_by_hand(logits, targets, scoring, ratio)
    logits.requires_grad_()
    expected = F.cross_entropy(logits.flatten(0, 1)[kept].double(), targets.flatten()[kept])
    expected_grad = torch.autograd.grad(expected, logits)[0]
    criterion = plain(ratio, scoring=scoring)
    loss = criterion(logits, targets)
    loss.backward()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad, expected_grad, rtol=1e-5, atol=1e-6)
    assert logits.grad.flatten(0, 1).abs().sum(1).nonzero().flatten().tolist() == kept.tolist()
    found = criterion.metrics()
    assert found[KEPT_LOSS] == pytest.approx(expected.item(), rel=1e-5)
    assert found[ROUTER_KEPT_FRACTION] == pytest.approx(len(kept) / int((targets >= 0).sum()))
    p = logits.detach()[targets >= 0].double().softmax(-1)
    assert found[ROUTER_CONFIDENCE] == pytest.approx(p.amax(-1).mean().item(), rel=1e-5)
    assert found[ROUTER_ENTROPY] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-5)


def test_targets_are_shifted_only_when_asked_and_rows_may_be_flat() -> None:
    logits, targets = batch()
    loss = plain(0.3)(logits, targets)
    assert torch.equal(loss, plain(0.3)(logits.flatten(0, 1), targets.flatten()))
    assert torch.equal(loss, plain(0.3)(logits, targets.int()))
    moved = torch.roll(targets, 1, dims=1)
    assert not torch.allclose(loss, plain(0.3)(logits, moved))
    sliced = plain(0.3)(logits[:, :-1], targets[:, 1:])
    assert torch.equal(plain(0.3)(logits, targets, shift=True), sliced)
    head = torch.eye(17)
    torch.testing.assert_close(plain(0.3).from_hidden(logits, head, targets, shift=True), sliced)
    strided = torch.empty(17, 14, 3).permute(2, 1, 0).copy_(logits)
    torch.testing.assert_close(plain(0.3)(strided, targets), loss)


@pytest.mark.parametrize(
    "selection", ["topk", "stratified", "stratified_top", "sequence_aware", "fixed_quota", "importance"]
)
@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_hidden_states_give_the_same_as_logits(selection: str, ratio: float) -> None:
    targets = batch()[1]
    g = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(3, 14, 8, generator=g), torch.randn(17, 8, generator=g)
    options = {"weights": "inverse_probability", "scoring": "gnorm"} if selection == "importance" else {}
    found = []
    for form in ("logits", "hidden"):
        criterion = plain(ratio, selection=selection, **options)
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss = criterion(h @ w.mT, targets) if form == "logits" else criterion.from_hidden(h, w, targets)
        loss.backward()
        found.append((loss.detach(), h.grad, w.grad))
        assert int((h.grad.abs().sum(-1) > 0).sum()) == round(ratio * int((targets >= 0).sum()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


class Watch(TorchDispatchMode):
    """The largest tensor and the operators that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.waits = 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "unique"):
            self.waits.append(func)
        return out


def test_hidden_states_never_make_all_logits_and_nothing_waits() -> None:
    hidden, head = torch.randn(2, 1024, 4, requires_grad=True), torch.randn(4096, 4, requires_grad=True)
    targets = torch.randint(4096, (2, 1024))
    criterion = CGGRLoss(min_tokens_ratio=0.25, warmup_steps=2, selection="stratified")
    criterion.step()
    with Watch() as watch:
        for _ in range(3):
            criterion.from_hidden(hidden, head, targets).backward()
            criterion.step()
    assert watch.waits == [] and watch.largest <= 2048 * 4096 // 4
    with Watch() as watch:
        criterion(hidden @ head.mT, targets).backward()
    assert watch.waits == []


def test_the_ratio_falls_linearly_with_the_steps() -> None:
    logits, targets = batch(rows=8, width=50)
    labelled = int((targets >= 0).sum())
    criterion = CGGRLoss(dynamic_threshold=False, warmup_steps=8, min_tokens_ratio=0.25)
    for step in range(11):
        leaf = logits.clone().requires_grad_()
        loss = criterion(leaf, targets)
        loss.backward()
        ratio = 1 - min(1, step / 8) * 0.75
        assert int((leaf.grad.abs().sum(-1) > 0).sum()) == round(ratio * labelled), step
        if step == 0:
            torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
            assert set(criterion.metrics()) == {TRAIN_LOSS, ROUTER_KEPT_FRACTION}
        criterion.step()


@pytest.mark.parametrize("rule", ["upstream", "corrected"])
def test_the_dynamic_threshold_reads_the_confidence_of_two_calls_before(rule: str) -> None:
    criterion = CGGRLoss(warmup_steps=0, min_tokens_ratio=0.2, threshold_sensitivity=0.8, threshold_rule=rule)
    running, reference, history = None, None, []
    for call in range(6):
        logits, targets = batch(rows=8, width=60, seed=call)
        logits = (logits * (0.2 + call)).requires_grad_()
        criterion(logits, targets).backward()
        if call < 2:
            ratio = 0.2
        elif rule == "upstream":
            ratio = 0.2 * (1 + (1 - history[call - 2]) * 0.8)
        else:
            ratio = 0.2 * max(0.5, 1 + 0.8 * (reference - history[call - 2]) / reference)
        kept = int((logits.grad.abs().sum(-1) > 0).sum())
        assert abs(kept - ratio * int((targets >= 0).sum())) <= 0.51, call
        seen = logits.detach().double().softmax(-1).amax(-1)[targets >= 0].mean().item()
        running = seen if rule == "upstream" or running is None else 0.95 * running + 0.05 * seen
        reference = running if reference is None else reference
        history.append(running)
        criterion.step()


@pytest.mark.parametrize(("rule", "saved"), [("corrected", 5), ("corrected", 8), ("upstream", 8)])
def test_a_saved_criterion_goes_on_as_if_nothing_had_been(rule: str, saved: int) -> None:
    def run(criterion: CGGRLoss, calls: range) -> list[float]:
        losses = []
        for call in calls:
            # Of another confidence in every call, so that none of the last two may be lost.
            logits, targets = batch(rows=4, width=40, seed=call)
            losses.append(criterion(logits * (0.2 + 3 * (call % 2)), targets).item())
            criterion.step()
        return losses

    def make() -> CGGRLoss:
        return CGGRLoss(selection="stratified", warmup_steps=6, threshold_rule=rule, threshold_sensitivity=5.0, seed=7)

    whole = run(make(), range(12))
    first, second = make(), make()
    assert run(first, range(saved)) == whole[:saved]
    assert all(isinstance(value, Tensor) for value in first.state_dict().values())
    assert int(first.state_dict()["curriculum.num_steps"]) == saved
    second.load_state_dict(first.state_dict())
    assert run(second, range(saved, 12)) == whole[saved:]


def test_micro_batches_of_a_step_draw_differently_and_repeat() -> None:
    logits, targets = batch(rows=4, width=40)
    losses = [[c(logits, targets).item() for _ in range(2)] for c in (plain(selection="stratified") for _ in range(2))]
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]


def test_every_sequence_has_its_share() -> None:
    logits, targets = batch(rows=5, width=40)
    logits[3:] *= 0.01
    logits.requires_grad_()
    plain(0.1, selection="sequence_aware", min_tokens_per_sequence=2, scoring="margin")(logits, targets).backward()
    kept = (logits.grad.abs().sum(-1) > 0).sum(1)
    assert int(kept.sum()) == round(0.1 * int((targets >= 0).sum())) and int(kept.min()) == 2


def test_inverse_probabilities_expect_the_mean_over_all() -> None:
    logits, targets = batch(rows=4, width=40)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    criterion = plain(0.3, selection="stratified", weights="inverse_probability")
    losses = torch.tensor([criterion(logits, targets).item() for _ in range(400)])
    assert abs(losses.mean() - expected) < 4 * losses.std() / 20


def test_ignore_index_evaluation_and_a_batch_without_labels() -> None:
    logits, targets = batch()
    other = torch.where(targets == -100, 16, targets.clamp_max(15))
    expected = plain()(logits, torch.where(other == 16, -100, other))
    assert torch.equal(plain(ignore_index=16)(logits, other), expected)
    full = plain().eval()(logits, targets)
    torch.testing.assert_close(full, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    logits.requires_grad_()
    empty = CGGRLoss(warmup_steps=0)
    for _ in range(4):
        loss = empty(logits, torch.full_like(targets, -100))
        loss.backward()
        assert loss.item() == 0 and not logits.grad.any()
    head = torch.randn(17, 8, requires_grad=True)
    assert empty.from_hidden(torch.randn(3, 14, 8), head, torch.full_like(targets, -100)).item() == 0


SELECTIONS: dict[str, dict[str, Any]] = {
    "topk": {},
    "sequence_aware": {"selection": "sequence_aware"},
    "stratified": {"selection": "stratified"},
    "importance": {"selection": "importance", "weights": "inverse_probability", "scoring": "gnorm"},
}


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_show_as_in_torch_s_own_loss(name: str, value: float) -> None:
    logits, targets = batch()
    criterion = plain(0.25, **SELECTIONS[name])
    hidden, head = torch.randn(*targets.shape, 8, requires_grad=True), torch.randn(17, 8)
    for row, position in ((0, 3), (2, 9)):
        for label, shows in ((4, True), (-100, False)):
            given, wanted = logits.detach().clone().requires_grad_(), targets.clone()
            with torch.no_grad():
                given[row, position, 5] = value
            wanted[row, position] = label
            expected = F.cross_entropy(given.flatten(0, 1), wanted.flatten())
            loss = criterion(given, wanted)
            loss.backward()
            assert loss.isnan() == expected.isnan() == shows == given.grad[wanted >= 0].isnan().any()
            spoilt = hidden.detach().clone()
            spoilt[row, position, 5] = value
            assert criterion.from_hidden(spoilt, head, wanted).isnan() == shows


def test_low_precision_is_scored_and_summed_in_float32() -> None:
    logits, targets = batch()
    half = logits.bfloat16()
    loss = plain()(half.requires_grad_(), targets)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, plain()(half.detach().float(), targets))


def test_under_autocast_hidden_states_and_head_agree() -> None:
    hidden, head = torch.randn(2, 9, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)
    targets = torch.randint(17, (2, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = plain().from_hidden(F.linear(hidden, torch.eye(8)), head, targets)
    loss.backward()
    assert head.grad.dtype == torch.float32 and head.grad.any() and hidden.grad.any()


def test_second_derivatives_are_those_of_torch_s_loss_or_refused() -> None:
    _, targets = batch()
    leaf, head = torch.randn(3, 14, 8, requires_grad=True), torch.randn(17, 8)

    def penalty(loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient of the square of a gradient."""
        (slope,) = torch.autograd.grad(loss_of(leaf.tanh()), leaf, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), leaf)[0]

    expected = penalty(lambda hidden: F.cross_entropy((hidden @ head.mT).flatten(0, 1), targets.flatten()))
    torch.testing.assert_close(penalty(lambda hidden: plain(1.0)(hidden @ head.mT, targets)), expected)
    for ratio in (1.0, 0.3):
        with pytest.raises(RuntimeError, match="create_graph = True; accepted: False"):
            penalty(lambda hidden, ratio=ratio: plain(ratio).from_hidden(hidden, head, targets))
        plain(ratio).from_hidden(leaf.tanh(), head, targets).backward()


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_a_loop_learns(form: str) -> None:
    model = small_model("llama")
    criterion = CGGRLoss(scoring="combined", selection="stratified", min_tokens_ratio=0.25, warmup_steps=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(96, (4, 24), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        if form == "logits":
            loss = criterion(model(tokens).logits[:, :-1], tokens[:, 1:])
        else:
            hidden = model.model(tokens).last_hidden_state[:, :-1]
            loss = criterion.from_hidden(hidden, model.lm_head.weight, tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        criterion.step()
        criterion.eval()
        with torch.no_grad():
            losses.append(criterion(model(tokens).logits[:, :-1], tokens[:, 1:]).item())
        criterion.train()
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("scoring", SCORES)
def test_scores_against_float64(scoring: str) -> None:
    logits, targets = batch()
    expected = scores_by_hand(logits, targets, scoring)
    scorer = CGGRScorer(scoring)
    found = scorer(logits.requires_grad_(), targets)
    assert found.dtype == torch.float32 and found.shape == targets.shape and not found.requires_grad
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(scorer(logits.flatten(0, 1), targets.flatten()), found.flatten())
    hidden, head = torch.randn(3, 14, 8), torch.randn(17, 8)
    expected = scores_by_hand(hidden @ head.mT, targets, scoring)
    torch.testing.assert_close(scorer.from_hidden(hidden, head, targets).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scoring", ["entropy", "entropy_confidence", "margin"])
def test_scores_without_targets_are_those_of_every_position(scoring: str) -> None:
    logits, targets = batch()
    for ignored in (-100, 0):
        found = CGGRScorer(scoring, ignored)(logits)
        expected = CGGRScorer(scoring)(logits, targets.clamp_min(0))
        assert torch.equal(found, expected)


def mistakes() -> list[tuple[Callable[[], Any], str]]:
    logits, targets = batch()
    return [
        (lambda: CGGRLoss(scoring="hardness"), r"scoring = 'hardness'; accepted: entropy"),
        (lambda: CGGRLoss(selection="best"), r"selection = 'best'; accepted: topk"),
        (lambda: CGGRLoss(weights="ht"), r"weights = 'ht'; accepted: mean"),
        (lambda: CGGRLoss(threshold_rule="mine"), r"threshold_rule = 'mine'; accepted: corrected"),
        (lambda: CGGRLoss(min_tokens_ratio=1.5), r"min_tokens_ratio = 1.5; accepted"),
        (lambda: CGGRLoss(min_tokens_ratio=0.0), r"min_tokens_ratio = 0.0; accepted"),
        (lambda: CGGRLoss(warmup_steps=-1), r"warmup_steps = -1; accepted"),
        (lambda: CGGRLoss(num_strata=0), r"num_strata = 0"),
        (lambda: CGGRLoss(seed=-1), r"seed = -1; accepted: from 0"),
        (lambda: CGGRLoss(threshold_sensitivity=-0.5), r"sensitivity=-0.5"),
        (lambda: CGGRLoss(threshold_sensitivity=float("nan")), r"sensitivity=nan"),
        (lambda: CGGRLoss(weights="inverse_probability"), r"'inverse_probability' with 'topk'"),
        (lambda: plain()(logits, targets[:, 1:]), r"targets \(3, 13\); accepted"),
        (lambda: plain()(logits[0, 0], targets[0, 0]), r"logits \(17,\)"),
        (lambda: plain(selection="sequence_aware")(logits.flatten(0, 1), targets.flatten()), r"\(42, 17\); accepted"),
        (lambda: CGGRScorer("hardness"), r"scoring = 'hardness'"),
        (lambda: CGGRScorer("loss")(logits), r"scoring 'loss' without targets; accepted: entropy"),
        (lambda: plain().from_hidden(logits, torch.ones(5, 16), targets), r"shapes"),
        (lambda: CGGRLoss().from_hidden(logits.bfloat16(), torch.ones(5, 17), targets), r"one dtype for both"),
    ]


@pytest.mark.parametrize(("call", "message"), mistakes())
def test_mistakes_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_float32_whatever_the_logits_are(dtype: torch.dtype) -> None:
    logits, targets = batch()
    assert CGGRScorer("combined")(logits.to(dtype), targets).dtype == torch.float32
    rounded = logits.to(dtype).requires_grad_()
    plain(0.3)(rounded, targets).backward()
    kept = kept_by_hand(rounded.detach(), targets, "combined", 0.3)
    assert rounded.grad is not None and rounded.grad.dtype == dtype
    assert rounded.grad.flatten(0, 1).abs().sum(1).nonzero().flatten().tolist() == kept.tolist()


def test_a_batch_without_labels_leaves_the_confidence_as_it_was() -> None:
    logits, targets = batch()
    criterion = CGGRLoss(warmup_steps=0)
    shares = []
    for labels in [targets] * 3 + [torch.full_like(targets, -100)] + [targets] * 3:
        criterion(logits, labels)
        shares.append(criterion.metrics()[ROUTER_KEPT_FRACTION])
    assert shares[3] == 0 and shares[2] > shares[0]
    assert shares[4:] == [shares[2]] * 3


def test_the_corrected_rule_compares_with_the_confidence_at_the_end_of_the_warm_up() -> None:
    curriculum = StepCurriculum(0.25, 2, DynamicThreshold("corrected", sensitivity=0.5, smoothing=0.0))
    curriculum.observe(torch.tensor(0.2))
    curriculum.step()
    curriculum.step()
    for confidence in (0.5, 0.8, 0.9):
        curriculum.observe(torch.tensor(confidence))
    # Of two calls before: .8 against .5.
    assert curriculum.ratio() == pytest.approx(0.25 * (1 + 0.5 * (0.5 - 0.8) / 0.5), rel=1e-6)
