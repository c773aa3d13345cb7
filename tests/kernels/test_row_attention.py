"""Attention of kept queries against a dense softmax in float64 with autograd: the Triton kernels and plain PyTorch."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cggr_ray.kernels.row_attention import op, reference, tiling
from cggr_ray.kernels.row_attention.op import (
    given_row_attention,
    given_row_attention_const,
    kept_spans,
    row_attention,
    row_attention_backward,
    row_attention_backward_const,
    row_attention_forward,
    span_attention_reference,
    spans_of,
)


@dataclass(frozen=True)
class Problem:
    """Kept queries of some rows; `documents` are lengths that add up to a row's."""

    kept: int = 11
    empty: int = 0
    documents: tuple[int, ...] = (37,)
    rows: int = 1
    window: int | None = None
    heads: int = 2
    groups: int = 1
    width: int = 16
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    fused: bool = False
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.width**-0.5


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    index: Tensor
    first: Tensor
    last: Tensor


def build(p: Problem, device: str = "cpu") -> Inputs:
    """Sorted kept positions, the empty slots at each row's end pointing at its last position, and their intervals."""
    rng, g = random.Random(p.seed), torch.Generator().manual_seed(p.seed)
    length = sum(p.documents)
    starts = [sum(p.documents[:i]) for i in range(len(p.documents))]
    index, first, last = [], [], []
    for row in range(p.rows):
        for at in sorted(rng.sample(range(length), p.kept - p.empty)):
            document = max(start for start in starts if start <= at)
            index.append(row * length + at)
            first.append(row * length + (document if p.window is None else max(document, at - p.window + 1)))
            last.append(row * length + at)
        for _ in range(p.empty):
            index.append(row * length + length - 1)
            first.append(row * length + length)
            last.append(row * length + length - 1)

    def pair(n: int, heads: int) -> list[Tensor]:
        """Two of n rows, contiguous, or `fused`: one as the first columns of a wider matrix, one head by head."""
        whole = torch.randn(n, 2 * heads * p.width, generator=g).to(p.dtype).to(device)
        one, other = (x.unflatten(1, (-1, p.width)).clone() for x in whole.chunk(2, dim=1))
        if not p.fused:
            return [one, other]
        return [F.pad(one, (0, 0, 0, 1))[:, :-1], other.transpose(0, 1).contiguous().transpose(0, 1)]

    q, dout = pair(len(index), p.heads)
    k, v = pair(p.rows * length, p.groups)
    whole = [torch.tensor(x, dtype=torch.int32, device=device) for x in (index, first, last)]
    return Inputs(q, k, v, dout, *whole)


class Results(NamedTuple):
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def truth(p: Problem, x: Inputs, const: bool = False) -> Results:
    """Query by query, in float64. Of `const` the key and value gradients are those of the queries' own positions."""
    q, k, v = (y.detach().cpu().double().requires_grad_() for y in (x.q, x.k, x.v))
    filled = [(i, a, b) for i, (a, b) in enumerate(zip(x.first.tolist(), x.last.tolist(), strict=True)) if a <= b]
    index = x.index.cpu().long()
    used_k, used_v = k, v
    if const:
        learns = torch.zeros(len(k), 1, 1, dtype=torch.bool)
        learns[index[[i for i, _, _ in filled]]] = True
        used_k, used_v = (torch.where(learns, y, y.detach()) for y in (k, v))
    # What an empty query gives: zero, and so are its gradients.
    outs = [0 * (q.sum() + k.sum() + v.sum()) * q[0].detach()] * len(q)
    lses = [q.new_full((p.heads,), float("inf"))] * len(q)
    for i, a, b in filled:
        keys, values = (y[a : b + 1].repeat_interleave(p.heads // p.groups, dim=1) for y in (used_k, used_v))
        z = torch.einsum("he,nhe->hn", q[i], keys) * p.scale
        if p.softcap is not None:
            z = p.softcap * torch.tanh(z / p.softcap)
        outs[i] = torch.einsum("hn,nhe->he", z.softmax(-1), values)
        lses[i] = z.logsumexp(-1)
    out = torch.stack(outs)
    out.backward(x.dout.cpu().double())
    assert q.grad is not None and k.grad is not None and v.grad is not None
    gradients = (k.grad, v.grad)
    if const:
        empty = (x.first > x.last).cpu()[:, None, None]
        gradients = tuple(y[index].masked_fill(empty, 0.0) for y in gradients)
    return Results(out.detach(), torch.stack(lses, dim=1).detach(), q.grad, *gradients)


def found(p: Problem, x: Inputs, use: ModuleType, const: bool = False, cut: tuple[int, int] | None = None) -> Results:
    """What a module computes, its three functions called directly; `cut` is the size of a tile of the kernels."""
    how: dict[str, object] = {}
    if cut is not None:
        how["launch"] = tiling.Launch(*cut, 4, 2)
    spans = spans_of(x.first, x.last, len(x.k))
    out, lse = use.forward(x.q, x.k, x.v, spans, p.scale, p.softcap, **how)
    # An empty query brings whatever a forward over all positions left for the position that it points at.
    empty = x.first > x.last
    given = out.masked_fill(empty[:, None, None], 3.0), lse.masked_fill(empty, -7.0)
    if p.fused:
        given = given[0], given[1].T.contiguous().T
    rows = use.prepare(x.dout, *given, spans)
    dq = use.query_gradient(x.dout, x.q, x.k, x.v, rows, spans, p.scale, p.softcap, **how)
    k, v = x.k, x.v
    if const:
        k, v, spans = k[x.index.long()], v[x.index.long()], kept_spans(x.index, spans)
    dk, dv = use.key_value_gradients(x.dout, x.q, k, v, rows, spans, p.scale, p.softcap, **how)
    return Results(out, lse, dq, dk, dv)


def assert_near(results: Results, expected: Results, tolerance: float) -> None:
    for name, a, b in zip(Results._fields, results, expected, strict=True):
        size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 1.0
        torch.testing.assert_close(
            a.cpu().double(), b, atol=tolerance * max(size, 1.0), rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The Triton module, every output of which starts as NaN."""
    from cggr_ray.kernels.row_attention import kernel

    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: make(*a, **k).fill_(float("nan")))
    return kernel


# Problem, (queries, keys) of a tile.
CASES = {
    "causal": (Problem(kept=19, documents=(53,)), (16, 16)),
    "one kept": (Problem(kept=1, documents=(41,), heads=3, groups=3), (16, 32)),
    "one position": (Problem(kept=1, documents=(1,)), (16, 16)),
    "all kept": (Problem(kept=37, documents=(37,), heads=1), (16, 16)),
    "rows and documents": (Problem(kept=17, documents=(3, 20, 11), rows=2, heads=3), (16, 16)),
    "empty slots": (Problem(kept=13, empty=5, documents=(21, 10), rows=3, heads=1), (16, 32)),
    "nothing but empty slots": (Problem(kept=3, empty=3, documents=(21,), rows=2), (16, 16)),
    "window": (Problem(kept=40, documents=(64,), window=20, heads=1), (32, 16)),
    "window of itself": (Problem(kept=20, empty=2, documents=(30,), window=1, heads=1), (16, 16)),
    "softcap": (Problem(kept=19, documents=(35,), softcap=0.7), (16, 16)),
    "width 24, 4 heads a group": (Problem(kept=9, documents=(33,), heads=8, groups=2, width=24), (16, 32)),
    "width 64": (Problem(kept=18, documents=(35,), width=64), (32, 16)),
    "width 80, views": (Problem(kept=18, documents=(9, 31), width=80, fused=True, window=25), (16, 16)),
    "2 heads a group, tiles in twos, views": (Problem(kept=52, documents=(52,), fused=True), (16, 16)),
    "3 heads a group, views": (Problem(kept=12, documents=(33,), heads=6, groups=2, width=16, fused=True), (16, 32)),
}


@pytest.mark.parametrize("const", [False, True], ids=["live", "const"])
@pytest.mark.parametrize("case", CASES)
def test_plain_pytorch_is_the_dense_softmax(case: str, const: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = CASES[case]
    x = build(problem)
    expected = truth(problem, x, const)
    assert_near(found(problem, x, reference, const), expected, 2e-6)
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 5 * len(x.k) * problem.heads)
    assert_near(found(problem, x, reference, const), expected, 2e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_definition_is_the_dense_softmax(case: str) -> None:
    problem, _ = CASES[case]
    x = build(problem)
    q, k, v = (y.double().requires_grad_() for y in x[:3])
    out, lse = span_attention_reference(q, k, v, spans_of(x.first, x.last, len(k)), problem.scale, problem.softcap)
    out.backward(x.dout.double())
    assert_near(Results(out, lse, q.grad, k.grad, v.grad), truth(problem, x), 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_kernels(case: str, kernel: ModuleType, kernel_device: str) -> None:
    problem, cut = CASES[case]
    x = build(problem, kernel_device)
    assert x.q.is_contiguous() != problem.fused
    assert_near(found(problem, x, kernel, cut=cut), truth(problem, x), 1e-5)


@pytest.mark.parametrize("case", ["rows and documents", "empty slots", "width 80, views"])
def test_kernels_with_constants(case: str, kernel: ModuleType, kernel_device: str) -> None:
    problem, cut = CASES[case]
    x = build(problem, kernel_device)
    assert_near(found(problem, x, kernel, const=True, cut=cut), truth(problem, x, const=True), 1e-5)


def eager(p: Problem, x: Inputs) -> Results:
    """What plain PyTorch makes of the same in the dtype of the inputs."""
    q, k, v = (y.detach().clone().requires_grad_() for y in x[:3])
    keys, values = (y.repeat_interleave(p.heads // p.groups, dim=1).transpose(0, 1) for y in (k, v))
    z = q.transpose(0, 1) @ keys.mT * p.scale
    at = torch.arange(len(k), device=k.device)
    z = z.masked_fill((at < x.first[:, None]) | (at > x.last[:, None]), float("-inf")).float()
    out = (z.softmax(-1).to(p.dtype) @ values).transpose(0, 1)
    out.backward(x.dout)
    return Results(out.detach(), z.detach().logsumexp(-1), q.grad, k.grad, v.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "kernels"])
def test_half_precision_is_no_worse_than_eager(
    dtype: torch.dtype, plain: bool, kernel: ModuleType, kernel_device: str
) -> None:
    if not plain and kernel_device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 as the integers that it keeps them in")
    problem = Problem(kept=32, documents=(9, 31), heads=2, width=32, dtype=dtype, seed=3)
    x = build(problem, "cpu" if plain else kernel_device)
    expected = truth(problem, x)
    results = found(problem, x, reference) if plain else found(problem, x, kernel, cut=(16, 16))
    assert results.lse.dtype == torch.float32 and {y.dtype for y in (results.out, *results[2:])} == {dtype}
    for mine, theirs, exact in zip(results, eager(problem, x), expected, strict=True):
        error, accepted = ((y.cpu().double() - exact).norm() / exact.norm() for y in (mine, theirs))
        assert error <= 1.05 * accepted + 1e-4


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "kernels"])
def test_all_kept_is_ordinary_causal_attention(plain: bool, kernel: ModuleType, kernel_device: str) -> None:
    problem = Problem(kept=40, documents=(40,), heads=3, groups=1, width=16, seed=5)
    x = build(problem, "cpu" if plain else kernel_device)
    q, k, v = (y.cpu().double().requires_grad_() for y in x[:3])
    batched = [y.transpose(0, 1).unsqueeze(0) for y in (q, k.expand(-1, 3, -1), v.expand(-1, 3, -1))]
    out = F.scaled_dot_product_attention(*batched, is_causal=True)[0].transpose(0, 1)
    out.backward(x.dout.cpu().double())
    assert q.grad is not None and k.grad is not None and v.grad is not None
    results = found(problem, x, reference) if plain else found(problem, x, kernel, cut=(16, 16))
    expected = Results(out.detach(), truth(problem, x).lse, q.grad, k.grad, v.grad)
    assert_near(results, expected, 1e-5)


@pytest.mark.parametrize("factor", [1e-3, 60.0])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "kernels"])
def test_flat_and_sharp_softmax(factor: float, plain: bool, kernel: ModuleType, kernel_device: str) -> None:
    problem = Problem(kept=12, documents=(30,), heads=1, seed=7)
    x = build(problem, "cpu" if plain else kernel_device)
    x = x._replace(q=x.q * factor)
    results = found(problem, x, reference) if plain else found(problem, x, kernel, cut=(16, 16))
    # Logits of some hundred are themselves rounded at 1e-5.
    assert_near(results, truth(problem, x), 1e-5 * max(1.0, factor))


def test_what_does_not_count_may_be_anything_finite(kernel: ModuleType, kernel_device: str) -> None:
    problem = Problem(kept=9, empty=4, documents=(19,), rows=2, heads=1)
    for use, device, cut in ((reference, "cpu", None), (kernel, kernel_device, (16, 16))):
        x = build(problem, device)
        empty = x.first > x.last
        loud = x._replace(dout=x.dout.masked_fill(empty[:, None, None], 1e30))
        quiet = x._replace(dout=x.dout.masked_fill(empty[:, None, None], 0.0))
        for a, b in zip(found(problem, loud, use, cut=cut), found(problem, quiet, use, cut=cut), strict=True):
            assert torch.equal(a, b) and not a.isnan().any()


def intervals(p: Problem) -> list[tuple[int, int]]:
    x = build(p)
    return list(zip(x.first.tolist(), x.last.tolist(), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_spans_name_the_queries_of_every_key(case: str) -> None:
    problem, _ = CASES[case]
    x = build(problem)
    spans = spans_of(x.first.long(), x.last.long(), len(x.k))
    assert {y.dtype for y in spans} == {torch.int32} and len(spans.begin_N) == len(spans.end_N) == len(x.k)
    for key, (begin, end) in enumerate(zip(spans.begin_N.tolist(), spans.end_N.tolist(), strict=True)):
        seeing = [i for i, (a, b) in enumerate(intervals(problem)) if a <= key <= b]
        if seeing:
            assert (begin, end) == (seeing[0], seeing[-1] + 1)
            between = [intervals(problem)[i] for i in range(begin, end) if i not in seeing]
            assert all(a > b for a, b in between)
        else:
            assert all(a > b for a, b in intervals(problem)[begin:end])


@pytest.mark.parametrize("case", CASES)
def test_compact_spans_hold_the_kept_keys_of_the_interval(case: str) -> None:
    problem, _ = CASES[case]
    x = build(problem)
    index, spans = x.index.tolist(), spans_of(x.first, x.last, len(x.k))
    compact = kept_spans(x.index.long(), spans)
    for i, (a, b) in enumerate(intervals(problem)):
        seen = range(int(compact.first_K[i]), int(compact.last_K[i]) + 1)
        positions = [index[j] for j in seen]
        assert positions == [at for j, at in enumerate(index[: i + 1]) if a <= at <= b]
        assert all(intervals(problem)[j][0] <= intervals(problem)[j][1] for j in seen)


def leaves(x: Inputs) -> list[Tensor]:
    return [y.detach().clone().requires_grad_() for y in x[:3]]


AUTOGRAD = Problem(kept=9, empty=2, documents=(8, 9), rows=2, heads=2, width=16)


def test_autograd_of_the_ordinary_kind(kernel_device: str) -> None:
    x = build(AUTOGRAD, kernel_device)
    q, k, v = leaves(x)
    spans = spans_of(x.first, x.last, len(k))
    out = row_attention(q, k, v, spans, AUTOGRAD.scale)
    out.backward(x.dout)
    lse = row_attention_forward(q, k, v, spans, AUTOGRAD.scale)[1]
    assert_near(Results(out.detach(), lse, q.grad, k.grad, v.grad), truth(AUTOGRAD, x), 1e-5)


def test_autograd_of_given_outputs(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = build(AUTOGRAD, kernel_device)
    spans = spans_of(x.first, x.last, len(x.k))
    given = row_attention_forward(x.q, x.k, x.v, spans, AUTOGRAD.scale)
    use = op.implementation(x.q.device)
    monkeypatch.setattr(use, "forward", None)
    for const in (False, True):
        q, k, v = leaves(x)
        if const:
            kept = [y[x.index.long()].detach().requires_grad_() for y in (k, v)]
            among = kept_spans(x.index, spans)
            out = given_row_attention_const(q, *kept, k, v, *given, spans, among, AUTOGRAD.scale)
            assert given_row_attention_const(q, *kept, k, v, *given, spans, among, AUTOGRAD.scale).requires_grad
        else:
            kept = [k, v]
            out = given_row_attention(q, k, v, *given, spans, AUTOGRAD.scale)
        assert out.data_ptr() == given[0].data_ptr() and out.requires_grad
        out.backward(x.dout)
        gradients = q.grad, kept[0].grad, kept[1].grad
        assert_near(Results(out.detach(), given[1], *gradients), truth(AUTOGRAD, x, const), 1e-5)
        assert not const or (k.grad is None and v.grad is None)


def test_keys_computed_again_and_rounded_otherwise_do_not_blow_up_their_gradients(kernel_device: str) -> None:
    """With large logits a small difference of keys is a large factor e^(z - lse) of their gradients."""
    problem = replace(AUTOGRAD, dtype=torch.bfloat16)
    x = build(problem, kernel_device)
    q, k = (8 * y for y in (x.q, x.k))
    spans, index = spans_of(x.first, x.last, len(k)), x.index.long()
    given = row_attention_forward(q, k, x.v, spans, problem.scale)
    again = [(y[index] * 1.01).detach().requires_grad_() for y in (k, x.v)]
    among = kept_spans(x.index, spans)
    given_row_attention_const(q, *again, k, x.v, *given, spans, among, problem.scale).backward(x.dout)
    expected = truth(problem, x._replace(q=q, k=k), const=True)
    for leaf, wanted in zip(again, expected[3:], strict=True):
        error = (leaf.grad.cpu().double() - wanted).norm() / wanted.norm()
        assert error < 0.01


def test_plain_functions_are_what_autograd_runs(kernel_device: str) -> None:
    x = build(replace(AUTOGRAD, softcap=1.5), kernel_device)
    spans = spans_of(x.first, x.last, len(x.k))
    out, lse = row_attention_forward(x.q, x.k, x.v, spans, AUTOGRAD.scale, 1.5)
    q, k, v = leaves(x)
    row_attention(q, k, v, spans, AUTOGRAD.scale, 1.5).backward(x.dout)
    live = row_attention_backward(x.dout, x.q, x.k, x.v, out, lse, spans, AUTOGRAD.scale, 1.5)
    assert all(torch.equal(a, b) for a, b in zip(live, (q.grad, k.grad, v.grad), strict=True))
    among = kept_spans(x.index, spans)
    const = row_attention_backward_const(x.dout, x.q, x.k, x.v, out, lse, spans, among, AUTOGRAD.scale, 1.5)
    expected = truth(replace(AUTOGRAD, softcap=1.5), x, const=True)
    assert_near(Results(out, lse, *const), expected, 1e-5)
    assert torch.equal(const[0], live[0])


def test_a_gradient_that_is_expanded(kernel_device: str) -> None:
    x = build(AUTOGRAD, kernel_device)
    spans = spans_of(x.first, x.last, len(x.k))
    q, k, v = leaves(x)
    row_attention(q, k, v, spans, AUTOGRAD.scale).sum().backward()
    expected = truth(AUTOGRAD, x._replace(dout=torch.ones_like(x.dout)))
    for a, b in zip((q.grad, k.grad, v.grad), expected[2:], strict=True):
        torch.testing.assert_close(a.cpu().double(), b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("softcap", [None, 0.8])
def test_gradients_of_plain_pytorch_are_slopes(softcap: float | None) -> None:
    problem = Problem(kept=5, empty=1, documents=(4, 5), heads=2, width=3, softcap=softcap)
    x = build(problem)
    spans = spans_of(x.first, x.last, len(x.k))
    inputs = [y.double().requires_grad_() for y in x[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: row_attention(q, k, v, spans, problem.scale, softcap), inputs)


def test_the_device_decides_who_computes() -> None:
    assert op.implementation(torch.device("cpu")) is reference
    with pytest.raises(ValueError, match="meta"):
        op.implementation(torch.device("meta"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_width_finds_a_launch_and_too_wide_a_head_is_refused(dtype: torch.dtype) -> None:
    for table in (tiling.FORWARD, tiling.QUERIES, tiling.KEYS):
        for width in (16, 24, 64, 80, 96, 128, 256):
            assert min(tiling.launch_for(table, torch.zeros(1, 1, width, dtype=dtype))[:2]) >= 16
        with pytest.raises(ValueError, match="257"):
            tiling.launch_for(table, torch.zeros(1, 1, 257, dtype=dtype))
