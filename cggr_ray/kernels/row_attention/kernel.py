# mypy: disable-error-code="no-untyped-def"
"""The same in Triton: one kernel forward, and three backward (per query, for queries, for keys and values).

A block of queries (or of keys) loops over the tiles of the other side that it can see. Tiles that everybody in the
block sees whole run without a mask; those at the two ends of the interval are masked element by element. Both start
where the interval starts, so a document or a window costs no more masked tiles than it has edges.
Sums are kept in float32 registers, in a fixed order: no atomics, the same bits every time.

Logits are handled in base 2: exp2(z log2 e) is one instruction. Shapes as in `reference`; R = H / G.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cggr_ray.kernels.row_attention.reference import Spans
from cggr_ray.kernels.row_attention.tiling import FORWARD, KEYS, QUERIES, Launch, launch_for

LOG2_E = math.log2(math.e)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


@triton.jit
def _load_rows(at, stride, limit, ROWS: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, CHECK: tl.constexpr):
    """(ROWS, EP) from `at` on, 0 for columns past E and, where CHECK, for rows past `limit`."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, EP)
    from_ = at + rows[:, None] * stride + cols[None, :]
    if CHECK:
        return tl.load(from_, mask=(rows < limit)[:, None] & (cols < E)[None, :], other=0.0)
    if E < EP:
        return tl.load(from_, mask=(cols < E)[None, :], other=0.0)
    return tl.load(from_)


@triton.jit
def _store_rows(at, stride, limit, tile, ROWS: tl.constexpr, E: tl.constexpr, EP: tl.constexpr):
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, EP)
    to = at + rows[:, None] * stride + cols[None, :]
    tl.store(to, tile.to(to.dtype.element_ty), mask=(rows < limit)[:, None] & (cols < E)[None, :])


@triton.jit
def _logits(a, b_T, slope, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """Logits in base 2: slope a.b, or cap tanh(slope a.b)."""
    z = tl.dot(a, b_T, input_precision=PRECISION) * slope
    if CAPPED:
        e = tl.exp(-2 * tl.abs(z))
        t = (1 - e) / (1 + e)
        z = cap * tl.where(z < 0, -t, t)
    return z


@triton.jit
def _bounds(first_ptr, last_ptr, rows, num_queries):
    """Intervals of some queries; one past the end is empty."""
    first = tl.load(first_ptr + rows, mask=rows < num_queries, other=1)
    last = tl.load(last_ptr + rows, mask=rows < num_queries, other=0)
    return first, last


@triton.jit
def _tiles_of_keys(first, last, BK: tl.constexpr):
    """What a block of queries sees, as `_cut`. If it sees nothing, low lies above high and no tile remains."""
    filled = first <= last
    low = tl.min(tl.where(filled, first, 2147483647), 0)
    high = tl.max(tl.where(filled, last + 1, 0), 0)
    all_from = tl.max(tl.where(filled, first, 0), 0)
    all_to = tl.min(tl.where(filled, last + 1, 2147483647), 0)
    return _cut(low, high, all_from, all_to, BK)


@triton.jit
def _cut(low, high, all_from, all_to, BLOCK: tl.constexpr):
    """(start, masked tiles on the left, whole tiles inside [all_from, all_to), masked tiles up to high)."""
    left = tl.cdiv(tl.minimum(tl.maximum(all_from - low, 0), tl.maximum(high - low, 0)), BLOCK)
    whole = tl.maximum(all_to - (low + left * BLOCK), 0) // BLOCK
    right = tl.cdiv(tl.maximum(high - (low + (left + whole) * BLOCK), 0), BLOCK)
    return low, left, whole, right


@triton.jit
def _attend(
    q, k_at, v_at, stride_k, stride_v, start, num_keys, first, last, slope, cap, top, total, out,
    BK: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys absorbed into the running maximum, sum and output."""
    k = _load_rows(k_at + start.to(tl.int64) * stride_k, stride_k, num_keys - start, BK, E, EP, MASKED)
    v = _load_rows(v_at + start.to(tl.int64) * stride_v, stride_v, num_keys - start, BK, E, EP, MASKED)
    z = _logits(q, tl.trans(k), slope, cap, CAPPED, PRECISION)
    if MASKED:
        keys = start + tl.arange(0, BK)
        z = tl.where((first[:, None] <= keys[None, :]) & (keys[None, :] <= last[:, None]), z, float("-inf"))
    higher = tl.maximum(top, tl.max(z, 1))
    p = tl.exp2(z - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return higher, total, out


@triton.jit
def row_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, first_ptr, last_ptr, slope, cap, num_queries, num_keys,
    stride_qk, stride_qh, stride_kn, stride_kg, stride_vn, stride_vg, stride_ok, stride_oh,
    H: tl.constexpr, R: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and lse of one block of queries of one head. The last queries, which see most, go first."""
    head = (tl.program_id(0) % H).to(tl.int64)
    at = (tl.num_programs(0) // H - 1 - tl.program_id(0) // H) * BQ
    rows = at + tl.arange(0, BQ)
    first, last = _bounds(first_ptr, last_ptr, rows, num_queries)
    low, left, whole, right = _tiles_of_keys(first, last, BK)
    q_at = q_ptr + at.to(tl.int64) * stride_qk + head * stride_qh
    q = _load_rows(q_at, stride_qk, num_queries - at, BQ, E, EP, True)
    k_at = k_ptr + head // R * stride_kg
    v_at = v_ptr + head // R * stride_vg
    # Finite, so that a query which sees nothing in a masked tile has no inf - inf.
    top = tl.full((BQ,), -1e30, tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    out = tl.zeros((BQ, EP), tl.float32)
    for t in range(left + right):
        start = low + (t + tl.where(t >= left, whole, 0)) * BK
        top, total, out = _attend(
            q, k_at, v_at, stride_kn, stride_vn, start, num_keys, first, last, slope, cap, top, total, out,
            BK, E, EP, True, CAPPED, PRECISION,
        )  # fmt: skip
    for t in range(whole):
        start = low + (left + t) * BK
        top, total, out = _attend(
            q, k_at, v_at, stride_kn, stride_vn, start, num_keys, first, last, slope, cap, top, total, out,
            BK, E, EP, False, CAPPED, PRECISION,
        )  # fmt: skip
    filled = first <= last
    total = tl.where(filled, total, 1.0)
    out = tl.where(filled[:, None], out / total[:, None], 0.0)
    out_at = out_ptr + at.to(tl.int64) * stride_ok + head * stride_oh
    _store_rows(out_at, stride_ok, num_queries - at, out, BQ, E, EP)
    lse = tl.where(filled, (top + tl.log2(total)) * 0.6931471805599453, float("inf"))
    tl.store(lse_ptr + head * num_queries + rows, lse, mask=rows < num_queries)


@triton.jit
def row_attention_bwd_rows_kernel(
    dout_ptr, out_ptr, lse_ptr, first_ptr, last_ptr, lse2_ptr, delta_ptr, num_queries,
    stride_dk, stride_dh, stride_ok, stride_oh, stride_lh, stride_lk,
    H: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """lse in base 2, +inf for empty queries, and delta = dout.out, 0 for those."""
    head = (tl.program_id(0) % H).to(tl.int64)
    at = tl.program_id(0) // H * BQ
    rows = at + tl.arange(0, BQ)
    inside = rows < num_queries
    first, last = _bounds(first_ptr, last_ptr, rows, num_queries)
    dout_at = dout_ptr + at.to(tl.int64) * stride_dk + head * stride_dh
    out_at = out_ptr + at.to(tl.int64) * stride_ok + head * stride_oh
    dout = _load_rows(dout_at, stride_dk, num_queries - at, BQ, E, EP, True).to(tl.float32)
    out = _load_rows(out_at, stride_ok, num_queries - at, BQ, E, EP, True).to(tl.float32)
    filled = first <= last
    lse = tl.load(lse_ptr + head * stride_lh + rows.to(tl.int64) * stride_lk, mask=inside & filled, other=0.0)
    lse2 = tl.where(filled, lse * 1.4426950408889634, float("inf"))
    tl.store(lse2_ptr + head * num_queries + rows, lse2, mask=inside)
    tl.store(delta_ptr + head * num_queries + rows, tl.where(filled, tl.sum(dout * out, 1), 0.0), mask=inside)


@triton.jit
def _query_slope(
    q, dout, k_at, v_at, stride_k, stride_v, start, num_keys, first, last, lse2, delta, slope, cap, dq,
    BK: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq / scale, one tile of keys added."""
    k = _load_rows(k_at + start.to(tl.int64) * stride_k, stride_k, num_keys - start, BK, E, EP, MASKED)
    v = _load_rows(v_at + start.to(tl.int64) * stride_v, stride_v, num_keys - start, BK, E, EP, MASKED)
    z = _logits(q, tl.trans(k), slope, cap, CAPPED, PRECISION)
    p = tl.exp2(z - lse2[:, None])
    if MASKED:
        keys = start + tl.arange(0, BK)
        p = tl.where((first[:, None] <= keys[None, :]) & (keys[None, :] <= last[:, None]), p, 0.0)
    ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    if CAPPED:
        ds *= 1 - (z / cap) * (z / cap)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def row_attention_bwd_queries_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse2_ptr, delta_ptr, dq_ptr, first_ptr, last_ptr, scale, slope, cap,
    num_queries, num_keys,
    stride_dk, stride_dh, stride_qk, stride_qh, stride_kn, stride_kg, stride_vn, stride_vg, stride_ok, stride_oh,
    H: tl.constexpr, R: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head."""
    head = (tl.program_id(0) % H).to(tl.int64)
    at = (tl.num_programs(0) // H - 1 - tl.program_id(0) // H) * BQ
    rows = at + tl.arange(0, BQ)
    first, last = _bounds(first_ptr, last_ptr, rows, num_queries)
    low, left, whole, right = _tiles_of_keys(first, last, BK)
    q_at = q_ptr + at.to(tl.int64) * stride_qk + head * stride_qh
    dout_at = dout_ptr + at.to(tl.int64) * stride_dk + head * stride_dh
    q = _load_rows(q_at, stride_qk, num_queries - at, BQ, E, EP, True)
    dout = _load_rows(dout_at, stride_dk, num_queries - at, BQ, E, EP, True)
    lse2 = tl.load(lse2_ptr + head * num_queries + rows, mask=rows < num_queries, other=float("inf"))
    delta = tl.load(delta_ptr + head * num_queries + rows, mask=rows < num_queries, other=0.0)
    k_at = k_ptr + head // R * stride_kg
    v_at = v_ptr + head // R * stride_vg
    dq = tl.zeros((BQ, EP), tl.float32)
    for t in range(left + right):
        start = low + (t + tl.where(t >= left, whole, 0)) * BK
        dq = _query_slope(
            q, dout, k_at, v_at, stride_kn, stride_vn, start, num_keys, first, last, lse2, delta, slope, cap, dq,
            BK, E, EP, True, CAPPED, PRECISION,
        )  # fmt: skip
    for t in range(whole):
        start = low + (left + t) * BK
        dq = _query_slope(
            q, dout, k_at, v_at, stride_kn, stride_vn, start, num_keys, first, last, lse2, delta, slope, cap, dq,
            BK, E, EP, False, CAPPED, PRECISION,
        )  # fmt: skip
    dq_at = dq_ptr + at.to(tl.int64) * stride_ok + head * stride_oh
    _store_rows(dq_at, stride_ok, num_queries - at, dq * scale, BQ, E, EP)


@triton.jit
def _key_slopes(
    k, v, q_at, dout_at, lse2_at, delta_at, first_ptr, last_ptr, stride_q, stride_d, start, num_queries, key,
    slope, cap, dk, dv,
    BQ: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv, one tile of queries added. Logits lie the other way round: (keys, queries)."""
    rows = start + tl.arange(0, BQ)
    q = _load_rows(q_at + start.to(tl.int64) * stride_q, stride_q, num_queries - start, BQ, E, EP, MASKED)
    dout = _load_rows(dout_at + start.to(tl.int64) * stride_d, stride_d, num_queries - start, BQ, E, EP, MASKED)
    if MASKED:
        lse2 = tl.load(lse2_at + rows, mask=rows < num_queries, other=float("inf"))
        delta = tl.load(delta_at + rows, mask=rows < num_queries, other=0.0)
    else:
        lse2 = tl.load(lse2_at + rows)
        delta = tl.load(delta_at + rows)
    z = _logits(k, tl.trans(q), slope, cap, CAPPED, PRECISION)
    p = tl.exp2(z - lse2[None, :])
    if MASKED:
        first, last = _bounds(first_ptr, last_ptr, rows, num_queries)
        p = tl.where((first[None, :] <= key[:, None]) & (key[:, None] <= last[None, :]), p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
    if CAPPED:
        ds *= 1 - (z / cap) * (z / cap)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def row_attention_bwd_keys_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr, first_ptr, last_ptr, begin_ptr, end_ptr,
    scale, slope, cap, num_queries, num_keys,
    stride_dk, stride_dh, stride_qk, stride_qh, stride_kn, stride_kg, stride_vn, stride_vg, stride_on, stride_og,
    G: tl.constexpr, R: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key-value head, over the query heads that share it.

    Heads and tiles of queries are one loop, so that the loads of the next head are in flight when one ends.
    """
    head = (tl.program_id(0) % G).to(tl.int64)
    at = tl.program_id(0) // G * BK
    final = tl.minimum(at + BK, num_keys) - 1
    low, left, whole, right = _cut(
        tl.load(begin_ptr + at), tl.load(end_ptr + final), tl.load(begin_ptr + final), tl.load(end_ptr + at), BQ
    )
    key = at + tl.arange(0, BK)
    k_at = k_ptr + at.to(tl.int64) * stride_kn + head * stride_kg
    v_at = v_ptr + at.to(tl.int64) * stride_vn + head * stride_vg
    k = _load_rows(k_at, stride_kn, num_keys - at, BK, E, EP, True)
    v = _load_rows(v_at, stride_vn, num_keys - at, BK, E, EP, True)
    dk = tl.zeros((BK, EP), tl.float32)
    dv = tl.zeros((BK, EP), tl.float32)
    # At least 1, though an empty loop never divides: a division by 0 is undefined, so the compiler would take it that
    # every loop runs, and load its first tile unasked, past the end.
    edges, inner = tl.maximum(left + right, 1), tl.maximum(whole, 1)
    for i in range(R * (left + right)):
        t = i % edges
        of = head * R + i // edges
        start = low + (t + tl.where(t >= left, whole, 0)) * BQ
        dk, dv = _key_slopes(
            k, v, q_ptr + of * stride_qh, dout_ptr + of * stride_dh, lse2_ptr + of * num_queries,
            delta_ptr + of * num_queries, first_ptr, last_ptr, stride_qk, stride_dk, start, num_queries, key,
            slope, cap, dk, dv, BQ, E, EP, True, CAPPED, PRECISION,
        )  # fmt: skip
    for i in range(R * whole):
        of = head * R + i // inner
        start = low + (left + i % inner) * BQ
        dk, dv = _key_slopes(
            k, v, q_ptr + of * stride_qh, dout_ptr + of * stride_dh, lse2_ptr + of * num_queries,
            delta_ptr + of * num_queries, first_ptr, last_ptr, stride_qk, stride_dk, start, num_queries, key,
            slope, cap, dk, dv, BQ, E, EP, False, CAPPED, PRECISION,
        )  # fmt: skip
    out_at = at.to(tl.int64) * stride_on + head * stride_og
    _store_rows(dk_ptr + out_at, stride_on, num_keys - at, dk * scale, BK, E, EP)
    _store_rows(dv_ptr + out_at, stride_on, num_keys - at, dv, BK, E, EP)


def _launched(x: Tensor, cut: Launch, softcap: float | None) -> dict[str, int | str | bool]:
    """Constants that all three large kernels take. tf32 would keep ten bits of a float32 input."""
    return {
        **{"E": x.shape[-1], "EP": _padded(x.shape[-1]), "BQ": cut.queries, "BK": cut.keys},
        **{"CAPPED": softcap is not None, "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32"},
        **{"num_warps": cut.warps, "num_stages": cut.stages},
    }


def _numbers(scale: float, softcap: float | None) -> tuple[float, float]:
    """(slope, cap) of logits in base 2."""
    assert scale > 0, scale
    return (scale * LOG2_E, 1.0) if softcap is None else (scale / softcap, softcap * LOG2_E)


def _strides(*tensors: Tensor) -> list[int]:
    """Of positions and heads, two a tensor. Widths are contiguous."""
    for x in tensors:
        assert x.stride(-1) == 1 and x.dtype == tensors[0].dtype, (x.shape, x.stride(), x.dtype)
    return [stride for x in tensors for stride in x.stride()[:2]]


def forward(
    q_KHE: Tensor,
    k_NGE: Tensor,
    v_NGE: Tensor,
    spans: Spans,
    scale: float,
    softcap: float | None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """(out_KHE, lse_HK)."""
    num_queries, heads, _ = q_KHE.shape
    cut = launch or launch_for(FORWARD, q_KHE)
    out = torch.empty(q_KHE.shape, dtype=q_KHE.dtype, device=q_KHE.device)
    lse = torch.empty(heads, num_queries, dtype=torch.float32, device=q_KHE.device)
    row_attention_fwd_kernel[(triton.cdiv(num_queries, cut.queries) * heads,)](
        *(q_KHE, k_NGE, v_NGE, out, lse, spans.first_K, spans.last_K),
        *(*_numbers(scale, softcap), num_queries, len(k_NGE)),
        *_strides(q_KHE, k_NGE, v_NGE, out),
        H=heads,
        R=heads // k_NGE.shape[1],
        **_launched(q_KHE, cut, softcap),
    )
    return out, lse


def prepare(dout_KHE: Tensor, out_KHE: Tensor, lse_HK: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """(lse_HK in base 2, delta_HK), as the two kernels below want them: contiguous, and settled for empty queries."""
    num_queries, heads, width = dout_KHE.shape
    lse2, delta = (torch.empty(heads, num_queries, dtype=torch.float32, device=dout_KHE.device) for _ in range(2))
    rows = max(1, 4096 // _padded(width))
    row_attention_bwd_rows_kernel[(triton.cdiv(num_queries, rows) * heads,)](
        *(dout_KHE, out_KHE, lse_HK, spans.first_K, spans.last_K, lse2, delta, num_queries),
        *(*_strides(dout_KHE, out_KHE), *lse_HK.stride()),
        H=heads,
        E=width,
        EP=_padded(width),
        BQ=rows,
    )
    return lse2, delta


def query_gradient(
    dout_KHE: Tensor,
    q_KHE: Tensor,
    k_NGE: Tensor,
    v_NGE: Tensor,
    rows_HK: tuple[Tensor, Tensor],
    spans: Spans,
    scale: float,
    softcap: float | None,
    launch: Launch | None = None,
) -> Tensor:
    """dq_KHE. `rows_HK` is what `prepare` returns."""
    num_queries, heads, _ = q_KHE.shape
    cut = launch or launch_for(QUERIES, q_KHE)
    dq = torch.empty(q_KHE.shape, dtype=q_KHE.dtype, device=q_KHE.device)
    row_attention_bwd_queries_kernel[(triton.cdiv(num_queries, cut.queries) * heads,)](
        *(dout_KHE, q_KHE, k_NGE, v_NGE, *rows_HK, dq, spans.first_K, spans.last_K),
        *(scale, *_numbers(scale, softcap), num_queries, len(k_NGE)),
        *_strides(dout_KHE, q_KHE, k_NGE, v_NGE, dq),
        H=heads,
        R=heads // k_NGE.shape[1],
        **_launched(q_KHE, cut, softcap),
    )
    return dq


def key_value_gradients(
    dout_KHE: Tensor,
    q_KHE: Tensor,
    k_NGE: Tensor,
    v_NGE: Tensor,
    rows_HK: tuple[Tensor, Tensor],
    spans: Spans,
    scale: float,
    softcap: float | None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """(dk_NGE, dv_NGE)."""
    num_keys, groups, _ = k_NGE.shape
    assert len(spans.begin_N) == num_keys, "spans of other keys"
    cut = launch or launch_for(KEYS, q_KHE)
    dk, dv = (torch.empty(k_NGE.shape, dtype=k_NGE.dtype, device=k_NGE.device) for _ in range(2))
    row_attention_bwd_keys_kernel[(triton.cdiv(num_keys, cut.keys) * groups,)](
        *(dout_KHE, q_KHE, k_NGE, v_NGE, *rows_HK, dk, dv, *spans),
        *(scale, *_numbers(scale, softcap), len(q_KHE), num_keys),
        *_strides(dout_KHE, q_KHE, k_NGE, v_NGE, dk),
        G=groups,
        R=q_KHE.shape[1] // groups,
        **_launched(q_KHE, cut, softcap),
    )
    return dk, dv
