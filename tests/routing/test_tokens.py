"""The `tokens` parts on micro-batches: routes, weights, draws, and an unbiased gradient."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cggr_ray.data.batch import MicroBatch
from cggr_ray.kernels.head_stats.reference import chunk_stats
from cggr_ray.models.adapter import Stream
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.progress import Progress
from cggr_ray.routing.curriculum import Curriculum, DynamicThreshold
from cggr_ray.routing.route import TokenRoute
from cggr_ray.routing.scorers import Setting
from cggr_ray.routing.scores import HISTOGRAM_BINS, NATS, SCORE_BINS, SCORES
from cggr_ray.routing.scores import score as score_of
from cggr_ray.routing.tokens import AllTokens, RandomTokens, SelectedTokens
from cggr_ray.schema import ROUTER_CONFIDENCE, ROUTER_ENTROPY, ROUTER_SCORES
from cggr_ray.sparse.plan import Seen

CPU = torch.device("cpu")
WIDTH, VOCABULARY = 6, 19
SETTING = Setting(CPU, num_layers=4, width=WIDTH, num_positions=1000)
IMPORTANCE = {"selection": "importance", "score": "gnorm", "weights": "inverse_probability"}
PARTS = {
    "random": RandomTokens(keep=0.25),
    "topk": SelectedTokens(keep=0.25),
    "topk over the batch": SelectedTokens(keep=0.25, scope="batch"),
    "sequence_aware": SelectedTokens(keep=0.4, selection="sequence_aware", min_tokens_per_sequence=1),
    "sequence_aware over the batch": SelectedTokens(keep=0.4, selection="sequence_aware", scope="batch"),
    "stratified": SelectedTokens(keep=0.5, selection="stratified", score="loss"),
    "stratified_top": SelectedTokens(keep=0.5, selection="stratified_top", score="combined_rank"),
    "fixed_quota": SelectedTokens(keep=0.3, selection="fixed_quota", score="margin"),
    "importance": SelectedTokens(keep=0.25, **IMPORTANCE),
    "importance without tails": SelectedTokens(keep=0.25, drop_easiest=0.1, drop_hardest=0.05, **IMPORTANCE),
    "stratified without tails": SelectedTokens(keep=0.4, selection="stratified", drop_easiest=0.2, drop_hardest=0.05),
    "importance over the batch": SelectedTokens(keep=0.3, scope="batch", **IMPORTANCE),
}


def at(step=0, fraction=0.5):
    return Progress(step, train_seconds=100 * fraction, budget_seconds=100.0, tokens_seen=1)


def micro_of(labelled, index=0, lengths=None):
    """A micro-batch from a boolean table of labelled positions, with documents of `lengths` (repeated) in each row."""
    labelled = torch.as_tensor(labelled)
    rows, width = labelled.shape
    g = torch.Generator().manual_seed(rows * 1000 + width)
    lengths = lengths or [5, 3, 9, 1]
    positions = torch.tensor([t for n in lengths * width for t in range(n)][:width]).repeat(rows, 1)
    starts = torch.cat([(positions.flatten() == 0).nonzero().flatten(), torch.tensor([rows * width])])
    labels = torch.randint(VOCABULARY, (rows, width), generator=g)
    return MicroBatch(
        tokens_BT=torch.randint(VOCABULARY, (rows, width), generator=g),
        labels_BT=torch.where(labelled, labels, -100),
        positions_BT=positions,
        position_ids_BT=torch.arange(rows * width).view(rows, width),
        document_starts=starts.int(),
        longest_document=max(lengths),
        labelled_B=labelled.sum(1).numpy(),
        index=index,
    )


def odd_micro(index=0):
    """Rows with all, many, two, one and no labels."""
    labelled = torch.rand(6, 37, generator=torch.Generator().manual_seed(1)) < 0.6
    labelled[0], labelled[1], labelled[2], labelled[3] = True, False, False, False
    labelled[2, 17], labelled[3, 4], labelled[3, 36] = True, True, True
    return micro_of(labelled, index)


def stream_of(micro, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(micro.labels_BT.numel(), WIDTH, generator=g) * scale
    return Stream(hidden, torch.randn(VOCABULARY, WIDTH, generator=g))


def routed(router, seen, micro, ratio, progress):
    """The route of a router in a step."""
    router.begin(micro, progress)
    return router.route(seen, micro, ratio)


def seen_of(stream):
    """What a router sees behind the last layer."""
    return Seen(stream.hidden_RD.detach(), stream.hidden_RD.detach(), stream.head_VD.detach())


def route_by(part, micro, progress=None, seed=0, ratio=None):
    progress = progress or at()
    router = part.build(seed, SETTING)
    return routed(
        router, seen_of(stream_of(micro)), micro, router.ratio(progress) if ratio is None else ratio, progress
    )


def kept_counts(micro, ratio, batch):
    """round(ratio labelled), at least one where there is a label: of every row, or of the micro-batch."""
    labelled = [int(micro.labelled_B.sum())] if batch else micro.labelled_B.tolist()
    return [max(round(ratio * n), min(n, 1)) for n in labelled]


# Routes


@pytest.mark.parametrize("name", PARTS)
def test_slots_are_sorted_labelled_and_exactly_counted(name):
    part, micro = PARTS[name], odd_micro()
    batch = "batch" in name
    for ratio in (part.keep, 0.71):
        route = route_by(part, micro, ratio=ratio)
        lines, width = (1, 6 * 37) if batch else (6, 37)
        assert route.index_BK.shape == route.weights_BK.shape == (lines, math.ceil(ratio * width))
        assert route.index_BK.dtype == torch.int64 and route.weights_BK.dtype == torch.float32
        labels = micro.labels_BT.view(lines, width)
        for b, keep in enumerate(kept_counts(micro, ratio, batch)):
            index, weights = route.index_BK[b].tolist(), route.weights_BK[b]
            assert index == sorted(index) and len(set(index[:keep])) == keep
            assert (weights[:keep] > 0).all() and (weights[keep:] == 0).all() and weights.isfinite().all()
            assert all(labels[b, t] >= 0 for t in index[:keep])


@pytest.mark.parametrize("name", [n for n in PARTS if "importance" not in n])
def test_mean_weights_sum_to_the_labelled_count(name):
    part, micro = PARTS[name], odd_micro()
    route = route_by(part, micro)
    expected = micro.labelled_B.sum(keepdims=True) if "batch" in name else micro.labelled_B
    torch.testing.assert_close(route.weights_BK.sum(1), torch.from_numpy(expected).float())
    for weights in route.weights_BK:
        assert len(set(weights[weights > 0].tolist())) <= 1


@pytest.mark.parametrize("largest", [4.0, 5.5, 10.0])
def test_inverse_probability_weights_are_at_least_one_and_capped(largest):
    part = SelectedTokens(keep=0.25, importance_floor=1e-3, largest_weight=largest, **IMPORTANCE)
    micro = micro_of(torch.ones(5, 64, dtype=torch.bool))
    # Confident and wrong beside confident and right: importances from almost 0 to sqrt 2.
    router = part.build(0, SETTING)
    seen = []
    for step in range(20):
        route = routed(router, seen_of(stream_of(micro, scale=6.0)), micro, 0.25, at(step))
        assert route.weights_BK.min() >= 1 and route.weights_BK.max() <= largest * (1 + 1e-6)
        seen.append(route.weights_BK.max().item())
    assert max(seen) == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize("name", PARTS)
def test_flat_index_points_at_the_same_labels(name):
    micro = odd_micro()
    route = route_by(PARTS[name], micro)
    lines = len(route.index_BK)
    flat = route.flat_index(micro.labels_BT.numel() // lines)
    by_row = micro.labels_BT.view(lines, -1).gather(1, route.index_BK).flatten()
    assert torch.equal(micro.labels_BT.flatten()[flat], by_row)
    kept = flat[route.weights_BK.flatten() > 0]
    assert len(kept.unique()) == len(kept)


def truth_scores(stream, labels):
    """Scores of all positions in float64 from torch's own functions."""
    z = stream.hidden_RD.double() @ stream.head_VD.double().T
    p = z.softmax(-1)
    entropy = torch.distributions.Categorical(logits=z).entropy()
    first, second = p.topk(2, dim=-1).values.unbind(-1)
    nll = F.cross_entropy(z, labels.clamp_min(0), reduction="none")
    one_hot = F.one_hot(labels.clamp_min(0), VOCABULARY)
    return {
        "entropy": entropy,
        "entropy_confidence": entropy - first,
        "margin": 1 - (first - second),
        "loss": nll,
        "combined": (entropy - first) + (1 - (first - second)) + nll,
        "gnorm": (p - one_hot).norm(dim=-1),
        "surprise": nll - entropy,
    }


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("scope", ["row", "batch"])
def test_topk_keeps_the_hardest_by_every_score(score, scope):
    micro = odd_micro()
    stream, labels = stream_of(micro), micro.labels_BT.flatten()
    lines = 1 if scope == "batch" else 6
    scores = torch.where(labels >= 0, truth_scores(stream, labels)[score], -torch.inf).view(lines, -1)
    route = routed(
        SelectedTokens(keep=0.25, score=score, scope=scope).build(0, SETTING), seen_of(stream), micro, 0.25, at()
    )
    for b, keep in enumerate(kept_counts(micro, 0.25, scope == "batch")):
        expected = sorted(range(scores.shape[1]), key=lambda t, b=b: -scores[b, t].item())[:keep]
        assert route.index_BK[b, :keep].tolist() == sorted(expected)


@pytest.mark.parametrize("scope", ["row", "batch"])
@pytest.mark.parametrize("tails", [(0.0, 0.1), (0.3, 0.0), (0.25, 0.12)])
def test_tails_are_kept_by_no_selection(tails, scope):
    micro = odd_micro()
    stream, labels = stream_of(micro), micro.labels_BT.flatten()
    lines = 1 if scope == "batch" else 6
    losses = torch.where(labels >= 0, truth_scores(stream, labels)["loss"], -torch.inf).view(lines, -1)
    options = {"keep": 0.5, "score": "loss", "scope": scope, "drop_easiest": tails[0], "drop_hardest": tails[1]}
    importance = IMPORTANCE | {"score": "loss"}
    for more in ({}, {"selection": "stratified"}, {"selection": "stratified_top"}, importance):
        route = routed(SelectedTokens(**(options | more)).build(0, SETTING), seen_of(stream), micro, 0.875, at())
        for b, keep in enumerate(kept_counts(micro, 0.875, scope == "batch")):
            order = sorted((t for t, x in enumerate(losses[b]) if x > -torch.inf), key=lambda t, b=b: -losses[b, t])
            low, high = (math.floor(part * len(order) + 1e-9) for part in tails)
            left = order[high : len(order) - low]
            found = route.index_BK[b][route.filled_BK[b]].tolist()
            assert set(found) <= set(left) and len(found) == min(keep, len(left))
            if not more:
                assert found == sorted(left[:keep])


def test_importance_without_tails_is_unbiased_for_what_is_left():
    micro = micro_of(torch.ones(1, 40, dtype=torch.bool))
    stream = stream_of(micro)
    part = SelectedTokens(keep=0.4, drop_easiest=0.2, drop_hardest=0.1, **(IMPORTANCE | {"score": "loss"}))
    router, total = part.build(0, SETTING), torch.zeros(40, dtype=torch.float64)
    for step in range(3000):
        route = routed(router, seen_of(stream), micro, 0.4, at(step))
        total.index_add_(0, route.index_BK[0], route.weights_BK[0].double())
    order = truth_scores(stream, micro.labels_BT.flatten())["loss"].argsort(descending=True)
    assert (total[order[:4]] == 0).all() and (total[order[32:]] == 0).all()
    # Weights are at most 10: a mean of 3000 is off by less than 4 sqrt(9 / 3000).
    torch.testing.assert_close(total[order[4:32]] / 3000, torch.ones(28, dtype=torch.float64), atol=0.22, rtol=0)


@pytest.mark.parametrize("scope", ["row", "batch"])
def test_sequence_aware_gives_every_document_a_position(scope):
    micro = micro_of(torch.ones(3, 36, dtype=torch.bool))
    part = SelectedTokens(keep=0.25, selection="sequence_aware", scope=scope, score="loss")
    route = route_by(part, micro, ratio=0.25)
    flat = route.flat_index(micro.labels_BT.numel() // len(route.index_BK)).tolist()
    starts = micro.document_starts.tolist()
    # Eight documents a row and nine positions to keep.
    for begin, end in itertools.pairwise(starts):
        assert any(begin <= t < end for t in flat)
    assert len(set(flat)) == 27


def test_statistics_are_means_over_labelled_positions():
    micro = odd_micro()
    stream, labels = stream_of(micro), micro.labels_BT.flatten()
    statistics = routed(SelectedTokens(score="loss").build(0, SETTING), seen_of(stream), micro, 0.25, at()).statistics
    truth, labelled = truth_scores(stream, labels), labels >= 0
    assert statistics[ROUTER_ENTROPY].item() == pytest.approx(truth["entropy"][labelled].mean().item(), rel=1e-5)
    p = (stream.hidden_RD.double() @ stream.head_VD.double().T).softmax(-1)
    assert statistics[ROUTER_CONFIDENCE].item() == pytest.approx(p.amax(-1)[labelled].mean().item(), rel=1e-5)
    edges = np.array(NATS.edges)
    inside = truth["loss"][labelled].numpy().clip(edges[0], edges[-1] - 1e-9)
    assert statistics[ROUTER_SCORES].tolist() == np.histogram(inside, edges)[0].tolist()
    assert len(statistics[ROUTER_SCORES]) == HISTOGRAM_BINS


@pytest.mark.parametrize("spread", [0.01, 2.0, 8.0])
@pytest.mark.parametrize("score", SCORES)
def test_a_histogram_of_scores_holds_them_between_its_edges(score, spread):
    """From the logits of a fresh model over 50,000 tokens to those of a sure one: none is swept into an end."""
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(400, 50_000, generator=g) * spread, torch.randint(50_000, (400,), generator=g)
    # A sure model is mostly right.
    logits[:, 0], labels[100:] = logits.amax(1) + spread, 0
    values = score_of(score, chunk_stats(logits.double(), labels))
    edges = np.array(SelectedTokens(score=score).build(0, SETTING).edges()[ROUTER_SCORES])
    usual = values[labels == 0]
    assert edges[0] <= usual.min() and usual.max() < edges[-1]
    counted = SCORE_BINS[score].counts(torch.cat([values, torch.tensor([-torch.inf])]))
    assert counted.tolist() == np.histogram(values.numpy().clip(edges[0], edges[-1] - 1e-6), edges)[0].tolist()


@pytest.mark.parametrize("score", SCORES)
def test_a_histogram_of_scores_tells_them_apart(score):
    stream, micro = stream_of(odd_micro()), odd_micro()
    counts = routed(SelectedTokens(score=score).build(0, SETTING), seen_of(stream), micro, 0.25, at()).statistics
    assert (counts[ROUTER_SCORES] > 0).sum() >= 5 and counts[ROUTER_SCORES].max() < 0.5 * micro.labelled


@pytest.mark.parametrize("name", ["random", "stratified", "importance"])
def test_draws_depend_on_seed_step_and_micro_batch_alone(name):
    part = PARTS[name]

    def kept(seed=0, step=3, index=0, router=None):
        micro = micro_of(torch.ones(4, 40, dtype=torch.bool), index)
        return routed(
            router or part.build(seed, SETTING), seen_of(stream_of(micro)), micro, part.keep, at(step)
        ).index_BK

    used = part.build(0, SETTING)
    for step in range(3):
        kept(step=step, router=used)
    assert torch.equal(kept(), kept()) and torch.equal(kept(router=used), kept())
    for other in (kept(seed=1), kept(step=4), kept(index=1)):
        assert not torch.equal(other, kept())


def test_random_tokens_are_drawn_uniformly():
    labelled = torch.ones(500, 12, dtype=torch.bool)
    labelled[:, [0, 7]] = False
    micro, router = micro_of(labelled), RandomTokens(keep=0.3).build(0, SETTING)
    counts = torch.zeros(12)
    for step in range(8):
        index = routed(router, seen_of(stream_of(micro)), micro, 0.3, at(step)).index_BK[:, :3]
        counts += torch.bincount(index.flatten(), minlength=12)
    draws, expected = 4000, 0.3
    z = (counts / draws - expected) / math.sqrt(expected * (1 - expected) / draws)
    assert counts[0] == counts[7] == 0 and z[labelled[0]].abs().max() < 4


def test_all_tokens_never_asks_for_a_route():
    router = AllTokens().build(0, SETTING)
    assert router.levels() == (1.0,) and all(router.ratio(at(fraction=f)) == 1.0 for f in (0.0, 0.5, 1.0))
    assert route_by(AllTokens(), odd_micro()) is None


# Configurations


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: SelectedTokens(keep=0.0), "keep = 0.0"),
        (lambda: SelectedTokens(keep=1.5), "keep = 1.5"),
        (lambda: SelectedTokens(keep=math.nan), "keep = nan"),
        (lambda: RandomTokens(keep=-0.1), "keep = -0.1"),
        (lambda: SelectedTokens(num_strata=0), "num_strata = 0"),
        (lambda: SelectedTokens(num_strata=1001), "num_strata = 1001; accepted: 1 to 1000"),
        (lambda: SelectedTokens(min_tokens_per_sequence=-1), "min_tokens_per_sequence = -1"),
        (
            lambda: SelectedTokens(keep=0.6, drop_easiest=0.4, drop_hardest=0.1),
            "drop_easiest = 0.4, drop_hardest = 0.1",
        ),
        (lambda: SelectedTokens(drop_easiest=-0.1), "drop_easiest = -0.1"),
        (lambda: SelectedTokens(drop_hardest=math.nan), "drop_hardest = nan"),
        (lambda: SelectedTokens(weights="inverse_probability"), "'inverse_probability' with 'topk'"),
        (lambda: SelectedTokens(**(IMPORTANCE | {"weights": "mean"})), "with weights 'inverse_probability'"),
        (lambda: SelectedTokens(**(IMPORTANCE | {"score": "entropy"})), "'importance' by 'entropy'"),
        (lambda: SelectedTokens(keep=0.25, largest_weight=3.9, **IMPORTANCE), "largest_weight = 3.9"),
        (lambda: SelectedTokens(keep=0.25, largest_weight=7.9, dynamic=DynamicThreshold(), **IMPORTANCE), "at least 8"),
        (lambda: SelectedTokens(importance_floor=0.0, **IMPORTANCE), "positive floor"),
        (lambda: Curriculum(full_until=0.5, target_at=0.4), "full_until=0.5"),
        (lambda: Curriculum(full_from=1.1), "full_from=1.1"),
        (lambda: Curriculum(full_every=1), "full_every = 1"),
        (lambda: Curriculum(full_every=-3), "full_every = -3"),
        (lambda: DynamicThreshold(sensitivity=-1.0), "sensitivity=-1.0"),
        (lambda: DynamicThreshold(smoothing=1.0), "smoothing=1.0"),
    ],
)
def test_impossible_configurations_are_named_in_one_line(make, named):
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        make()
    assert "\n" not in str(error.value) and "accepted: " in str(error.value)


# The loss of a route


def linear_model(micro, seed=2):
    """An embedding, one matrix, and a head: enough for gradients of hidden states and head to differ by position."""
    g = torch.Generator().manual_seed(seed)
    table, matrix, head = (torch.randn(s, generator=g) for s in ((VOCABULARY, 5), (WIDTH, 5), (VOCABULARY, WIDTH)))
    # The position matters too, or equal tokens would be equal positions.
    where = 0.3 * torch.randn(micro.tokens_BT.numel(), 5, generator=g)
    return table[micro.tokens_BT.flatten()] + where, matrix.requires_grad_(), head.requires_grad_()


def gradient(inputs, matrix, head, micro, route, labelled):
    loss = NextToken().loss(Stream(inputs @ matrix.T, head), micro, route, torch.tensor(1 / labelled))
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss.total, (matrix, head))]), loss.reported


def full_gradient(inputs, matrix, head, micro):
    matrix, head = (x.detach().double().requires_grad_() for x in (matrix, head))
    logits = inputs.double() @ matrix.T @ head.T
    loss = F.cross_entropy(logits, micro.labels_BT.flatten(), ignore_index=-100)
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss, (matrix, head))]), loss.detach()


def test_without_a_route_the_loss_is_the_mean_cross_entropy():
    micro = odd_micro()
    model = linear_model(micro)
    found, reported = gradient(*model, micro, None, micro.labelled)
    expected, loss = full_gradient(*model, micro)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    assert reported.item() == pytest.approx(loss.item(), rel=1e-6) and not reported.requires_grad


def test_a_route_over_everything_is_no_route():
    micro = odd_micro()
    model = linear_model(micro)
    everything = TokenRoute(torch.arange(37).repeat(6, 1), torch.ones(6, 37))
    found, _ = gradient(*model, micro, everything, micro.labelled)
    torch.testing.assert_close(found, gradient(*model, micro, None, micro.labelled)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scope", ["row", "batch"])
def test_the_loss_of_selected_positions_by_a_loop(scope):
    micro = odd_micro()
    inputs, matrix, head = linear_model(micro)
    stream = Stream((inputs @ matrix.T).detach(), head)
    route = routed(
        SelectedTokens(keep=0.25, score="loss", scope=scope).build(0, SETTING), seen_of(stream), micro, 0.25, at()
    )
    nll = truth_scores(Stream(stream.hidden_RD, head.detach()), micro.labels_BT.flatten())["loss"]
    nll = torch.where(micro.labels_BT.flatten() >= 0, nll, -torch.inf)
    lines, counts = (1, [micro.labelled]) if scope == "batch" else (6, micro.labelled_B.tolist())
    total = 0.0
    for row, labelled in zip(nll.view(lines, -1), counts, strict=True):
        hardest = row.sort(descending=True).values[: max(round(0.25 * labelled), min(labelled, 1))]
        total += labelled * hardest.mean().item() if labelled else 0.0
    _, reported = gradient(inputs, matrix, head, micro, route, 321)
    assert reported.item() == pytest.approx(total / 321, rel=1e-5)


@pytest.mark.parametrize(
    "part",
    [
        SelectedTokens(keep=0.25, **IMPORTANCE),
        SelectedTokens(keep=0.25, scope="batch", **IMPORTANCE),
        SelectedTokens(keep=0.1, **IMPORTANCE),
        SelectedTokens(keep=0.5, selection="stratified", weights="inverse_probability", scope="batch"),
    ],
)
def test_inverse_probability_gives_the_full_gradient_on_average(part):
    labelled = torch.rand(4, 14, generator=torch.Generator().manual_seed(6)) < 0.7
    labelled[0], labelled[1] = True, False
    micro = micro_of(labelled)
    inputs, matrix, head = linear_model(micro)
    expected, loss = full_gradient(inputs, matrix, head, micro)
    router = part.build(0, SETTING)
    with torch.no_grad():
        stream = Stream(inputs @ matrix.T, head)
    draws, losses = [], []
    for step in range(400):
        route = routed(router, seen_of(stream), micro, part.keep, at(step))
        found, reported = gradient(inputs, matrix, head, micro, route, micro.labelled)
        draws.append(found)
        losses.append(reported)
    draws, losses = torch.stack(draws).double(), torch.stack(losses).double()
    error = draws.std(0) / len(draws) ** 0.5
    z = (draws.mean(0) - expected) / error.clamp_min(1e-7)
    assert z.abs().max() < 4.5 and z.square().mean() < 1.8
    assert abs(losses.mean() - loss) < 4 * losses.std() / len(losses) ** 0.5
    # It is an estimate: a single draw is far from the truth.
    assert (draws[0] - expected).norm() > 5 * (draws.mean(0) - expected).norm()
