"""selected_cross_entropy and position_nll against float64 autograd through torch's own cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cggr_ray.kernels.selected_ce import op
from cggr_ray.kernels.selected_ce.op import chunks, position_nll, selected_cross_entropy

SHAPES = [(1, 1, 2), (5, 3, 7), (4, 6, 1), (17, 8, 31), (33, 16, 101), (61, 5, 257)]
# Rows a chunk; None keeps all rows in one.
ROWS_A_CHUNK = [None, 1, 2, 7]


def set_chunk(monkeypatch, rows, vocabulary, element_bytes=4):
    if rows is not None:
        monkeypatch.setitem(op.CHUNK_BYTES, "cpu", rows * vocabulary * element_bytes)


def problem(rows, width, vocabulary, seed=0, unlabelled=0.3):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g)
    head = torch.randn(vocabulary, width, generator=g)
    labels = torch.randint(vocabulary, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < unlabelled] = -100
    labels[-1] = vocabulary - 1
    weights = torch.rand(rows, generator=g) * 3
    weights[0] = 0 if rows > 2 else 1
    return hidden, head, labels, weights


def truth(hidden, head, labels, weights):
    hidden, head = (x.detach().double().requires_grad_() for x in (hidden, head))
    nll = F.cross_entropy(hidden @ head.T, labels, reduction="none", ignore_index=-100)
    total = (nll * weights.double()).sum()
    total.backward()
    return total.detach(), nll.detach(), hidden.grad, head.grad


def ours(hidden, head, labels, weights, factor=1.0):
    hidden, head = (x.detach().requires_grad_() for x in (hidden, head))
    total, nll = selected_cross_entropy(hidden, head, labels, weights)
    assert not nll.requires_grad and total.dtype == nll.dtype == torch.float32
    (total * factor).backward()
    return total.detach(), nll, hidden.grad, head.grad


def assert_near(found, expected, tolerance):
    for name, a, b in zip(("total", "nll", "hidden gradient", "head gradient"), found, expected, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double(), b, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rows_a_chunk", ROWS_A_CHUNK)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients(shape, rows_a_chunk, monkeypatch):
    set_chunk(monkeypatch, rows_a_chunk, shape[2])
    inputs = problem(*shape, seed=sum(shape))
    found = ours(*inputs)
    assert_near(found, truth(*inputs), 2e-6)
    hidden, _, labels, _ = inputs
    assert (found[1][labels < 0] == 0).all() and (found[2][labels < 0] == 0).all()
    assert found[2].shape == hidden.shape and found[2].dtype == found[3].dtype == torch.float32


@pytest.mark.parametrize("rows_a_chunk", [None, 3])
def test_gradients_scale_with_what_comes_from_above(rows_a_chunk, monkeypatch):
    set_chunk(monkeypatch, rows_a_chunk, 31)
    hidden, head, labels, weights = problem(17, 8, 31)
    expected = truth(hidden, head, labels, weights * -2.5)
    found = ours(hidden, head, labels, weights, factor=-2.5)
    assert_near((found[0] * -2.5, *found[1:]), expected, 2e-6)


@pytest.mark.parametrize("rows_a_chunk", [None, 3])
def test_a_head_that_does_not_learn_has_no_gradient_formed(rows_a_chunk, monkeypatch):
    set_chunk(monkeypatch, rows_a_chunk, 1009)
    hidden, head, labels, weights = problem(11, 8, 1009)
    shapes = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.extend(tuple(x.shape) for x in (out,) if isinstance(x, torch.Tensor))
            return out

    given = hidden.clone().requires_grad_()
    with Seen():
        selected_cross_entropy(given, head, labels, weights)[0].backward()
    assert (1009, 8) not in shapes and head.grad is None
    torch.testing.assert_close(given.grad, ours(hidden, head, labels, weights)[2])


def transposed(x):
    return x.T.contiguous().T


def every_second_row(x):
    return torch.stack([x, x + 1], dim=1).flatten(0, 1)[::2]


def every_second_column(x):
    return torch.stack([x, x + 1], dim=2).flatten(1, 2)[:, ::2]


@pytest.mark.parametrize("layout", [transposed, every_second_row, every_second_column])
@pytest.mark.parametrize("rows_a_chunk", [None, 4])
def test_input_that_is_not_contiguous(layout, rows_a_chunk, monkeypatch):
    set_chunk(monkeypatch, rows_a_chunk, 37)
    hidden, head, labels, weights = problem(19, 6, 37)
    assert not layout(hidden).is_contiguous() and torch.equal(layout(hidden), hidden)
    expected = truth(hidden, head, labels, weights)
    assert_near(ours(layout(hidden), layout(head), labels, weights), expected, 2e-6)
    torch.testing.assert_close(position_nll(layout(hidden), head, labels).double(), expected[1], atol=1e-5, rtol=0)


def test_one_row_expanded_to_many():
    hidden, head, labels, weights = problem(9, 4, 11)
    expected = truth(hidden[:1].repeat(9, 1), head, labels, weights)
    assert_near(ours(hidden[:1].expand(9, 4), head, labels, weights), expected, 2e-6)


@pytest.mark.parametrize("rows_a_chunk", [None, 2])
def test_nothing_labelled_is_nothing_learned(rows_a_chunk, monkeypatch):
    set_chunk(monkeypatch, rows_a_chunk, 13)
    hidden, head, _, weights = problem(5, 4, 13)
    for value in ours(hidden, head, torch.full((5,), -100), weights):
        assert (value == 0).all()


@pytest.mark.parametrize("size", [50.0, 1e4])
def test_extreme_logits_stay_finite_and_exact(size):
    hidden, head, labels, weights = problem(23, 8, 29, seed=5)
    hidden = hidden * (size / (hidden @ head.T).abs().max())
    found, expected = ours(hidden, head, labels, weights), truth(hidden, head, labels, weights)
    assert all(x.isfinite().all() for x in found)
    # Logits are rounded to float32 before anything is done with them.
    assert_near(found, expected, 1e-6 * max(1, size / 10))


@pytest.mark.parametrize("rows_a_chunk", [None, 1, 10])
@pytest.mark.parametrize("shape", [(17, 8, 31), (61, 24, 257), (200, 32, 97)])
def test_bf16_is_no_worse_than_eager(shape, rows_a_chunk, monkeypatch):
    set_chunk(monkeypatch, rows_a_chunk, shape[2], element_bytes=2)
    hidden, head, labels, weights = problem(*shape, seed=7)
    hidden, head = hidden.bfloat16(), (head / shape[1] ** 0.5).bfloat16()
    expected = truth(hidden, head, labels, weights)
    found = ours(hidden, head, labels, weights)
    eager_hidden, eager_head = (x.clone().requires_grad_() for x in (hidden, head))
    nll = F.cross_entropy((eager_hidden @ eager_head.T).float(), labels, reduction="none")
    (nll * weights).sum().backward()
    eager = ((nll * weights).sum().detach(), nll.detach(), eager_hidden.grad, eager_head.grad)
    assert found[2].dtype == found[3].dtype == torch.bfloat16
    for mine, theirs, exact in zip(found, eager, expected, strict=True):
        error, accepted = ((x.double() - exact).norm() / exact.norm() for x in (mine, theirs))
        assert error <= 1.05 * accepted + 1e-4


def test_under_autocast_chunks_add_up_in_float32(monkeypatch):
    set_chunk(monkeypatch, 1, 31, element_bytes=2)
    hidden, head, labels, weights = problem(2000, 8, 31, seed=3)
    # Parts of one sign: each is small beside the sum of those before it.
    hidden, head = hidden.abs().bfloat16(), head.bfloat16()
    exact = truth(hidden, head, labels, weights)[3]
    head = head.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = selected_cross_entropy(hidden, head, labels, weights)
    total.backward()
    assert (head.grad.double() - exact).norm() <= 4e-3 * exact.norm()


@pytest.mark.parametrize("rows_a_chunk", ROWS_A_CHUNK)
@pytest.mark.parametrize("shape", SHAPES)
def test_position_nll(shape, rows_a_chunk, monkeypatch):
    set_chunk(monkeypatch, rows_a_chunk, shape[2])
    hidden, head, labels, weights = problem(*shape, seed=11)
    found = position_nll(hidden.requires_grad_(), head, labels)
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.double(), truth(hidden, head, labels, weights)[1], atol=1e-5, rtol=0)
    assert (found[labels < 0] == 0).all()


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 1000, 1023])
@pytest.mark.parametrize("most", [1, 3, 64, 999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_cover_all_rows_in_at_most_two_sizes(rows, most, dtype, monkeypatch):
    hidden, head = torch.empty(rows, 1, dtype=dtype), torch.empty(11, 1, dtype=dtype)
    set_chunk(monkeypatch, most, 11, hidden.element_size())
    parts = [list(range(rows))[part] for part in chunks(hidden, head)]
    assert [i for part in parts for i in part] == list(range(rows))
    assert max(map(len, parts)) <= most and len({len(part) for part in parts}) <= 2
    assert len(parts) <= -(-rows // most) or most == 1


def test_a_vocabulary_larger_than_a_chunk_still_works(monkeypatch):
    monkeypatch.setitem(op.CHUNK_BYTES, "cpu", 1)
    inputs = problem(3, 2, 50)
    assert_near(ours(*inputs), truth(*inputs), 2e-6)


# Several targets, smoothing, entropy bonus


def targets(rows, vocabulary, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, (rows, count), generator=g)
    labels[torch.rand(rows, count, generator=g) < 0.3] = -100
    labels[0], labels[-1] = -100, vocabulary - 1
    return labels, torch.rand(rows, count, generator=g) * 2


def written_out(hidden, head, labels, weights, smoothing, bonus):
    """Row by row and target by target, in float64."""
    hidden, head = (x.detach().double().requires_grad_() for x in (hidden, head))
    nll, total = torch.zeros(labels.shape, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(hidden @ head.T):
        for j, label in enumerate(labels[i].tolist()):
            if label >= 0:
                loss = F.cross_entropy(row, torch.tensor(label))
                nll[i, j] = loss.detach()
                if j == 0:
                    spread = torch.stack([F.cross_entropy(row, torch.tensor(v)) for v in range(len(row))]).mean()
                    entropy = torch.distributions.Categorical(logits=row).entropy()
                    loss = (1 - smoothing) * loss + smoothing * spread - bonus * entropy
                total = total + weights[i, j].double() * loss
    total.backward()
    return total.detach(), nll, hidden.grad, head.grad


def settled(hidden, head, labels, weights, smoothing=0.0, bonus=0.0, factor=1.0):
    hidden, head = (x.detach().requires_grad_() for x in (hidden, head))
    total, nll = selected_cross_entropy(hidden, head, labels, weights, smoothing, bonus)
    assert nll.shape == labels.shape and not nll.requires_grad
    (total * factor).backward()
    return total.detach(), nll, hidden.grad, head.grad


@pytest.mark.parametrize("rows_a_chunk", [None, 1, 7])
@pytest.mark.parametrize(("smoothing", "bonus"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.3, 0.7)])
@pytest.mark.parametrize("count", [1, 3])
def test_several_targets_and_settings(count, smoothing, bonus, rows_a_chunk, monkeypatch):
    set_chunk(monkeypatch, rows_a_chunk, 31)
    hidden, head, _, _ = problem(17, 8, 31)
    labels, weights = targets(17, 31, count)
    expected = written_out(hidden, head, labels, weights, smoothing, bonus)
    assert_near(settled(hidden, head, labels, weights, smoothing, bonus), expected, 3e-6)
    if count == 1:
        total, nll, *gradients = settled(hidden, head, labels[:, 0], weights[:, 0], smoothing, bonus)
        assert_near((total, nll.unsqueeze(1), *gradients), expected, 3e-6)
    found = settled(hidden, head, labels, weights, smoothing, bonus, factor=-2.5)
    assert_near((found[0], found[1], *(g / -2.5 for g in found[2:])), expected, 3e-6)


def test_a_row_without_a_first_target_has_no_settings():
    hidden, head, _, _ = problem(5, 4, 13)
    labels, weights = torch.full((5, 1), -100), torch.ones(5, 1)
    for value in settled(hidden, head, labels, weights, 0.3, 0.7):
        assert (value == 0).all()


@pytest.mark.parametrize("rows_a_chunk", [None, 4])
def test_targets_without_a_weight_change_no_bit_of_the_gradient(rows_a_chunk, monkeypatch):
    set_chunk(monkeypatch, rows_a_chunk, 37)
    hidden, head, labels, weights = problem(19, 6, 37)
    more, _ = targets(19, 37, 2)
    both = torch.cat([labels.unsqueeze(1), more], dim=1), torch.nn.functional.pad(weights.unsqueeze(1), (0, 2))
    one, several = ours(hidden, head, labels, weights), settled(hidden, head, *both)
    assert torch.equal(several[1][:, 0], one[1])
    assert torch.equal(several[2], one[2]) and torch.equal(several[3], one[3])


def test_one_plain_target_never_sees_the_settings(monkeypatch):
    one, nll, _ = op._on(torch.device("cpu"))
    monkeypatch.setattr(op, "_on", lambda device: (one, nll, None))
    inputs = problem(17, 8, 31)
    assert one is op.chunk_loss
    assert_near(ours(*inputs), truth(*inputs), 2e-6)
