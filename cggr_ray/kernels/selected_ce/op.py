"""`selected_cross_entropy`: what the objectives call. The elementwise part is compiled on a GPU, eager elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from cggr_ray.compiling import compiled_on
from cggr_ray.kernels.selected_ce.reference import chunk_loss, chunk_losses, chunk_nll

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
def _on(device: torch.device) -> tuple[Any, Any, Any]:
    return compiled_on(device, chunk_loss), compiled_on(device, chunk_nll), compiled_on(device, chunk_losses)


def position_nll(hidden_KD: Tensor, head_VD: Tensor, labels_K: Tensor) -> Tensor:
    """Next-token NLL of every row in nats, float32, 0 where the label is -100. No gradient."""
    nll = _on(hidden_KD.device)[1]
    with torch.no_grad():
        parts = chunks(hidden_KD, head_VD)
        return torch.cat([nll(hidden_KD[part] @ head_VD.mT, labels_K[part]) for part in parts])


class _SelectedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: Tensor,
        head_VD: Tensor,
        labels: Tensor,
        weights: Tensor,
        smoothing: float,
        bonus: float,
    ) -> tuple[Tensor, Tensor]:
        one, _, several = _on(hidden_KD.device)
        loss = one if labels.ndim == 1 else partial(several, smoothing=smoothing, bonus=bonus)
        parts = list(chunks(hidden_KD, head_VD))
        ctx.whole = len(parts) == 1
        if ctx.whole:
            nll, slope, *beyond = loss(hidden_KD @ head_VD.mT, labels, weights)
            ctx.save_for_backward(hidden_KD, head_VD, slope)
        else:
            hidden_grad, head_grad, nlls, beyond = torch.empty_like(hidden_KD), None, [], []
            for part in parts:
                nll, slope, *more = loss(hidden_KD[part] @ head_VD.mT, labels[part], weights[part])
                torch.mm(slope, head_VD, out=hidden_grad[part])
                if ctx.needs_input_grad[1]:
                    head_grad = _accumulate(head_grad, slope, hidden_KD[part])
                nlls.append(nll)
                beyond += more
            assert parts, "no rows"
            ctx.save_for_backward(hidden_grad, head_grad)
            nll = torch.cat(nlls)
        ctx.mark_non_differentiable(nll)
        total = (nll * weights).sum()
        return total + torch.cat(beyond).sum() if beyond else total, nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # The slopes are constants: what depends on them would be missing in a derivative of these gradients.
            raise RuntimeError("create_graph = True; accepted: False, these gradients cannot be differentiated again")
        # The factor that comes from above goes to the smaller operand: the head's gradient is the largest of all.
        if ctx.whole:
            hidden_KD, head_VD, slope = ctx.saved_tensors
            head = slope.mT @ (hidden_KD * grads[0]) if ctx.needs_input_grad[1] else None
            return (slope @ head_VD) * grads[0], head, *(None,) * 4
        hidden_grad, head_grad = ctx.saved_tensors
        scaled = None
        # A head that does not learn has none, which would be as large as itself in float32.
        if head_grad is not None:
            scaled = torch.empty(head_grad.shape, dtype=hidden_grad.dtype, device=head_grad.device)
            torch.mul(head_grad, grads[0], out=scaled)
        return hidden_grad * grads[0], scaled, *(None,) * 4


def _accumulate(total: Tensor | None, slope_KV: Tensor, hidden_KD: Tensor) -> Tensor:
    """Adds a chunk's head gradient in float32."""
    if slope_KV.is_cuda and slope_KV.dtype != torch.float32:
        part = torch.mm(slope_KV.mT, hidden_KD, out_dtype=torch.float32)
    else:
        # Autocast would round the part to 16 bits, and the sum with it.
        with torch.autocast(slope_KV.device.type, enabled=False):
            part = torch.mm(slope_KV.float().mT, hidden_KD.float())
    return part if total is None else total.add_(part)


def selected_cross_entropy(
    hidden_KD: Tensor,
    head_VD: Tensor,
    labels: Tensor,
    weights: Tensor,
    smoothing: float = 0.0,
    bonus: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(what is minimised, differentiable; NLL of every target in the shape of `labels`, float32, without gradient).

    The first is the sum of weighted NLL, and what smoothing and bonus add to it; see `reference`.

    Args:
        hidden_KD: final hidden states of the kept rows. head_VD: the head's weight, shared with them in dtype.
        labels: next tokens (K,), or several targets a row (K, J); -100 for what counts for nothing.
        weights: float32, in the shape of `labels`.
        smoothing: share of the first target's weight that all tokens get alike. bonus: factor of the entropy.

    Raises:
        RuntimeError: in a backward pass with `create_graph = True`.
    """
    if labels.ndim == 1 and (smoothing or bonus):
        columns = labels.unsqueeze(1), weights.unsqueeze(1)
        total, nll_K1 = _SelectedCrossEntropy.apply(hidden_KD, head_VD, *columns, smoothing, bonus)
        return total, nll_K1.squeeze(1)
    return _SelectedCrossEntropy.apply(hidden_KD, head_VD, labels, weights, smoothing, bonus)
