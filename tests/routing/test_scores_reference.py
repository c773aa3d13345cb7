"""`surprise`, `excess` and `random`: against float64 by hand, through every plan and a truncated router."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cggr_ray.data.batch import MicroBatch
from cggr_ray.data.loader import micro_batches
from cggr_ray.data.packing import RowOrder
from cggr_ray.data.store import TokenStore
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress
from cggr_ray.routing.route import TokenRoute
from cggr_ray.routing.routers import Router
from cggr_ray.routing.scorers import OwnScores, Setting, TruncatedRouter, own_scores
from cggr_ray.routing.tokens import SelectedTokens
from cggr_ray.schema import ROUTER_CONFIDENCE, ROUTER_ENTROPY, ROUTER_SCORES
from cggr_ray.sparse.plan import seen, seen_after

ROWS, WIDTH, KEEP = 3, 32, 0.25
OWN, EARLY = OwnScores(), TruncatedRouter(layers=1)
WAYS = [("dense", OWN), ("after", OWN), ("two_pass", OWN), ("dense", EARLY), ("before", EARLY)]


@pytest.fixture
def store(make_store: Callable[..., TokenStore]) -> TokenStore:
    rng = random.Random(3)
    return make_store([rng.randint(3, 50) for _ in range(40)], prompt_share=0.5)


@pytest.fixture
def micro(store: TokenStore) -> MicroBatch:
    order = RowOrder([store], (1.0,), (None,), WIDTH, True, 1)
    state, rows = order.start(), []
    for _ in range(ROWS):
        row, state = order.next_row(state)
        rows.append(row)
    return micro_batches(rows, ROWS, order.shape, torch.device("cpu"))[0]


@pytest.fixture
def reference(store: TokenStore) -> Tensor:
    """A table of losses: any numbers do. Padding is NaN, as in the table of a run."""
    values = torch.rand(len(store.tokens), generator=torch.Generator().manual_seed(2)) * 8
    return torch.cat([values, torch.tensor([torch.nan])]).half()


def setting_of(adapter: Adapter, reference: Tensor) -> Setting:
    return Setting(adapter.device, len(adapter.layers), adapter.head_VD.shape[1], len(reference) - 1, reference)


def by_hand(model: PreTrainedModel, micro: MicroBatch, layers: int, reference: Tensor) -> dict[str, Tensor]:
    """The scores in float64, document by document, of the model cut off after some layers."""
    model = copy.deepcopy(model).double().eval()
    model.model.layers = model.model.layers[:layers]
    found = {name: torch.full(micro.labels_BT.shape, -torch.inf).double() for name in ("surprise", "excess")}
    for b in range(ROWS):
        starts = [*(micro.positions_BT[b] == 0).nonzero().flatten().tolist(), WIDTH]
        for start, stop in itertools.pairwise(starts):
            with torch.no_grad():
                log_p = model(micro.tokens_BT[b : b + 1, start:stop]).logits[0].log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            for t in range(start, stop):
                if (label := int(micro.labels_BT[b, t])) >= 0:
                    nll = -log_p[t - start, label]
                    found["surprise"][b, t] = nll - entropy[t - start]
                    found["excess"][b, t] = nll - reference[micro.position_ids_BT[b, t]].double()
    return found


def part_of(score: str, plan: str = "dense", router: OwnScores | TruncatedRouter = OWN) -> SelectedTokens:
    folder = "somewhere" if score == "excess" else None
    return SelectedTokens(KEEP, score, plan=plan, router=router, reference=folder)  # type: ignore[arg-type]


def route_by(
    part: SelectedTokens, adapter: Adapter, router: Router, micro: MicroBatch, seed_step: int = 1
) -> TokenRoute:
    router.begin(micro, Progress(seed_step, 50.0, 100.0, 1))
    planned = part.plan_for(adapter).forward(micro, router.reads(KEEP), partial(router.route, micro=micro, ratio=KEEP))
    assert planned.route is not None
    return planned.route


def kept(route: TokenRoute) -> list[list[int]]:
    return [i[f].tolist() for i, f in zip(route.index_BK, route.filled_BK, strict=True)]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("score", ["surprise", "excess"])
def test_scores_equal_float64(
    score: str, layers: int, tiny_model: PreTrainedModel, micro: MicroBatch, reference: Tensor
) -> None:
    adapter = Adapter(tiny_model)
    with torch.no_grad():
        hidden = adapter.run_layers(
            adapter.embed(micro), micro.positions_BT, adapter.documents(micro), slice(0, layers)
        )
        found = seen(adapter, hidden.flatten(0, 1))
        scores = own_scores(score, found, micro, reference).scores_BT  # type: ignore[arg-type]
    expected = by_hand(tiny_model, micro, layers, reference)[score]
    assert scores.dtype == torch.float32 and (scores == -torch.inf).any()
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("plan", "router"), WAYS, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
@pytest.mark.parametrize("score", ["surprise", "excess"])
def test_every_plan_keeps_the_hardest(
    score: str,
    plan: str,
    router: OwnScores | TruncatedRouter,
    tiny_model: PreTrainedModel,
    micro: MicroBatch,
    reference: Tensor,
) -> None:
    part, adapter = part_of(score, plan, router), Adapter(tiny_model)
    running = part.build(0, setting_of(adapter, reference))
    route = route_by(part, adapter, running, micro)
    scores = by_hand(tiny_model, micro, 1 if router is EARLY else 2, reference)[score]
    for b, labelled in enumerate(micro.labelled_B.tolist()):
        count = max(round(KEEP * labelled), 1)
        assert kept(route)[b] == sorted(scores[b].topk(count).indices.tolist())


@pytest.mark.parametrize(("plan", "router"), WAYS, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_random_is_a_draw_that_costs_what_a_score_costs(
    plan: str, router: OwnScores | TruncatedRouter, tiny_model: PreTrainedModel, micro: MicroBatch, reference: Tensor
) -> None:
    part, adapter = part_of("random", plan, router), Adapter(tiny_model)
    route = route_by(part, adapter, part.build(0, setting_of(adapter, reference)), micro)
    assert [len(row) for row in kept(route)] == [max(round(KEEP * n), 1) for n in micro.labelled_B.tolist()]
    assert bool((micro.labels_BT.gather(1, route.index_BK)[route.filled_BK] >= 0).all())
    # The head has been read, as for a score.
    assert {ROUTER_ENTROPY, ROUTER_CONFIDENCE, ROUTER_SCORES} <= route.statistics.keys()


def test_random_draws_depend_on_seed_and_step_alone_and_are_uniform(
    tiny_model: PreTrainedModel, micro: MicroBatch, reference: Tensor
) -> None:
    part, adapter = part_of("random"), Adapter(tiny_model)
    build = partial(part.build, setting=setting_of(adapter, reference))
    first = kept(route_by(part, adapter, build(0), micro))
    assert first == kept(route_by(part, adapter, build(0), micro))
    assert first != kept(route_by(part, adapter, build(1), micro))
    assert first != kept(route_by(part, adapter, build(0), micro, seed_step=2))
    draws, running = 200, build(5)
    times = torch.zeros(micro.labels_BT.shape)
    for step in range(draws):
        for b, row in enumerate(kept(route_by(part, adapter, running, micro, step))):
            times[b, row] += 1
    for b, labelled in enumerate(micro.labelled_B.tolist()):
        share = max(round(KEEP * labelled), 1) / labelled
        often = times[b][micro.labels_BT[b] >= 0] / draws
        assert often.mean().item() == pytest.approx(share)
        # Five standard deviations.
        assert (often - share).abs().max() < 5 * (share * (1 - share) / draws) ** 0.5


def test_a_draw_is_compared_with_nothing(tiny_model: PreTrainedModel, reference: Tensor) -> None:
    setting, first = setting_of(Adapter(tiny_model), reference), Progress(0, 50.0, 100.0, 1)
    compares = {s: part_of(s, "before", EARLY).build(0, setting).compares(KEEP, first) for s in ("random", "excess")}
    assert compares == {"random": False, "excess": True}


def test_a_router_is_compared_with_the_excess_of_the_whole_model(
    tiny_model: PreTrainedModel, micro: MicroBatch, reference: Tensor
) -> None:
    adapter = Adapter(tiny_model)
    part = part_of("excess", "before", EARLY)
    running = part.build(0, setting_of(adapter, reference))
    route_by(part, adapter, running, micro)
    with torch.no_grad():
        agreement = running.agreement(seen_after(adapter, micro, len(adapter.layers)), micro, KEEP)
    early, own = (by_hand(tiny_model, micro, layers, reference)["excess"] for layers in (1, 2))
    tops = []
    for scores in (early, own):
        rows = [row.topk(max(round(KEEP * n), 1)).indices for row, n in zip(scores, micro.labelled_B, strict=True)]
        tops.append({(b, t) for b, row in enumerate(rows) for t in row.tolist()})
    recall = len(tops[0] & tops[1]) / len(tops[1])
    assert agreement["router/recall_at_k"].item() == pytest.approx(recall)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"score": "excess"}, "score 'excess' without a reference; accepted: reference = "),
        ({"score": "loss", "reference": "x"}, "reference 'x' with score 'loss'; accepted: with 'excess'"),
        ({"reference": "x"}, "reference 'x' with score 'combined'; accepted"),
    ],
)
def test_a_reference_goes_with_excess_and_excess_with_a_reference(values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectedTokens(**values)  # type: ignore[arg-type]
