"""What objectives share: labels further ahead, terms one at a time, and the settings of the next-token loss."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from small_batches import LENGTHS, VOCABULARY, document_spans, packed
from torch import Tensor, nn

from cggr_ray.models.adapter import Stream
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.objectives.objective import labels_ahead, one_at_a_time
from cggr_ray.routing.route import TokenRoute

MICRO = packed(LENGTHS, 21)
WIDTH = 8


def stream() -> Stream:
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(MICRO.labels_BT.numel(), WIDTH, generator=g)
    return Stream(hidden.requires_grad_(), torch.randn(VOCABULARY, WIDTH, generator=g).requires_grad_())


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20, 21, 22, 40])
def test_labels_ahead_document_by_document(steps: int) -> None:
    expected = torch.full_like(MICRO.labels_BT, -100)
    for row, span in document_spans(MICRO):
        for t in range(span.start, span.stop):
            if t + steps - 1 < span.stop:
                expected[row, t] = MICRO.labels_BT[row, t + steps - 1]
    found = labels_ahead(MICRO, steps)
    assert torch.equal(found, expected) and found.dtype == torch.int64
    assert (found >= 0).any() == (steps <= 21)
    if steps == 1:
        assert torch.equal(found, MICRO.labels_BT)


def test_a_documents_last_position_has_a_label_only_one_step_ahead() -> None:
    """The label of a full row's last position is a token that the row does not hold."""
    full = [row for row, lengths in enumerate(LENGTHS) if sum(lengths) == 21]
    assert len(full) == 3 and (MICRO.labels_BT[full, -1] >= 0).all()
    assert (labels_ahead(MICRO, 2)[full, -1] == -100).all()
    assert torch.equal(labels_ahead(MICRO, 2)[full, -2], MICRO.labels_BT[full, -1])


def test_terms_are_gone_before_the_next_one_and_their_gradients_add_up() -> None:
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(5, 4, generator=g, requires_grad=True)
    weights = [nn.Parameter(torch.randn(4, 4, generator=g)) for _ in range(3)]
    frozen = nn.Parameter(torch.ones(4), requires_grad=False)
    alive: list[weakref.ref[Tensor]] = []

    def term(x: Tensor, i: int) -> Tensor:
        assert all(ref() is None for ref in alive)
        inside = (x @ weights[i] * frozen).exp()
        alive.append(weakref.ref(inside))
        # The first matrix serves all terms, as a shared head does.
        return (inside @ weights[0]).square().sum() * (i + 1)

    terms = [lambda x, i=i: term(x, i) for i in range(3)]
    total = one_at_a_time(terms, shared * 2, [*weights, frozen])
    assert all(p.grad is None for p in weights)
    (total * -1.5).backward()
    found = [shared.grad, *(p.grad for p in weights)]
    alive.clear()
    again = [shared.detach().clone().requires_grad_(), *weights]
    expected = torch.stack([terms[i](again[0] * 2) for i in range(3) if not alive.clear()]).sum()
    torch.testing.assert_close(total, expected)
    for mine, theirs in zip(found, torch.autograd.grad(expected * -1.5, again), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    assert frozen.grad is None


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize(("smoothing", "bonus"), [(0.1, 0.0), (0.0, 0.01), (0.1, 0.3)])
def test_settings_are_minimised_and_never_reported(smoothing: float, bonus: float, routed: bool) -> None:
    scale = torch.tensor(1 / MICRO.labelled)
    labels, weights = MICRO.labels_BT.flatten(), torch.ones(MICRO.labels_BT.numel())
    route = None
    if routed:
        index = torch.arange(0, 15, 3).repeat(len(LENGTHS), 1)
        kept = torch.rand(index.shape, generator=torch.Generator().manual_seed(1)) + 0.5
        index[:, -1], kept[:, -1] = index[:, -2], 0.0
        route = TokenRoute(index, kept)
        weights = torch.zeros(MICRO.labels_BT.shape).scatter_add_(1, index, kept).flatten()
    one = stream()
    loss = NextToken(smoothing, bonus).loss(one, MICRO, route, scale)
    loss.total.backward()
    hidden, head = (x.detach().double().requires_grad_() for x in (one.hidden_RD, one.head_VD))
    logits = hidden @ head.T
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    smooth = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100, label_smoothing=smoothing)
    share = weights * (labels >= 0) / MICRO.labelled
    (share * (smooth - bonus * entropy)).sum().backward()
    assert hidden.grad is not None and head.grad is not None
    torch.testing.assert_close(one.hidden_RD.grad, hidden.grad.float(), atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(one.head_VD.grad, head.grad.float(), atol=1e-7, rtol=1e-4)

    plain = NextToken().loss(stream(), MICRO, route, scale)
    assert plain.auxiliary is None and loss.auxiliary is not None
    assert torch.equal(loss.reported, plain.reported)
    torch.testing.assert_close(loss.nll_K, plain.nll_K, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(loss.reported + loss.auxiliary, loss.total.detach())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing = 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing = -0.1"),
        ({"entropy_bonus": -0.1}, "entropy_bonus = -0.1"),
        ({"entropy_bonus": float("nan")}, "entropy_bonus = nan"),
    ],
)
def test_mistakes_name_the_value(values: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named + "; accepted: "):
        NextToken(**values)
