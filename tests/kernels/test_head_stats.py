"""Statistics of the next-token distribution against float64 brute force, one row at a time."""

import math

import pytest
import torch

from cggr_ray.kernels.head_stats.op import head_stats
from cggr_ray.kernels.head_stats.reference import chunk_stats
from cggr_ray.kernels.selected_ce import op

NAMES = ("nll", "entropy", "confidence", "margin", "gnorm", "lse", "correct")
UNLABELLED = (math.nan,) * 6 + (0.0,)


def brute_force(logits, label):
    """The statistics of one row, in Python floats, with exact sums."""
    top = max(logits)
    exps = [math.exp(z - top) for z in logits]
    total = math.fsum(exps)
    p = [e / total for e in exps]
    ordered = sorted(p, reverse=True)
    others = [q for v, q in enumerate(p) if v != label]
    rest = math.fsum(e for v, e in enumerate(exps) if v != label)
    return (
        math.log1p(rest / exps[label]) if exps[label] > 0 else top + math.log(total) - logits[label],
        -math.fsum(q * ((z - top) - math.log(total)) for q, z in zip(p, logits, strict=True) if q),
        ordered[0],
        ordered[0] - (ordered[1] if len(ordered) > 1 else 0.0),
        math.sqrt(math.fsum(others) ** 2 + math.fsum(q * q for q in others)),
        top + math.log(total),
        float(logits.index(top) == label),
    )


def expected_stats(logits_NV, labels_N):
    rows = [
        brute_force(row, label) if label >= 0 else UNLABELLED
        for row, label in zip(logits_NV.double().tolist(), labels_N.tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def as_columns(stats):
    """One column a statistic, in float64, after a look at names, dtypes and shapes."""
    assert stats._fields == NAMES and len({s.shape for s in stats}) == 1
    assert {s.dtype for s in stats[:6]} <= {torch.float32, torch.float64} and stats.correct.dtype == torch.bool
    return torch.stack([s.double() for s in stats], dim=1)


def found_stats(hidden, head, labels, softcap=None):
    stats = head_stats(hidden, head, labels, softcap)
    assert stats.nll.dtype == torch.float32
    return as_columns(stats)


def of_logits(logits, labels):
    """With the identity as head, the logits are exactly these."""
    return found_stats(logits, torch.eye(logits.shape[1]), labels)


def assert_near(found, expected, tolerance):
    for i, name in enumerate(NAMES[: found.shape[1]]):
        torch.testing.assert_close(
            found[:, i],
            expected[:, i],
            atol=tolerance,
            rtol=tolerance,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("rows_a_chunk", [None, 1, 4])
@pytest.mark.parametrize("shape", [(1, 1, 2), (6, 3, 7), (13, 8, 31), (33, 16, 101), (9, 4, 1000)])
def test_all_statistics(shape, rows_a_chunk, monkeypatch):
    rows, width, vocabulary = shape
    if rows_a_chunk:
        monkeypatch.setitem(op.CHUNK_BYTES, "cpu", rows_a_chunk * vocabulary * 4)
    g = torch.Generator().manual_seed(sum(shape))
    hidden, head = torch.randn(rows, width, generator=g), torch.randn(vocabulary, width, generator=g)
    labels = torch.randint(vocabulary, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < 0.3] = -100
    labels[0] = 0
    found = found_stats(hidden.requires_grad_(), head, labels)
    assert torch.equal(found[:, :6].isnan(), (labels < 0).unsqueeze(1).expand(rows, 6))
    assert_near(found, expected_stats(hidden.detach().double() @ head.double().T, labels), 1e-5)


@pytest.mark.parametrize("ties", [2, 3, 7])
def test_a_tie_for_the_largest_has_margin_zero(ties):
    logits = torch.linspace(-3, 1, 9).repeat(3, 1)
    logits[0, :ties], logits[1, -ties:], logits[2, 1 : 1 + ties] = 2.5, 2.5, 2.5
    labels = torch.tensor([0, 0, 8])
    found = of_logits(logits, labels)
    assert (found[:, 3] == 0).all()
    assert_near(found, expected_stats(logits, labels), 1e-6)


@pytest.mark.parametrize("vocabulary", [2, 5, 1000])
def test_uniform_logits(vocabulary):
    found = of_logits(torch.full((1, vocabulary), 3.0), torch.tensor([1]))[0]
    n = vocabulary
    by_hand = [math.log(n), math.log(n), 1 / n, 0.0, math.sqrt(1 - 1 / n), 3 + math.log(n), 0.0]
    by_hand = torch.tensor(by_hand, dtype=torch.float64)
    torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=1e-6)


def test_a_vocabulary_of_one_is_certain():
    found = of_logits(torch.tensor([[4.0]]), torch.tensor([0]))[0]
    assert found.tolist() == [0, 0, 1, 1, 0, 4, 1]


def test_one_hot_logits():
    logits = torch.zeros(3, 6)
    logits[:, 2] = 1e4
    labels = torch.tensor([2, 4, -100])
    found = of_logits(logits, labels)
    assert found[0].tolist() == [0, 0, 1, 1, 0, 1e4, 1]
    assert found[1, :4].tolist() == [1e4, 0, 1, 1]
    assert found[1, 4].item() == pytest.approx(math.sqrt(2), rel=1e-6)
    assert found[2, :6].isnan().all() and found[2, 6] == 0


@pytest.mark.parametrize("offset", [-1e4, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_a_common_offset_of_the_logits_costs_no_accuracy(offset, spread):
    g = torch.Generator().manual_seed(1)
    # As float32 holds them, so that the truth starts from the same numbers.
    logits = torch.randn(5, 200, generator=g) * spread + offset
    labels = torch.randint(200, (5,), generator=g)
    assert_near(of_logits(logits, labels), expected_stats(logits, labels), 1e-5)


@pytest.mark.parametrize("lead", [2.0, 8.0, 12.0, 16.0, 20.0, 40.0, 90.0, 1e4])
@pytest.mark.parametrize("vocabulary", [2, 50, 3000])
def test_gnorm_of_a_certain_label_neither_cancels_nor_fails(lead, vocabulary):
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(8, vocabulary, generator=g)
    labels = torch.randint(vocabulary, (8,), generator=g)
    logits[torch.arange(8), labels] = lead
    found, expected = of_logits(logits, labels), expected_stats(logits, labels)
    assert (found[:, 4] >= 0).all()
    # Where 1 - 2 p_y + sum p^2 would have lost every digit, the relative error stays that of float32.
    torch.testing.assert_close(found[:, 4], expected[:, 4], rtol=2e-5, atol=1e-20)
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=2e-5, atol=1e-20)


def test_gnorm_is_the_length_of_the_loss_gradient():
    g = torch.Generator().manual_seed(3)
    logits = (torch.randn(20, 17, generator=g) * 3).double().requires_grad_()
    labels = torch.randint(17, (20,), generator=g)
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    found = of_logits(logits.detach().float(), labels)
    torch.testing.assert_close(found[:, 4], logits.grad.norm(dim=1), rtol=1e-5, atol=1e-6)


def test_bf16_hidden_states_are_read_in_float32():
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(30, 40, generator=g).bfloat16()
    head = torch.eye(40).bfloat16()
    labels = torch.randint(40, (30,), generator=g)
    found = found_stats(hidden, head, labels)
    # The logits are exact in bf16 here; what follows has to be float32.
    assert_near(found, expected_stats(hidden, labels), 1e-5)


def test_hidden_states_that_are_not_contiguous():
    g = torch.Generator().manual_seed(5)
    hidden, head = torch.randn(6, 11, generator=g).T, torch.randn(6, 23, generator=g).T
    labels = torch.randint(23, (11,), generator=g)
    assert_near(found_stats(hidden, head, labels), expected_stats(hidden.double() @ head.double().T, labels), 1e-5)


@pytest.mark.parametrize("label", [-100, -1])
def test_nothing_labelled_is_all_nan(label):
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(6))
    found = of_logits(logits, torch.full((4,), label))
    assert found[:, :6].isnan().all() and not found[:, 6].any()


def test_of_tied_labels_the_first_alone_is_correct():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0]]).expand(5, 5)
    assert of_logits(logits, torch.arange(5))[:, 6].tolist() == [0, 1, 0, 0, 0]


def test_a_token_that_cannot_come_changes_nothing():
    logits = torch.tensor([[1.0, -0.5, 2.0, 0.3]])
    barred = torch.full((1, 4), -torch.inf)
    label = torch.tensor([2])
    assert_near(of_logits(logits, label), as_columns(chunk_stats(torch.cat([logits, barred], 1), label)), 1e-7)


@pytest.mark.parametrize("softcap", [3.0, 30.0])
def test_a_soft_cap(softcap):
    g = torch.Generator().manual_seed(7)
    hidden, head = torch.randn(9, 6, generator=g), torch.randn(40, 6, generator=g) * 4
    labels = torch.randint(40, (9,), generator=g)
    logits = softcap * torch.tanh(hidden.double() @ head.double().T / softcap)
    assert_near(found_stats(hidden, head, labels, softcap), expected_stats(logits, labels), 1e-5)


def test_no_rows():
    assert found_stats(torch.zeros(0, 3), torch.zeros(5, 3), torch.zeros(0, dtype=torch.long)).shape == (0, 7)


BAD = {
    "width": (torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(2).long(), None),
    "labels": (torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(3).long(), None),
    "rank": (torch.zeros(2, 1, 3), torch.zeros(5, 3), torch.zeros(2).long(), None),
    "dtype": (torch.zeros(2, 3), torch.zeros(5, 3).bfloat16(), torch.zeros(2).long(), None),
    "softcap": (torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2).long(), 0.0),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(case):
    with pytest.raises(ValueError, match="accepted"):
        head_stats(*BAD[case])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_named(dtype):
    hidden, head = torch.zeros(2, 3).to(dtype), torch.zeros(5, 3).to(dtype)
    with pytest.raises(ValueError, match=f"{dtype} on 'cpu'; accepted: "):
        head_stats(hidden, head, torch.zeros(2).long())


def test_float64_is_for_the_cpu_alone():
    g = torch.Generator().manual_seed(8)
    hidden, head = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (7, 40))
    labels = torch.randint(40, (7,), generator=g)
    stats = head_stats(hidden, head, labels)
    assert {x.dtype for x in stats[:6]} == {torch.float64}
    assert_near(as_columns(stats), expected_stats(hidden @ head.T, labels), 1e-12)
    with pytest.raises(ValueError, match=r"torch\.float64 on 'meta'; accepted: "):
        head_stats(hidden.to("meta"), head.to("meta"), labels.to("meta"))
