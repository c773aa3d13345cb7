"""Attention of some queries against all keys, each query seeing one interval of them: the definition, in plain PyTorch.

    z_ij = scale q_i.k_j  (or c tanh(z_ij / c))      p_ij = e^{z_ij - lse_i} for first_i <= j <= last_i, else 0
    out_i = sum_j p_ij v_j
    delta_i = dout_i.out_i      ds_ij = p_ij (dout_i.v_j - delta_i) dz_ij/d(scale q_i.k_j)
    dq_i = scale sum_j ds_ij k_j      dk_j = scale sum_i ds_ij q_i      dv_j = sum_i p_ij dout_i

The gradients need the outputs and lse of the queries, not of whom they were computed with: a forward over all positions
(FlashAttention, arXiv 2205.14135) serves a backward over the kept ones. Causality, documents packed in a row, rows of a
batch and sliding windows are all intervals of one flat sequence, so there is no batch dimension.

Shapes: K queries, N keys, H query heads, G key-value heads (H / G query heads share one), E width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Logits that the functions of this file hold at once in one tensor; the backward needs about four such tensors.
CHUNK_LOGITS = 8_000_000


class Spans(NamedTuple):
    """Which keys each query sees, and which queries may see each key. int32; built once, shared by all layers.

    Over queries that are not empty `first_K` and `last_K` never decrease. An empty query (first > last) sees nothing:
    its output is 0, its lse +inf, and whatever arrives as its gradient counts for nothing.
    `begin_N[j] <= i < end_N[j]` holds for every query i that sees key j, and besides those for empty queries only.
    """

    first_K: Tensor
    last_K: Tensor
    begin_N: Tensor
    end_N: Tensor


def spans_of(first_K: Tensor, last_K: Tensor, num_keys: int) -> Spans:
    """Spans of queries that see the keys first..last, both included; first > last for an empty one. Nothing waits."""
    first, last = (x.to(torch.int32).contiguous() for x in (first_K, last_K))
    empty = first > last
    # An empty query takes the bounds of its neighbours, so that both sequences are sorted throughout.
    reached = last.masked_fill(empty, -1).cummax(0).values
    left = first.masked_fill(empty, num_keys).flip(0).cummin(0).values.flip(0)
    keys = torch.arange(num_keys, dtype=torch.int32, device=first.device)
    begin = torch.searchsorted(reached, keys, out_int32=True)
    end = torch.searchsorted(left, keys, out_int32=True, right=True)
    return Spans(first, last, begin, end)


def kept_spans(index_K: Tensor, spans: Spans) -> Spans:
    """Spans of the same queries among the keys of the queries' own positions, `k_NGE[index_K]`.

    Query i sees the compact keys from the first one inside its interval up to its own. An empty query may repeat a
    position; it must come after the filled queries that see that position, and so acts as a key for none of them.
    """
    own = torch.arange(len(index_K), dtype=torch.int32, device=index_K.device)
    first = torch.searchsorted(index_K.to(torch.int32).contiguous(), spans.first_K, out_int32=True)
    empty = spans.first_K > spans.last_K
    return spans_of(torch.where(empty, own + 1, first), own, len(index_K))


def span_attention_reference(
    q_KHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, spans: Spans, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out_KHE, lse_HK) with the whole mask in memory, differentiable, in float32 or, for such input, float64."""
    dtype = torch.promote_types(q_KHE.dtype, torch.float32)
    shared = q_KHE.shape[1] // k_NGE.shape[1]
    q, k, v = q_KHE.to(dtype), *(x.to(dtype).repeat_interleave(shared, dim=1) for x in (k_NGE, v_NGE))
    z_HKN = _logits(q.transpose(0, 1), k.transpose(0, 1), scale, softcap)
    keys = torch.arange(len(k), device=k.device)
    visible_KN = (spans.first_K[:, None] <= keys) & (keys <= spans.last_K[:, None])
    empty_K = ~visible_KN.any(-1)
    # Some finite logit for a query that sees nothing: a row of -inf alone has gradients that are not numbers.
    z_HKN = z_HKN.masked_fill(~visible_KN, -math.inf).masked_fill(empty_K[:, None], 0.0)
    lse_HK = z_HKN.logsumexp(-1)
    p_HKN = (z_HKN - lse_HK[..., None]).exp().masked_fill(empty_K[:, None], 0.0)
    out_KHE = (p_HKN @ v.transpose(0, 1)).transpose(0, 1)
    return out_KHE, lse_HK.masked_fill(empty_K, math.inf)


def _logits(q_XE: Tensor, k_NE: Tensor, scale: float, softcap: float | None) -> Tensor:
    z = (q_XE @ k_NE.mT) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


class _Part(NamedTuple):
    """Some queries, the keys that any of them sees, and who sees whom. Query heads are grouped by key-value head."""

    queries: slice
    keys: slice
    visible_CM: Tensor

    def of_queries(self, x_KHE: Tensor, heads: int) -> Tensor:
        """(G, R, C, E) of (K, H, E), in at least float32."""
        x = x_KHE[self.queries].to(torch.promote_types(x_KHE.dtype, torch.float32))
        return x.unflatten(1, (heads, -1)).permute(1, 2, 0, 3)

    def of_keys(self, x_NGE: Tensor) -> Tensor:
        """(G, 1, M, E) of (N, G, E), in at least float32."""
        x = x_NGE[self.keys].to(torch.promote_types(x_NGE.dtype, torch.float32))
        return x.transpose(0, 1).unsqueeze(1)

    def of_rows(self, x_HK: Tensor, heads: int) -> Tensor:
        """(G, R, C, 1) of (H, K)."""
        return x_HK[:, self.queries].unflatten(0, (heads, -1)).unsqueeze(-1)


def _parts(heads: int, spans: Spans) -> Iterator[_Part]:
    """Runs of queries whose logits are at most CHUNK_LOGITS. Queries that see nothing may be in none."""
    filled = spans.first_K <= spans.last_K
    rows = max(1, CHUNK_LOGITS // max(1, heads * len(spans.begin_N)))
    for at in range(0, len(filled), rows):
        queries = slice(at, min(at + rows, len(filled)))
        first, last, some = spans.first_K[queries], spans.last_K[queries], filled[queries]
        if some.any():
            keys = slice(int(first[some].min()), int(last[some].max()) + 1)
            at_M = torch.arange(keys.start, keys.stop, device=first.device)
            yield _Part(queries, keys, (first[:, None] <= at_M) & (at_M <= last[:, None]))


def forward(
    q_KHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, spans: Spans, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(out_KHE in the dtype of the queries, lse_HK in at least float32), some queries at a time."""
    heads = k_NGE.shape[1]
    out = torch.zeros(q_KHE.shape, dtype=q_KHE.dtype, device=q_KHE.device)
    lse = q_KHE.new_full((q_KHE.shape[1], len(q_KHE)), math.inf, dtype=torch.promote_types(q_KHE.dtype, torch.float32))
    for part in _parts(q_KHE.shape[1], spans):
        z = _logits(part.of_queries(q_KHE, heads), part.of_keys(k_NGE), scale, softcap)
        z = z.masked_fill_(~part.visible_CM, -math.inf)
        some = part.visible_CM.any(-1)
        sums = z.logsumexp(-1).masked_fill_(~some, math.inf)
        p = z.sub_(sums.unsqueeze(-1)).exp_()
        out[part.queries] = (p @ part.of_keys(v_NGE)).permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
        lse[:, part.queries] = sums.flatten(0, 1)
    return out, lse


def prepare(dout_KHE: Tensor, out_KHE: Tensor, lse_HK: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """(lse_HK with +inf for empty queries, delta_HK with 0): what both gradients below start from."""
    dtype = torch.promote_types(dout_KHE.dtype, torch.float32)
    empty_K = spans.first_K > spans.last_K
    delta_HK = (dout_KHE.to(dtype) * out_KHE.to(dtype)).sum(-1).T
    return lse_HK.to(dtype).masked_fill(empty_K, math.inf), delta_HK.masked_fill(empty_K, 0.0)


def _slopes(
    part: _Part,
    dout_KHE: Tensor,
    q_KHE: Tensor,
    k_NGE: Tensor,
    v_NGE: Tensor,
    rows_HK: tuple[Tensor, Tensor],
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(p, ds), (G, R, C, M) each."""
    heads = k_NGE.shape[1]
    lse, delta = (part.of_rows(x, heads) for x in rows_HK)
    z = _logits(part.of_queries(q_KHE, heads), part.of_keys(k_NGE), scale, softcap)
    p = (z - lse).exp_().masked_fill_(~part.visible_CM, 0.0)
    ds = (part.of_queries(dout_KHE, heads) @ part.of_keys(v_NGE).mT).sub_(delta).mul_(p)
    if softcap is not None:
        ds = ds.mul_(1 - (z / softcap).square_())
    return p, ds


def query_gradient(
    dout_KHE: Tensor,
    q_KHE: Tensor,
    k_NGE: Tensor,
    v_NGE: Tensor,
    rows_HK: tuple[Tensor, Tensor],
    spans: Spans,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """dq_KHE. `rows_HK` is what `prepare` returns."""
    dq = torch.zeros(q_KHE.shape, dtype=q_KHE.dtype, device=q_KHE.device)
    for part in _parts(q_KHE.shape[1], spans):
        _, ds = _slopes(part, dout_KHE, q_KHE, k_NGE, v_NGE, rows_HK, scale, softcap)
        dq[part.queries] = ((ds @ part.of_keys(k_NGE)) * scale).permute(2, 0, 1, 3).flatten(1, 2).to(dq.dtype)
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
) -> tuple[Tensor, Tensor]:
    """(dk_NGE, dv_NGE), summed over the queries in at least float32."""
    heads = k_NGE.shape[1]
    dtype = torch.promote_types(k_NGE.dtype, torch.float32)
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (k_NGE, v_NGE))
    for part in _parts(q_KHE.shape[1], spans):
        p, ds = _slopes(part, dout_KHE, q_KHE, k_NGE, v_NGE, rows_HK, scale, softcap)
        of_q, of_dout = (part.of_queries(x, heads).flatten(1, 2) for x in (q_KHE, dout_KHE))
        dk[part.keys] += (ds.flatten(1, 2).mT @ of_q).transpose(0, 1) * scale
        dv[part.keys] += (p.flatten(1, 2).mT @ of_dout).transpose(0, 1)
    return dk.to(k_NGE.dtype), dv.to(v_NGE.dtype)
