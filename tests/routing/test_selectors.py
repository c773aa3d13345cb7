"""Selections against plain Python: exact counts, brute force, quotas by hand, and z tests of random draws."""

import math
import random

import pytest
import torch

from cggr_ray.routing.selectors import (
    fill_quotas,
    inclusion_probabilities,
    one_each,
    sequence_aware,
    strata_plan,
    strata_quotas,
    stratified,
    stratified_top,
    systematic,
    top_k,
)

SIZES = [(1, 1), (1, 7), (3, 2), (5, 13), (4, 64), (3, 201)]
DRAWS = 10_000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_rows(rows, width, seed=0, distinct=None):
    """Scores with -inf at random unlabelled positions, the labelled counts, and counts to keep from none to all."""
    g = generator(seed)
    scores = torch.randn(rows, width, generator=g)
    if distinct:
        scores = torch.randint(distinct, (rows, width), generator=g).float()
    share = torch.rand(rows, 1, generator=g)
    share[0] = 1.1
    labelled = torch.rand(rows, width, generator=g) < share
    if rows > 1:
        labelled[1] = False
    count = labelled.sum(1)
    keep = (torch.rand(rows, generator=g) * (count + 1)).long().clamp(max=count)
    keep = torch.maximum(keep, count.clamp(max=1))
    return torch.where(labelled, scores, -torch.inf), count, keep


def random_documents(rows, width, seed=0):
    starts = torch.rand(rows, width, generator=generator(seed + 100)) < 0.2
    return starts.cumsum(1)


def importance_of(scores, floor=0.15):
    return torch.where(scores > -torch.inf, scores.abs().clamp_min(floor), 0.0)


SELECTORS = {
    "top_k": lambda s, n, k, seed: top_k(s, k),
    "sequence_aware": lambda s, n, k, seed: sequence_aware(s, k, random_documents(*s.shape, seed), 2),
    "stratified": lambda s, n, k, seed: stratified(s, k, n, 4, generator(seed)),
    "stratified_top": lambda s, n, k, seed: stratified_top(s, k, n, 4),
    "every_stratum": lambda s, n, k, seed: stratified(s, k, n, 4, generator(seed), every_stratum=True),
    "systematic": lambda s, n, k, seed: systematic(
        inclusion_probabilities(importance_of(s), k, 0.01), k, generator(seed)
    ),
}


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("rows, width", SIZES)
@pytest.mark.parametrize("distinct", [None, 2])
def test_exactly_keep_and_only_labelled(name, rows, width, distinct):
    for seed in range(6):
        scores, count, keep = random_rows(rows, width, seed, distinct)
        for k in (keep, count, count.clamp(max=1), torch.zeros_like(count)):
            mask = SELECTORS[name](scores, count, k, seed).mask_BT
            assert mask.dtype == torch.bool and mask.shape == scores.shape
            assert mask.sum(1).tolist() == k.tolist()
            assert not (mask & (scores == -torch.inf)).any()


@pytest.mark.parametrize("name", ["stratified", "systematic"])
def test_equal_seeds_draw_equally(name):
    scores, count, keep = random_rows(4, 64, seed=3)
    first, again, other = (SELECTORS[name](scores, count, keep, seed).mask_BT for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("rows, width", SIZES)
@pytest.mark.parametrize("distinct", [None, 1, 3])
def test_top_k_takes_the_largest_and_the_lower_index_of_equals(rows, width, distinct):
    scores, _, keep = random_rows(rows, width, seed=width, distinct=distinct)
    mask = top_k(scores, keep).mask_BT
    for row, k, found in zip(scores.tolist(), keep.tolist(), mask.tolist(), strict=True):
        best = sorted(range(width), key=lambda t, row=row: (-row[t], t))[:k]
        assert [t for t in range(width) if found[t]] == sorted(best)


def brute_sequence_aware(scores, documents, keep, minimum):
    order = sorted((t for t in range(len(scores)) if scores[t] > -math.inf), key=lambda t: (-scores[t], t))
    given: dict[int, int] = {}
    reserved = []
    for t in order:
        given[documents[t]] = given.get(documents[t], 0) + 1
        if given[documents[t]] <= minimum:
            reserved.append(t)
    chosen = reserved[:keep]
    for t in order:
        if len(chosen) < keep and t not in chosen:
            chosen.append(t)
    return sorted(chosen)


@pytest.mark.parametrize("rows, width", SIZES)
@pytest.mark.parametrize("minimum", [0, 1, 3])
@pytest.mark.parametrize("distinct", [None, 2])
def test_sequence_aware_against_brute_force(rows, width, minimum, distinct):
    for seed in range(4):
        scores, count, keep = random_rows(rows, width, seed, distinct)
        documents = random_documents(rows, width, seed)
        # Numbers of documents need not rise: any two numbers tell two documents apart.
        documents = torch.where(documents % 2 == 0, documents + 1000, documents)
        for k in (keep, (count / 4).ceil().long()):
            mask = sequence_aware(scores, k, documents, minimum).mask_BT
            for b in range(rows):
                expected = brute_sequence_aware(scores[b].tolist(), documents[b].tolist(), k[b].item(), minimum)
                assert mask[b].nonzero().flatten().tolist() == expected


def test_sequence_aware_serves_a_document_of_easy_positions():
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 0.1, 0.2]])
    documents = torch.tensor([[1, 1, 1, 1, 2, 2]])
    assert sequence_aware(scores, torch.tensor([3]), documents, 1).mask_BT.tolist() == [[1, 1, 0, 0, 0, 1]]
    assert sequence_aware(scores, torch.tensor([3]), documents, 0).mask_BT.tolist() == [[1, 1, 1, 0, 0, 0]]


# Stratified


@pytest.mark.parametrize(
    "keep, strata, expected",
    [
        (10, 4, [4, 3, 2, 1]),
        (20, 4, [8, 6, 4, 2]),
        (1, 4, [1, 0, 0, 0]),
        # 4.4, 3.3, 2.2, 1.1: one is missing, the largest remainder is the first's.
        (11, 4, [5, 3, 2, 1]),
        # 2.8, 2.1, 1.4, 0.7: two are missing, remainders .8 and .7 get them.
        (7, 4, [3, 2, 1, 1]),
        # 2, 1.5, 1, 0.5: remainders tie, the harder stratum gets it.
        (5, 4, [2, 2, 1, 0]),
        (6, 3, [3, 2, 1]),
        (5, 1, [5]),
        (0, 4, [0, 0, 0, 0]),
    ],
)
def test_quotas_by_hand(keep, strata, expected):
    assert strata_quotas(torch.tensor([[keep]]), strata).tolist() == [expected]


@pytest.mark.parametrize("strata", [1, 2, 3, 4, 7])
def test_quotas_are_the_shares_up_to_one(strata):
    keep = torch.arange(300).unsqueeze(1)
    quotas = strata_quotas(keep, strata)
    assert torch.equal(quotas.sum(1), keep.flatten())
    parts = [2 * (strata - s) / (strata * (strata + 1)) for s in range(strata)]
    for k, row in zip(range(300), quotas.tolist(), strict=True):
        assert all(abs(q - k * part) < 1 for q, part in zip(row, parts, strict=True))
        assert row == sorted(row, reverse=True)


@pytest.mark.parametrize(
    "quotas, sizes, expected",
    [
        ([4, 3, 2, 1], [5, 5, 5, 5], [4, 3, 2, 1]),
        ([8, 6, 4, 2], [5, 5, 5, 5], [5, 5, 5, 5]),
        # Three of the first do not fit: the second takes two of them, the third one.
        ([8, 3, 2, 1], [5, 5, 5, 5], [5, 5, 3, 1]),
        # What the easiest cannot hold goes back to the harder ones, the nearest first.
        ([1, 1, 1, 6], [9, 2, 2, 2], [3, 2, 2, 2]),
        ([4, 3, 2, 1], [0, 4, 3, 4], [0, 4, 3, 3]),
        ([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_overflow_by_hand(quotas, sizes, expected):
    assert fill_quotas(torch.tensor([quotas]), torch.tensor([sizes])).tolist() == [expected]


def strata_of(scores, strata):
    """The stratum of every labelled position: place s of S where its rank r has s <= r S / n < s + 1."""
    labelled = sorted((t for t in range(len(scores)) if scores[t] > -math.inf), key=lambda t: (-scores[t], t))
    return {t: r * strata // len(labelled) for r, t in enumerate(labelled)}


@pytest.mark.parametrize(
    "width, keep, strata", [(20, 10, 4), (40, 10, 4), (23, 7, 3), (37, 30, 5), (9, 9, 4), (3, 2, 4)]
)
def test_stratified_takes_its_quota_of_every_stratum(width, keep, strata):
    scores = torch.randn(6, width + 4, generator=generator(1))
    scores[:, [0, 3, 4, -1]] = -torch.inf
    count, wanted = torch.full((6,), width), torch.full((6,), keep)
    selection = stratified(scores, wanted, count, strata, generator(2))
    for row, mask, probability in zip(scores, selection.mask_BT, selection.probability_BT, strict=True):
        member = strata_of(row.tolist(), strata)
        sizes = [list(member.values()).count(s) for s in range(strata)]
        quotas = fill_quotas(strata_quotas(torch.tensor([[keep]]), strata), torch.tensor([sizes]))[0].tolist()
        kept = [member[t] for t in mask.nonzero().flatten().tolist()]
        assert [kept.count(s) for s in range(strata)] == quotas
        for t, s in member.items():
            assert probability[t].item() == pytest.approx(quotas[s] / sizes[s])


@pytest.mark.parametrize("distinct", [None, 3])
@pytest.mark.parametrize(
    "width, keep, strata", [(20, 10, 4), (40, 10, 4), (23, 7, 3), (37, 30, 5), (9, 9, 4), (3, 2, 4)]
)
def test_stratified_top_takes_the_hardest_of_every_stratum(width, keep, strata, distinct):
    scores = torch.randn(6, width + 4, generator=generator(1))
    if distinct:
        scores = torch.randint(distinct, scores.shape, generator=generator(1)).float()
    scores[:, [0, 3, 4, -1]] = -torch.inf
    selection = stratified_top(scores, torch.full((6,), keep), torch.full((6,), width), strata)
    assert selection.probability_BT is None
    for row, mask in zip(scores.tolist(), selection.mask_BT, strict=True):
        member = strata_of(row, strata)
        sizes = [list(member.values()).count(s) for s in range(strata)]
        quotas = fill_quotas(strata_quotas(torch.tensor([[keep]]), strata), torch.tensor([sizes]))[0].tolist()
        expected = []
        for s in range(strata):
            own = sorted((t for t in member if member[t] == s), key=lambda t: (-row[t], t))
            expected += own[: quotas[s]]
        assert mask.nonzero().flatten().tolist() == sorted(expected)


def upstream(scores, keep, strata):
    """Thresholds at quantiles, the top of each stratum by its share of the count, as upstream's code on a CPU."""
    edges = [torch.quantile(scores, 1 - s / strata) for s in range(1, strata)]
    kept = torch.zeros(len(scores), dtype=torch.bool)
    for s in range(strata):
        below = scores < edges[s - 1] if s else torch.ones_like(kept)
        own = (below & (scores >= edges[s])) if s < strata - 1 else below
        count = min(int(own.sum()), keep * (strata - s) * 2 // (strata * (strata + 1)))
        kept[own.nonzero().flatten()[scores[own].topk(count).indices]] = True
    return kept


@pytest.mark.parametrize("seed", range(4))
def test_stratified_top_is_upstream_s_rule_where_nothing_overflows(seed):
    scores = torch.randn(400, generator=generator(seed))
    found = stratified_top(scores[None], torch.tensor([100]), torch.tensor([400]), 4).mask_BT[0]
    assert torch.equal(found, upstream(scores, 100, 4)) and found.sum() == 100


def test_ratio_one_keeps_everything():
    scores, count, _ = random_rows(8, 61, seed=5)
    selection = stratified(scores, count, count, 4, generator())
    assert torch.equal(selection.mask_BT, scores > -torch.inf)
    assert (selection.probability_BT[scores > -torch.inf] == 1).all()
    assert torch.equal(stratified_top(scores, count, count, 4).mask_BT, scores > -torch.inf)


def z_scores(masks, probability):
    """How many standard errors each position's share of draws lies from its probability."""
    draws = len(masks)
    certain = (probability == 0) | (probability > 1 - 1e-9)
    error = (probability * (1 - probability) / draws).sqrt()
    share = masks.double().mean(0)
    assert torch.equal(share[certain], probability[certain].round())
    return ((share - probability) / error)[~certain]


def repeated(x, draws=DRAWS):
    return x.expand(draws, *x.shape[1:]).contiguous()


@pytest.mark.parametrize("width, keep, strata", [(12, 6, 4), (20, 10, 4), (17, 9, 3)])
def test_stratified_draws_uniformly_within_strata(width, keep, strata):
    scores = torch.randn(1, width, generator=generator(7))
    scores[0, 2] = -torch.inf
    labelled, wanted = torch.full((DRAWS,), width - 1), torch.full((DRAWS,), keep)
    selection = stratified(repeated(scores), wanted, labelled, strata, generator(8))
    member = strata_of(scores[0].tolist(), strata)
    sizes = [list(member.values()).count(s) for s in range(strata)]
    quotas = fill_quotas(strata_quotas(torch.tensor([[keep]]), strata), torch.tensor([sizes]))[0].tolist()
    expected = [quotas[member[t]] / sizes[member[t]] if t in member else 0.0 for t in range(width)]
    z = z_scores(selection.mask_BT, torch.tensor(expected, dtype=torch.float64))
    assert z.abs().max() < 4
    easiest = [t for t, s in member.items() if s == strata - 1]
    assert selection.mask_BT[:, easiest].any(0).all()


# Importance


def bisected(importance, keep, smallest):
    """pi by bisection of the level itself, one row in Python floats."""
    present = [s for s in importance if s > 0]

    def at(level):
        return [min(1.0, max(smallest, level * s)) for s in present]

    low, high = 0.0, 2 / min(present)
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (low, middle) if math.fsum(at(middle)) > keep else (middle, high)
    pi = iter(at(high))
    return [next(pi) if s > 0 else 0.0 for s in importance]


@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("width, keep", [(1, 1), (10, 3), (64, 16), (201, 50), (50, 49), (40, 40), (30, 3)])
def test_inclusion_probabilities(width, keep, spread):
    smallest = 0.1
    importance = (torch.randn(4, width + 3, generator=generator(width)) * spread).exp()
    importance[:, [0, width // 2, -1]] = 0
    count = (importance > 0).sum(1)
    wanted = torch.minimum(torch.tensor([keep] * 4), count)
    pi = inclusion_probabilities(importance, wanted, smallest)
    present = importance > 0
    assert pi.dtype == torch.float64 and (pi[~present] == 0).all()
    torch.testing.assert_close(pi.sum(1), wanted.double(), atol=1e-9, rtol=0)
    assert (pi[present] >= smallest).all() and (pi[present] <= 1).all()
    for row, k, found in zip(importance.double().tolist(), wanted.tolist(), pi, strict=True):
        by_importance = found[torch.tensor(row).argsort()]
        assert (by_importance.diff() >= 0).all()
        expected = torch.tensor(bisected(row, k, smallest), dtype=torch.float64)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_inclusion_probabilities_by_hand():
    # c = 1 / 4: the largest would be 2 and is certain, the others share the remaining 1.5 as 2 : 3 : 1.
    pi = inclusion_probabilities(torch.tensor([[8.0, 2.0, 0.0, 3.0, 1.0]]), torch.tensor([2]), 0.01)
    assert pi[0].tolist() == pytest.approx([1, 1 / 3, 0, 1 / 2, 1 / 6], abs=1e-9)
    # The smallest is lifted to 0.3, the rest share 1.7 as 4 : 4 : 2.
    pi = inclusion_probabilities(torch.tensor([[4.0, 4.0, 2.0, 0.1]]), torch.tensor([2]), 0.3)
    assert pi[0].tolist() == pytest.approx([0.68, 0.68, 0.34, 0.3], abs=1e-9)


@pytest.mark.parametrize("width, keep", [(14, 1), (29, 2), (23, 2)])
def test_a_short_row_still_sums_to_its_count(width, keep):
    """Whole numbers can ask for less than `smallest` a position: 1 of 14 is less than a tenth."""
    importance = torch.rand(1, width, generator=generator(1)) + 0.2
    pi = inclusion_probabilities(importance, torch.tensor([keep]), 0.1)
    assert pi.sum().item() == pytest.approx(keep, abs=1e-9)


PROBABILITIES = [
    [0.5] * 6,
    [1.0, 0.25, 0.0, 0.75, 0.5, 0.5],
    [0.1] * 10 + [1.0, 1.0] + [0.0] * 3,
    [0.9, 0.6, 0.3, 0.2] * 5,
]


@pytest.mark.parametrize("probability", PROBABILITIES)
def test_systematic_keeps_each_position_with_its_probability(probability):
    pi = torch.tensor([probability], dtype=torch.float64)
    keep = pi.sum().round().long()
    assert pi.sum().item() == pytest.approx(keep.item())
    selection = systematic(repeated(pi), keep.expand(DRAWS), generator(9))
    assert (selection.mask_BT.sum(1) == keep).all()
    assert torch.equal(selection.probability_BT[0], pi[0])
    z = z_scores(selection.mask_BT, pi[0])
    assert z.abs().max() < 4 and z.square().mean() < 2


def test_systematic_survives_rounding_of_the_running_sum():
    g = generator(10)
    importance = (torch.randn(20, 499, generator=g) * 4).exp()
    keep = torch.randint(50, 500, (20,), generator=g)
    pi = inclusion_probabilities(importance, keep, 0.1)
    for seed in range(3):
        mask = systematic(pi, keep, generator(seed)).mask_BT
        assert torch.equal(mask.sum(1), keep)
        assert mask[pi > 1 - 1e-9].all()


def test_systematic_without_enough_positions_does_not_crash():
    """Where a diverging model leaves no score to go by: the step is skipped for its norm, so it has to get there."""
    pi = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    mask = systematic(pi, torch.tensor([2, 3]), generator()).mask_BT
    assert mask.shape == (2, 4) and mask[1, 0] and mask[1, 2]


def horvitz_thompson(selection, values):
    weights = torch.where(selection.mask_BT, 1 / selection.probability_BT.double().clamp_min(1e-300), 0.0)
    return (weights * values).sum(1)


def assert_unbiased(estimates, expected):
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - expected) < 4 * error + 1e-9 * abs(expected)


@pytest.mark.parametrize("width, keep", [(24, 6), (40, 13), (14, 1), (31, 30)])
def test_importance_sampling_estimates_the_full_sum(width, keep):
    importance = torch.randn(1, width, generator=generator(11)).exp()
    importance[0, 1] = 0
    values = torch.randn(width, generator=generator(12), dtype=torch.float64) + 1
    k = torch.tensor([keep])
    pi = inclusion_probabilities(importance, k, 0.1)
    selection = systematic(repeated(pi), k.expand(DRAWS), generator(13))
    assert_unbiased(horvitz_thompson(selection, values), (values * (importance[0] > 0)).sum())


@pytest.mark.parametrize("width, keep", [(24, 6), (40, 13), (33, 10)])
def test_stratified_estimates_the_full_sum(width, keep):
    scores = torch.randn(1, width, generator=generator(14))
    values = torch.randn(width, generator=generator(15), dtype=torch.float64) + 1
    wanted, labelled = torch.full((DRAWS,), keep), torch.full((DRAWS,), width)
    selection = stratified(repeated(scores), wanted, labelled, 4, generator(16))
    assert_unbiased(horvitz_thompson(selection, values), values.sum())


@pytest.mark.parametrize(
    "quotas, sizes, expected",
    [
        # Nothing to lift; then one from the largest; then one from the easier of two equals.
        ([4, 3, 2, 1], [5, 5, 5, 5], [4, 3, 2, 1]),
        ([4, 1, 1, 0], [5, 5, 5, 5], [3, 1, 1, 1]),
        ([2, 2, 1, 0], [5, 5, 5, 5], [2, 1, 1, 1]),
        ([4, 0, 0, 0], [4, 4, 4, 4], [1, 1, 1, 1]),
        ([5, 0, 0, 0], [5, 4, 0, 4], [3, 1, 0, 1]),
        ([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_one_each_by_hand(quotas, sizes, expected):
    assert one_each(torch.tensor([quotas]), torch.tensor([sizes])).tolist() == [expected]


@pytest.mark.parametrize("strata", [1, 2, 3, 4, 7])
def test_every_labelled_position_can_be_drawn(strata):
    labelled, keep = torch.tensor([(n, k) for n in range(1, 40) for k in range(1, n + 1)]).unbind(1)
    starts, quota = strata_plan(keep, labelled, strata, every_stratum=True)
    size = starts.diff(dim=1)
    assert torch.equal(size.sum(1), labelled) and torch.equal(quota.sum(1), keep)
    assert torch.equal(quota > 0, size > 0) and (quota <= size).all()
    plain_starts, plain_quota = strata_plan(keep, labelled, strata, every_stratum=False)
    fine = ((plain_quota > 0) | (plain_starts.diff(dim=1) == 0)).all(1)
    assert torch.equal(quota[fine], plain_quota[fine]) and torch.equal(starts[fine], plain_starts[fine])


@pytest.mark.parametrize("width, keep", [(1, 1), (3, 1), (3, 2), (6, 2), (7, 3), (8, 4), (9, 5), (17, 4), (30, 1)])
def test_stratified_estimates_the_full_sum_of_a_short_row(width, keep):
    scores = torch.randn(1, width + 2, generator=generator(18)).round()
    scores[0, [0, -1]] = -torch.inf
    values = torch.randn(width + 2, generator=generator(19), dtype=torch.float64) + 1
    wanted, labelled = torch.full((DRAWS,), keep), torch.full((DRAWS,), width)
    selection = stratified(repeated(scores), wanted, labelled, 4, generator(20), every_stratum=True)
    assert (selection.mask_BT.sum(1) == keep).all() and not selection.mask_BT[:, [0, -1]].any()
    assert_unbiased(horvitz_thompson(selection, values), values[1:-1].sum())
    pi = torch.where(scores[0] > -torch.inf, selection.probability_BT[0], 0.0).double()
    assert (z_scores(selection.mask_BT, pi).abs() < 4).all()
    assert selection.mask_BT.any(0)[1:-1].all()


def test_selection_does_not_depend_on_the_other_rows():
    scores, _, keep = random_rows(6, 40, seed=17)
    documents = random_documents(6, 40)
    order = random.Random(0).sample(range(6), 6)
    for select in (lambda s, k, d: top_k(s, k), lambda s, k, d: sequence_aware(s, k, d, 2)):
        whole = select(scores, keep, documents).mask_BT
        assert torch.equal(select(scores[order], keep[order], documents[order]).mask_BT, whole[order])
