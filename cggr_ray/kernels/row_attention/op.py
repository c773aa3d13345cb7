"""Attention of kept queries: forward, backward, and what autograd needs. Triton on a GPU, plain PyTorch on a CPU.

Of the keys and values of positions that are not kept, `live` gradients exist and `const` ones do not:

    live   k_NGE, v_NGE of all positions learn from the kept queries
    const  only k_KGE, v_KGE of the kept positions do; the queries still attend to all positions. The second half of
           the backward then runs among kept positions alone.

A query's gradients need its output and lse, which may come from a forward over all positions (`given_row_attention`).
See `reference` for the equations and the shapes.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cggr_ray.kernels.row_attention import reference
from cggr_ray.kernels.row_attention.reference import Spans, kept_spans, span_attention_reference, spans_of

__all__ = [
    "Spans",
    "given_row_attention",
    "given_row_attention_const",
    "implementation",
    "kept_spans",
    "row_attention",
    "row_attention_backward",
    "row_attention_backward_const",
    "row_attention_forward",
    "span_attention_reference",
    "spans_of",
]


def implementation(device: torch.device) -> ModuleType:
    """The module that computes on a device."""
    if device.type == "cuda":
        from cggr_ray.kernels.row_attention import kernel

        return kernel
    if device.type == "cpu":
        return reference
    raise ValueError(f"attention of kept queries runs on cuda and cpu, not on {device}")


def row_attention_forward(
    q_KHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, spans: Spans, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out_KHE, lse_HK in float32); 0 and +inf for an empty query. Without gradient.

    The last dimension of every input is contiguous; the others may have any stride.
    """
    with torch.no_grad(), torch.cuda.device_of(q_KHE):
        return implementation(q_KHE.device).forward(q_KHE, k_NGE, v_NGE, spans, scale, softcap)


def row_attention_backward(
    dout_KHE: Tensor,
    q_KHE: Tensor,
    k_NGE: Tensor,
    v_NGE: Tensor,
    out_KHE: Tensor,
    lse_HK: Tensor,
    spans: Spans,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_KHE, dk_NGE, dv_NGE) of the live kind.

    Args:
        out_KHE: outputs of these queries, by whatever forward, as `lse_HK`. Those of empty queries are not used.
    """
    use = implementation(q_KHE.device)
    with torch.no_grad(), torch.cuda.device_of(q_KHE):
        rows_HK = use.prepare(dout_KHE, out_KHE, lse_HK, spans)
        dq = use.query_gradient(dout_KHE, q_KHE, k_NGE, v_NGE, rows_HK, spans, scale, softcap)
        dk, dv = use.key_value_gradients(dout_KHE, q_KHE, k_NGE, v_NGE, rows_HK, spans, scale, softcap)
    return dq, dk, dv


def row_attention_backward_const(
    dout_KHE: Tensor,
    q_KHE: Tensor,
    k_NGE: Tensor,
    v_NGE: Tensor,
    out_KHE: Tensor,
    lse_HK: Tensor,
    spans: Spans,
    among_kept: Spans,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_KHE, dk_KGE, dv_KGE) of the const kind: of the keys and values of the queries' own positions.

    Args:
        spans: of queries that see up to their own position, so that `last_K` is that. among_kept:
            `kept_spans(last_K, spans)`.
    """
    use = implementation(q_KHE.device)
    with torch.no_grad(), torch.cuda.device_of(q_KHE):
        rows_HK = use.prepare(dout_KHE, out_KHE, lse_HK, spans)
        dq = use.query_gradient(dout_KHE, q_KHE, k_NGE, v_NGE, rows_HK, spans, scale, softcap)
        # Those that lse was computed with: e^(z - lse) of keys rounded otherwise has no bound where logits are large.
        k_KGE, v_KGE = (x.index_select(0, spans.last_K) for x in (k_NGE, v_NGE))
        dk, dv = use.key_value_gradients(dout_KHE, q_KHE, k_KGE, v_KGE, rows_HK, among_kept, scale, softcap)
    return dq, dk, dv


class _Live(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_KHE: Tensor,
        k_NGE: Tensor,
        v_NGE: Tensor,
        out_KHE: Tensor,
        lse_HK: Tensor,
        spans: Spans,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(q_KHE, k_NGE, v_NGE, out_KHE, lse_HK)
        ctx.how = (spans, scale, softcap)
        return out_KHE.view_as(out_KHE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = row_attention_backward(_rows_contiguous(grads[0]), *ctx.saved_tensors, *ctx.how)
        return dq, dk, dv, *[None] * 5


class _Const(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_KHE: Tensor,
        k_KGE: Tensor,
        v_KGE: Tensor,
        k_NGE: Tensor,
        v_NGE: Tensor,
        out_KHE: Tensor,
        lse_HK: Tensor,
        spans: Spans,
        among_kept: Spans,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(q_KHE, k_NGE, v_NGE, out_KHE, lse_HK)
        ctx.how = (spans, among_kept, scale, softcap)
        return out_KHE.view_as(out_KHE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = row_attention_backward_const(_rows_contiguous(grads[0]), *ctx.saved_tensors, *ctx.how)
        return dq, dk, dv, *[None] * 8


def _rows_contiguous(grad_KHE: Tensor) -> Tensor:
    """Autograd may hand down an expanded gradient (of a sum, say); the kernels want the last dimension contiguous."""
    return grad_KHE if grad_KHE.stride(-1) == 1 else grad_KHE.contiguous()


def given_row_attention(
    q_KHE: Tensor,
    k_NGE: Tensor,
    v_NGE: Tensor,
    out_KHE: Tensor,
    lse_HK: Tensor,
    spans: Spans,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """`out_KHE` itself, as a function of queries, keys and values with live gradients. Nothing is computed forward."""
    return _Live.apply(q_KHE, k_NGE, v_NGE, out_KHE.detach(), lse_HK.detach(), spans, scale, softcap)


def given_row_attention_const(
    q_KHE: Tensor,
    k_KGE: Tensor,
    v_KGE: Tensor,
    k_NGE: Tensor,
    v_NGE: Tensor,
    out_KHE: Tensor,
    lse_HK: Tensor,
    spans: Spans,
    among_kept: Spans,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """`out_KHE` itself, as a function of the kept positions' queries, keys and values.

    Args:
        k_KGE: keys of the queries' own positions, which get the gradients and are not read, as `v_KGE`.
        k_NGE: keys of all positions, constants, as `v_NGE`: what the outputs were computed with.
        spans, among_kept: as in `row_attention_backward_const`.
    """
    others = (x.detach() for x in (k_NGE, v_NGE, out_KHE, lse_HK))
    return _Const.apply(q_KHE, k_KGE, v_KGE, *others, spans, among_kept, scale, softcap)


def row_attention(
    q_KHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, spans: Spans, scale: float, softcap: float | None = None
) -> Tensor:
    """out_KHE, computed here, differentiable in queries, keys and values."""
    out, lse = row_attention_forward(q_KHE, k_NGE, v_NGE, spans, scale, softcap)
    return given_row_attention(q_KHE, k_NGE, v_NGE, out, lse, spans, scale, softcap)
