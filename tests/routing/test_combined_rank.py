"""The score `combined_rank` against counting by hand, in fractions."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from small_batches import packed
from small_models import small_model
from torch import Tensor

from cggr_ray import CGGRLoss, CGGRScorer
from cggr_ray.kernels.head_stats.op import HeadStats
from cggr_ray.models.adapter import Adapter
from cggr_ray.routing.scorers import own_scores
from cggr_ray.routing.scores import score
from cggr_ray.sparse.plan import seen_after


def stats_of(rows: int, width: int, seed: int, distinct: int | None = None) -> HeadStats:
    """Statistics of a quarter unlabelled positions; with `distinct`, many that are equal."""
    g = torch.Generator().manual_seed(seed)
    shape = (7, rows * width)
    values = torch.randn(shape, generator=g).exp()
    if distinct:
        values = torch.randint(distinct, shape, generator=g).float()
    values[:, torch.rand(rows * width, generator=g) < 0.25] = torch.nan
    return HeadStats._make(values)


def by_hand(stats: HeadStats, rows: int) -> list[float | None]:
    terms = [(stats.entropy - stats.confidence).tolist(), (1 - stats.margin).tolist(), stats.nll.tolist()]
    width = len(terms[0]) // rows
    found: list[float | None] = []
    for begin, end in pairwise(range(0, rows * width + 1, width)):
        inside = [t for t in range(begin, end) if all(term[t] == term[t] for term in terms)]
        for t in range(begin, end):
            total = Fraction(0)
            for term in terms:
                below = sum(term[u] < term[t] for u in inside)
                equal = sum(term[u] == term[t] for u in inside)
                total += Fraction(2 * below + equal, 2 * max(1, len(inside)))
            found.append(float(total / 3) if t in inside else None)
    return found


@pytest.mark.parametrize("distinct", [None, 1, 3])
@pytest.mark.parametrize("shape, rows", [((1, 1), 1), ((4, 33), 1), ((4, 33), 4), ((3, 64), 3)])
def test_it_is_the_mean_of_the_percentile_ranks(shape: tuple[int, int], rows: int, distinct: int | None) -> None:
    stats = stats_of(*shape, seed=shape[1] + rows, distinct=distinct)
    found = score("combined_rank", stats, rows=rows)
    assert found.dtype == torch.float32
    for value, expected in zip(found.tolist(), by_hand(stats, rows), strict=True):
        assert value == (-torch.inf if expected is None else pytest.approx(expected, abs=1e-7))


def test_terms_count_alike_whatever_their_units() -> None:
    stats = stats_of(1, 50, 3)
    large = stats._replace(nll=(stats.nll * 1e4).exp())
    assert large.nll.isposinf().any()
    of_rows = [score("combined_rank", one) for one in (stats, stats._replace(nll=stats.nll * 1e30))]
    assert torch.equal(*of_rows)
    labelled = ~stats.nll.isnan()
    assert (score("combined_rank", large)[labelled] <= 1).all()


def test_positions_without_a_number_count_for_nobody() -> None:
    stats = stats_of(1, 40, 4)
    labelled = int((~stats.nll.isnan()).nonzero()[5])
    hurt = stats._replace(entropy=stats.entropy.clone())
    hurt.entropy[labelled] = torch.nan
    found, expected = score("combined_rank", hurt), by_hand(hurt, 1)
    assert found[labelled] == -torch.inf and expected[labelled] is None
    others = [v for v in expected if v is not None]
    torch.testing.assert_close(found[found > -torch.inf], torch.tensor(others))


def test_rows_are_compared_within_the_scope_alone() -> None:
    adapter = Adapter(small_model("llama"))
    micro = packed([[30, 10], [40], [25, 15]], 40, seed=2)
    with torch.no_grad():
        seen = seen_after(adapter, micro, 2)
        of_row, of_batch = (own_scores("combined_rank", seen, micro, scope=s).scores_BT for s in ("row", "batch"))
    labelled = micro.labels_BT >= 0
    for row, inside in zip(of_row, labelled, strict=True):
        # The mean of all percentile ranks is a half.
        assert row[inside].mean().item() == pytest.approx(0.5, abs=1e-6)
    assert of_batch[labelled].mean().item() == pytest.approx(0.5, abs=1e-6)
    assert not torch.equal(of_row, of_batch)


def test_it_is_a_score_of_other_people_s_loops() -> None:
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 20, 11, generator=g), torch.randint(11, (3, 20), generator=g)
    scores: Tensor = CGGRScorer("combined_rank")(logits, targets)
    assert scores.shape == (3, 20) and scores.mean().item() == pytest.approx(0.5, abs=1e-6)
    options = {"min_tokens_ratio": 0.25, "warmup_steps": 0, "dynamic_threshold": False}
    loss = CGGRLoss("combined_rank", **options)(logits, targets)  # type: ignore[arg-type]
    kept = scores.flatten().topk(15).indices
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1)[kept], targets.flatten()[kept])
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="scoring 'combined_rank' without targets"):
        CGGRScorer("combined_rank")(logits)
