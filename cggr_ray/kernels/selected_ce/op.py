"""`selected_cross_entropy`: what the objectives call. The elementwise part is compiled on a GPU, eager elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cggr_ray.compiling import compiled_on
from cggr_ray.kernels.selected_ce.reference import chunk_loss, chunk_nll

# Bytes of logits in one chunk: on a GPU large enough for full-speed GEMMs and small beside the activations, on a CPU
# what stays in its cache.
CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}


def chunks(hidden_KD: Tensor, head_VD: Tensor) -> Iterator[slice]:
    """Slices of the rows, nearly equal (at most two sizes, so two graphs), whose logits fit in CHUNK_BYTES."""
    rows = len(hidden_KD)
    most = max(1, CHUNK_BYTES[hidden_KD.device.type] // (len(head_VD) * hidden_KD.element_size()))
    size = -(-rows // -(-rows // most)) if rows else 1
    for at in range(0, rows, size):
        yield slice(at, min(at + size, rows))


@cache
def _on(device: torch.device) -> tuple[Any, Any]:
    return compiled_on(device, chunk_loss), compiled_on(device, chunk_nll)


def position_nll(hidden_KD: Tensor, head_VD: Tensor, labels_K: Tensor) -> Tensor:
    """Next-token NLL of every row in nats, float32, 0 where the label is -100. No gradient."""
    nll = _on(hidden_KD.device)[1]
    with torch.no_grad():
        parts = chunks(hidden_KD, head_VD)
        return torch.cat([nll(hidden_KD[part] @ head_VD.mT, labels_K[part]) for part in parts])


class _SelectedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_KD: Tensor, head_VD: Tensor, labels_K: Tensor, weights_K: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss = _on(hidden_KD.device)[0]
        parts = list(chunks(hidden_KD, head_VD))
        ctx.whole = len(parts) == 1
        if ctx.whole:
            nll_K, slope = loss(hidden_KD @ head_VD.mT, labels_K, weights_K)
            ctx.save_for_backward(hidden_KD, head_VD, slope)
        else:
            hidden_grad, head_grad, nlls = torch.empty_like(hidden_KD), None, []
            for part in parts:
                nll, slope = loss(hidden_KD[part] @ head_VD.mT, labels_K[part], weights_K[part])
                torch.mm(slope, head_VD, out=hidden_grad[part])
                head_grad = _accumulate(head_grad, slope, hidden_KD[part])
                nlls.append(nll)
            assert head_grad is not None, "no rows"
            ctx.save_for_backward(hidden_grad, head_grad)
            nll_K = torch.cat(nlls)
        ctx.mark_non_differentiable(nll_K)
        return (nll_K * weights_K).sum(), nll_K

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The factor that comes from above goes to the smaller operand: the head's gradient is the largest of all.
        if ctx.whole:
            hidden_KD, head_VD, slope = ctx.saved_tensors
            return (slope @ head_VD) * grads[0], slope.mT @ (hidden_KD * grads[0]), None, None
        hidden_grad, head_grad = ctx.saved_tensors
        scaled = torch.empty(head_grad.shape, dtype=hidden_grad.dtype, device=head_grad.device)
        return hidden_grad * grads[0], torch.mul(head_grad, grads[0], out=scaled), None, None


def _accumulate(total: Tensor | None, slope_KV: Tensor, hidden_KD: Tensor) -> Tensor:
    """Adds a chunk's head gradient in float32."""
    if slope_KV.is_cuda and slope_KV.dtype != torch.float32:
        part = torch.mm(slope_KV.mT, hidden_KD, out_dtype=torch.float32)
    else:
        part = torch.mm(slope_KV.float().mT, hidden_KD.float())
    return part if total is None else total.add_(part)


def selected_cross_entropy(
    hidden_KD: Tensor, head_VD: Tensor, labels_K: Tensor, weights_K: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum of weighted NLL, differentiable; NLL of every row, float32, without gradient).

    Args:
        hidden_KD: final hidden states of the kept rows. head_VD: the head's weight, shared with them in dtype.
        labels_K: next token, -100 for a row that counts for nothing. weights_K: float32.
    """
    return _SelectedCrossEntropy.apply(hidden_KD, head_VD, labels_K, weights_K)
