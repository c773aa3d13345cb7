"""A decoder block in pieces, of which a plan runs each on the rows it needs; `models.families` names the parts.

The dense forward of all N rows leaves, for every row, the outputs of its matrix products and of attention (`Products`).
The kept rows are then *replayed* with gradient: norms, rotary embedding and activation are computed again, and every
matrix product is `given`, so that it costs nothing forward and two products of kept rows backward. What autograd sees
is an ordinary block on K rows. Without given products the same code computes them.

Shapes: R rows (N or K), D width, H heads, G key-value heads, E head width, F inner width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cggr_ray.models.families import BlockShape, BlockWeights, activation

Rotary = tuple[Tensor, Tensor] | None


class Products(NamedTuple):
    """Outputs of a block's matrix products and of its attention, one row a position."""

    qkv_RC: Tensor
    """Before head norms and rotary embedding; C = (H + 2 G) E."""
    attended_RHE: Tensor
    lse_HR: Tensor
    out_RD: Tensor
    gate_RF: Tensor | None
    up_RF: Tensor
    down_RD: Tensor

    def rows(self, index_K: Tensor) -> Products:
        """Those of some rows."""
        qkv, attended, out, up, down = (
            x.index_select(0, index_K) for x in (self.qkv_RC, self.attended_RHE, self.out_RD, self.up_RF, self.down_RD)
        )
        gate = None if self.gate_RF is None else self.gate_RF.index_select(0, index_K)
        return Products(qkv, attended, self.lse_HR.index_select(1, index_K), out, gate, up, down)


class _Given(torch.autograd.Function):
    """y = x W^T + b where y is known: costs nothing forward."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, y_RO: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI, weight_OI)
        ctx.biased = bias_O is not None
        return y_RO.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, weight_OI = ctx.saved_tensors
        dy_RO = grads[0]
        bias = dy_RO.sum(0) if ctx.biased else None
        # A layer that does not learn passes its input's gradient on and has none of its own.
        weight = dy_RO.mT @ x_RI if ctx.needs_input_grad[1] else None
        return dy_RO @ weight_OI, weight, bias, None


def linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, given_RO: Tensor | None) -> Tensor:
    """x W^T + b, or `given_RO` with that gradient."""
    if given_RO is None:
        return F.linear(x_RI, weight_OI, bias_O)
    out: Tensor = _Given.apply(x_RI, weight_OI, bias_O, given_RO)
    return out


def norm(shape: BlockShape, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The family's norm over the last dimension, rounded where Hugging Face rounds."""
    if shape.norm == "layer":
        return F.layer_norm(x, weight.shape, weight, bias, shape.eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + shape.eps)
    if shape.norm == "rms_plus_one":
        return (wide * (1.0 + weight.float())).to(x.dtype)
    return weight * wide.to(x.dtype)


def rotate(x_RHE: Tensor, rotary: Rotary) -> Tensor:
    """Rotary position embedding in the half-split layout."""
    if rotary is None:
        return x_RHE
    cos, sin = (t.unsqueeze(1) for t in rotary)
    first, second = x_RHE.chunk(2, dim=-1)
    return x_RHE * cos + torch.cat((-second, first), dim=-1) * sin


def first_norm(shape: BlockShape, w: BlockWeights, hidden_RD: Tensor) -> Tensor:
    return norm(shape, hidden_RD, w.norm1, w.norm1_bias)


def joined(w: BlockWeights, parts: str) -> tuple[Tensor, Tensor | None]:
    """The matrices (and biases) of some of q, k, v as one."""
    weights = [getattr(w, part) for part in parts]
    biases = [getattr(w, f"{part}_bias") for part in parts]
    return torch.cat(weights), None if biases[0] is None else torch.cat(biases)


def queries(shape: BlockShape, w: BlockWeights, q_RC: Tensor, rotary: Rotary) -> Tensor:
    """(R, H, E) from the raw product."""
    q = q_RC.unflatten(-1, (shape.heads, shape.head_dim))
    return rotate(q if w.q_norm is None else norm(shape, q, w.q_norm), rotary)


def keys(shape: BlockShape, w: BlockWeights, kv_RC: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Keys and values, (R, G, E) each, from the raw product."""
    k, v = (x.unflatten(-1, (shape.kv_heads, shape.head_dim)) for x in kv_RC.chunk(2, dim=-1))
    return rotate(k if w.k_norm is None else norm(shape, k, w.k_norm), rotary), v


def query_key_value(
    shape: BlockShape, w: BlockWeights, hidden_RD: Tensor, rotary: Rotary, given_RC: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(raw product, q_RHE, k_RGE, v_RGE): everything before attention."""
    qkv = linear(first_norm(shape, w, hidden_RD), *joined(w, "qkv"), given_RC)
    q, kv = qkv.split((shape.heads * shape.head_dim, 2 * shape.kv_heads * shape.head_dim), dim=-1)
    return qkv, queries(shape, w, q, rotary), *keys(shape, w, kv, rotary)


def after_attention(
    shape: BlockShape, w: BlockWeights, hidden_RD: Tensor, attended_RHE: Tensor, given: Products | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """(hidden states of the next layer, then the raw products out, gate, up, down)."""
    out = linear(attended_RHE.flatten(1), w.o, w.o_bias, given and given.out_RD)
    middle = hidden_RD + (out if w.post1 is None else norm(shape, out, w.post1))
    x2 = norm(shape, middle, w.norm2, w.norm2_bias)
    up = linear(x2, w.up, w.up_bias, given and given.up_RF)
    act = activation(shape.activation)
    if w.gate is None:
        gate, inner = None, act(up)
    else:
        gate = linear(x2, w.gate, w.gate_bias, given and given.gate_RF)
        inner = act(gate) * up
    down = linear(inner, w.down, w.down_bias, given and given.down_RD)
    return middle + (down if w.post2 is None else norm(shape, down, w.post2)), out, gate, up, down
