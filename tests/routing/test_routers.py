"""Routers in a real forward: when they are compared with the model's own scores, and what chance and probes keep."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from small_batches import LENGTHS, hidden_after, lens_logits, packed, true_scores
from small_models import small_model
from torch import Tensor

from cggr_ray.learner import Pass
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress
from cggr_ray.recipe import Recipe
from cggr_ray.routing import routers
from cggr_ray.routing.curriculum import Curriculum, DynamicThreshold
from cggr_ray.routing.scorers import Setting, StaleScores, TruncatedRouter
from cggr_ray.routing.tokens import AllTokens, RandomTokens, SelectedTokens, SkippedTokens
from cggr_ray.routing.trained_scorers import Probe, TunedLens
from cggr_ray.schema import (
    ROUTER_CONFIDENCE,
    ROUTER_ENTROPY,
    ROUTER_KEPT_FRACTION,
    ROUTER_RECALL,
    ROUTER_SCORES,
    ROUTER_SPEARMAN,
    ROUTER_USAGE,
    TOKEN_LOSS,
)

MICRO = packed(LENGTHS, width=21)
SETTING = Setting(torch.device("cpu"), num_layers=3, width=32, num_positions=147)
AGREEMENT = {ROUTER_SPEARMAN, ROUTER_RECALL}
# Every router with every plan that can wait for it: (part, whether it scores early).
ROUTED: dict[str, tuple[SelectedTokens, bool]] = {
    "own, dense": (SelectedTokens(0.25, "loss"), False),
    "own, after": (SelectedTokens(0.25, plan="after"), False),
    "own, two_pass": (SelectedTokens(0.25, plan="two_pass"), False),
    "truncated, dense": (SelectedTokens(0.25, "margin", router=TruncatedRouter(2)), True),
    "truncated, before": (SelectedTokens(0.25, plan="before", router=TruncatedRouter(1)), True),
    "truncated over the batch": (
        SelectedTokens(0.25, "entropy", plan="before", router=TruncatedRouter(2), scope="batch"),
        True,
    ),
    "probe, dense": (SelectedTokens(0.25, "loss", router=Probe(2)), True),
    "probe, before": (SelectedTokens(0.25, "loss", plan="before", router=Probe(1)), True),
    "lens, dense": (SelectedTokens(0.25, "combined", router=TunedLens(2)), True),
    "lens, before": (SelectedTokens(0.25, "margin", plan="before", router=TunedLens(1)), True),
    "stale, before": (SelectedTokens(0.25, "loss", plan="before", router=StaleScores()), True),
}


def at(step: int = 0, fraction: float = 0.5) -> Progress:
    return Progress(step, 100 * fraction, 100.0, 10**6)


def run(part: Any, ratio: float, compare: bool, family: str = "llama", visits: int = 0) -> tuple[Pass, dict]:
    """One micro-batch through a new model, after so many `visits` at ratio 1; the weights stay as they are."""
    model = small_model(family)
    one = Pass(Recipe("x", tokens=part), Adapter(model), 0, 147)
    scale = torch.tensor(1 / MICRO.labelled)
    for _ in range(visits):
        one.router.begin(MICRO, at())
        one(MICRO, scale, 1.0)
    one.router.begin(MICRO, at())
    return one, one(MICRO, scale, ratio, compare)[1]


# Agreement


@pytest.mark.parametrize("name", ROUTED)
def test_early_routers_are_compared_every_so_many_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "STEPS_PER_COMPARISON", 3)
    part, early = ROUTED[name]
    router = part.build(0, SETTING)
    learns = isinstance(part.router, Probe | TunedLens | StaleScores)
    for step in range(7):
        assert router.compares(0.25, at(step)) == (early and step % 3 == 0)
        # At ratio 1 only those score that are to learn from it.
        assert router.compares(1.0, at(step)) == (learns and step % 3 == 0)


@pytest.mark.parametrize("part", [AllTokens(), RandomTokens(), SkippedTokens()])
def test_chance_is_compared_with_nothing(part: Any) -> None:
    router = part.build(0, SETTING)
    assert not any(router.compares(ratio, at(step)) for ratio in (0.25, 1.0) for step in range(130))


@pytest.mark.parametrize("name", [n for n, (_, early) in ROUTED.items() if early])
def test_agreement_is_logged_on_steps_that_compare_alone(name: str) -> None:
    part, _ = ROUTED[name]
    assert run(part, 0.25, compare=True, visits=1)[1].keys() >= AGREEMENT
    assert not AGREEMENT & run(part, 0.25, compare=False, visits=1)[1].keys()


@pytest.mark.parametrize("ratio", [0.25, 0.6])
@pytest.mark.parametrize("name", ["truncated, dense", "truncated, before", "truncated over the batch"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_agreement_of_a_truncated_router_by_hand(family: str, name: str, ratio: float) -> None:
    part, _ = ROUTED[name]
    assert isinstance(part.router, TruncatedRouter)
    _, seen = run(part, ratio, compare=True, family=family)
    model = small_model(family)
    early, own = (
        true_scores(lens_logits(model, MICRO, k), MICRO.labels_BT)[part.score] for k in (part.router.layers, 3)
    )
    labelled = MICRO.labels_BT >= 0
    expected = spearmanr(early[labelled], own[labelled]).statistic
    assert abs(expected) < 0.98 and seen[ROUTER_SPEARMAN].item() == pytest.approx(expected, abs=1e-3)
    # Of every row, or of all together, and no more than the run means to keep in the end.
    rows, labelled_B = len(MICRO.tokens_BT), MICRO.labelled_B.tolist()
    if part.scope == "batch":
        rows, labelled_B = 1, [sum(labelled_B)]
    counts = [max(1, round(0.25 * n)) for n in labelled_B]
    kept = []
    for scores in (early.view(rows, -1), own.view(rows, -1)):
        kept.append({(b, t) for b, k in enumerate(counts) for t in scores[b].argsort(descending=True)[:k].tolist()})
    assert seen[ROUTER_RECALL].item() == pytest.approx(len(kept[0] & kept[1]) / len(kept[1]))


@pytest.mark.parametrize("ratio", [0.25, 1.0])
@pytest.mark.parametrize("plan", ["before", "dense"])
def test_a_table_of_this_models_losses_agrees_entirely(plan: str, ratio: float) -> None:
    part = SelectedTokens(0.25, "loss", plan=plan, router=StaleScores())
    _, seen = run(part, ratio, compare=True, visits=1)
    assert seen[ROUTER_SPEARMAN].item() == pytest.approx(1, abs=1e-4) and seen[ROUTER_RECALL].item() == 1
    _, unseen = run(part, ratio, compare=True)
    assert unseen[ROUTER_SPEARMAN].item() < 0.5 and unseen[ROUTER_RECALL].item() < 1


@pytest.mark.parametrize("name", ROUTED)
def test_statistics_of_scores_come_with_a_route(name: str) -> None:
    part, _ = ROUTED[name]
    probabilities = {ROUTER_ENTROPY, ROUTER_CONFIDENCE} if not isinstance(part.router, Probe | StaleScores) else set()
    seen = run(part, 0.25, compare=False)[1]
    assert seen.keys() == {ROUTER_SCORES, ROUTER_USAGE, ROUTER_KEPT_FRACTION, TOKEN_LOSS} | probabilities
    assert seen[ROUTER_SCORES].sum() == MICRO.labelled
    assert (seen[ROUTER_USAGE] <= seen[ROUTER_SCORES]).all() and 0 < seen[ROUTER_USAGE].sum() < MICRO.labelled
    assert seen[ROUTER_KEPT_FRACTION] == seen[ROUTER_USAGE].sum()
    whole = run(part, 1.0, compare=False)[1]
    assert whole.keys() == {ROUTER_KEPT_FRACTION, TOKEN_LOSS} and whole[ROUTER_KEPT_FRACTION] == MICRO.labelled


# Chance


def routes(part: Any, draws: int, ratio: float) -> list[list[list[int]]]:
    """Kept positions by draw and row."""
    router, found = part.build(0, SETTING), []
    for step in range(draws):
        router.begin(MICRO, at(step))
        route = router.route(None, MICRO, ratio)
        found.append([row[filled].tolist() for row, filled in zip(route.index_BK, route.filled_BK, strict=True)])
    return found


@pytest.mark.parametrize("part, eligible", [
    (SkippedTokens(0.3), MICRO.position_ids_BT >= 0),
    (RandomTokens(0.3), MICRO.labels_BT >= 0),
])  # fmt: skip
def test_chance_draws_evenly_from_all_that_it_may_keep(part: Any, eligible: Tensor) -> None:
    assert not torch.equal(MICRO.position_ids_BT >= 0, MICRO.labels_BT >= 0) and (MICRO.position_ids_BT < 0).any()
    draws = 400
    counts, shares = torch.zeros(MICRO.labels_BT.shape), []
    for found in routes(part, draws, 0.3):
        for row, kept in enumerate(found):
            assert len(kept) == len(set(kept)) == max(1, round(0.3 * int(eligible[row].sum())))
            counts[row, kept] += 1
    for row in eligible:
        n = int(row.sum())
        shares.append(max(1, round(0.3 * n)) / n)
    share = torch.tensor(shares).unsqueeze(1).expand_as(counts)
    z = (counts / draws - share) / (share * (1 - share) / draws).sqrt()
    assert (counts[~eligible] == 0).all() and z[eligible].abs().max() < 4.2


# Positions that a probe lets through the middle layers


def expected_losses(one: Pass, entry: int) -> Tensor:
    """What the probe of a pass says in float64, its bias spread out first; -inf without a label."""
    for name, tensor in one.router.tensors().items():
        if name == "bias":
            tensor.copy_(torch.linspace(-1, 1, len(tensor)))
    into, bias, out = (one.router.tensors()[name].double() for name in ("into", "bias", "out"))
    hidden = hidden_after(one.adapter.model, MICRO, entry).double()
    x = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return torch.where(MICRO.labels_BT >= 0, (torch.relu(x @ into.T + bias) @ out.T).squeeze(-1), -torch.inf)


def routed(one: Pass, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The positions that the pass lets through, row by row."""
    shown, decide = [], one.router.route

    def listening(seen: Any, micro: Any, ratio: float) -> Any:
        shown.append(decide(seen, micro, ratio))
        return shown[-1]

    monkeypatch.setattr(one.router, "route", listening)
    one(MICRO, torch.tensor(1 / MICRO.labelled), 0.4)
    (route,) = shown
    return [row[filled].tolist() for row, filled in zip(route.index_BK, route.filled_BK, strict=True)]


def skipping(choice: str, entry: int) -> Pass:
    part = SkippedTokens(0.4, choice, entry=entry, exit=0)  # type: ignore[arg-type]
    return Pass(Recipe("x", tokens=part), Adapter(small_model("llama")), 0, 147)


@pytest.mark.parametrize("entry", [1, 2])
def test_confidence_is_a_probe_behind_the_entry_layers(entry: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = skipping("confidence", entry)
    assert one.router.reads(0.4) == one.router.reads(1.0) == entry
    predicted = expected_losses(one, entry)
    before = {name: tensor.clone() for name, tensor in one.router.tensors().items()}
    for row, found in enumerate(routed(one, monkeypatch)):
        keep = max(1, round(0.4 * int(MICRO.labelled_B[row])))
        # Equal tokens at the start of their documents are equal until rounding; the lower index goes first.
        order = predicted[row].round(decimals=5).argsort(descending=True, stable=True)
        assert found == sorted(order[:keep].tolist())
    # It learns from the loss of every position, which a thinned forward has.
    after = one.router.tensors()
    assert all(not torch.equal(before[name], after[name]) for name in ("into", "bias", "out", "moments"))


def test_strata_are_of_the_loss_that_the_probe_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    one = skipping("stratified", 1)
    one.router.begin(MICRO, at())
    predicted = expected_losses(one, 1)
    for row, found in enumerate(routed(one, monkeypatch)):
        labelled = int(MICRO.labelled_B[row])
        order = predicted[row].round(decimals=5).argsort(descending=True, stable=True).tolist()
        quarters = [sum(labelled * s <= 4 * order.index(t) < labelled * (s + 1) for t in found) for s in range(4)]
        assert len(found) == max(1, round(0.4 * labelled)) == sum(quarters)
        # Four parts of ten from the hardest quarter, or all of it; at most one position away by rounding.
        shares = [0.4, 0.3, 0.2, 0.1]
        assert all(abs(n - s * len(found)) <= 1 for n, s in zip(quarters, shares, strict=True)), quarters


def test_full_steps_teach_a_probe_too() -> None:
    for part in (SkippedTokens(0.4, "confidence", 1, 0), SelectedTokens(0.25, "loss", plan="before", router=Probe(1))):
        fresh = part.build(0, SETTING).tensors()
        one, _ = run(part, 1.0, compare=False)
        losses = true_scores(lens_logits(small_model("llama"), MICRO, 3), MICRO.labels_BT)["loss"]
        mean = losses[MICRO.labels_BT >= 0].mean().item()
        assert one.router.tensors()["moments"][0].item() == pytest.approx(mean, rel=1e-4)
        assert not torch.equal(one.router.tensors()["into"], fresh["into"])


# Mistakes


def early(router: Any) -> dict[str, Any]:
    return {"score": "loss", "router": router}


@pytest.mark.parametrize(
    "make, named",
    [
        *((lambda p=p, r=r: SelectedTokens(plan=p, **early(r)), f"plan {p!r} with a router that scores early")
          for p in ("after", "two_pass") for r in (TruncatedRouter(1), Probe(1), TunedLens(1), StaleScores())),
        (lambda: SelectedTokens(plan="before"), "plan 'before' with the model's own scores"),
        (lambda: SelectedTokens(dynamic=DynamicThreshold(), **early(Probe())), "router 'probe'"),
        (lambda: SelectedTokens(dynamic=DynamicThreshold(), **early(StaleScores())), "router 'stale_scores'"),
        (lambda: TruncatedRouter(0), "layers = 0"),
        (lambda: Probe(-1), "layers = -1"),
        (lambda: Probe(hidden=0), "hidden = 0"),
        (lambda: Probe(lr=0.0), "lr = 0.0"),
        (lambda: Probe(lr=math.nan), "lr = nan"),
        (lambda: SelectedTokens(router=TruncatedRouter(3)).build(0, SETTING), "layers = 3 of a model with 3"),
        (lambda: SelectedTokens(**early(Probe(5))).build(0, SETTING), "layers = 5 of a model with 3"),
        (lambda: SelectedTokens(score="margin", router=Probe(1)), "score 'margin' with router 'probe'"),
        (lambda: SelectedTokens(score="gnorm", router=StaleScores()), "score 'gnorm' with router 'stale_scores'"),
        (lambda: RandomTokens(0.0), "keep = 0.0"),
        (lambda: SkippedTokens(1.2), "keep = 1.2"),
        (lambda: SkippedTokens(entry=-1), "entry = -1"),
        (lambda: SkippedTokens(exit=-2), "exit = -2"),
        (lambda: SkippedTokens(choice="stratified", num_strata=0), "num_strata = 0"),
        (lambda: SkippedTokens(choice="stratified", num_strata=2000), "num_strata = 2000; accepted: 1 to 1000"),
        (lambda: TunedLens(0), "layers = 0"),
        (lambda: TunedLens(positions=0), "positions = 0"),
        (lambda: TunedLens(lr=-1.0), "lr = -1.0"),
        (lambda: TunedLens(lr=math.inf), "lr = inf"),
        (lambda: SelectedTokens(router=TunedLens(3)).build(0, SETTING), "layers = 3 of a model with 3"),
        (lambda: Probe(lr=1e300), "lr = 1e+300; accepted: at least 1, a positive rate that float32 has"),
        (lambda: SkippedTokens(choice="confidence", entry=0), "entry = 0"),
        (lambda: SkippedTokens(choice="confidence", entry=3).build(0, SETTING), "layers = 3 of a model with 3"),
        (lambda: SkippedTokens(entry=2, exit=1).plan_for(Adapter(small_model("llama"))), "skip after 2"),
    ],
)  # fmt: skip
def test_mistakes_name_the_value(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        make()
    assert "accepted: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ROUTED)
def test_every_other_combination_trains(name: str) -> None:
    part, _ = ROUTED[name]
    one, _ = run(part, 0.25, compare=False)
    parameters = [p for _, p in one.adapter.named_parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in parameters)
    assert part.build(0, SETTING).levels() == (0.25, 0.4375, 0.625, 0.8125, 1.0)
    assert part.curriculum == Curriculum()


def test_importance_has_a_floor() -> None:
    """Of 4, .5 instead of .001, 1 and 1, two are kept: the first is certain, the others share the rest as 1 : 2 : 2."""
    part = SelectedTokens(0.5, "loss", "importance", "inverse_probability", importance_floor=0.5, largest_weight=100.0)
    scores, two, four = torch.tensor([[4.0, 0.001, -torch.inf, 1.0, 1.0]]), torch.tensor([2]), torch.tensor([4])
    found = routers.choose(part, scores, two, four, torch.zeros_like(scores), torch.Generator())
    assert found.probability_BT is not None
    assert found.probability_BT[0].tolist() == pytest.approx([1, 0.2, 0, 0.4, 0.4], abs=1e-9)
