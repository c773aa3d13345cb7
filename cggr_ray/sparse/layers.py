"""What a plan does with a layer: capture what a forward of all rows leaves, and replay the kept rows.

Compiled on a GPU, once for all layers of equal shape. What dropped positions `lend` to the kept ones is their keys and
values (`detach="const"`: constants) or their hidden states (`detach="live"`: constants of which W_K and W_V learn).
Shapes as in `block`, and N positions, K kept slots.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cggr_ray.compiling import compiled_on
from cggr_ray.kernels.row_attention.op import (
    given_row_attention,
    given_row_attention_const,
    row_attention,
    row_attention_forward,
)
from cggr_ray.models.attention import Documents, attend
from cggr_ray.models.checkpointing import Checkpointing
from cggr_ray.models.families import BlockShape, BlockWeights
from cggr_ray.sparse import block
from cggr_ray.sparse.block import Products, Rotary
from cggr_ray.sparse.kept import Kept

Detach = Literal["const", "live"]


class Lent(NamedTuple):
    """What all N positions leave for the kept ones: (k_NGE, v_NGE), or (hidden_ND, raw key-value product)."""

    first: Tensor
    second: Tensor


class Trace(NamedTuple):
    """What a layer's forward leaves. Without products the kept rows are computed again."""

    lent: Lent
    products: Products | None

    def rows(self, index_K: Tensor) -> Trace:
        return Trace(self.lent, None if self.products is None else self.products.rows(index_K))


def _capture(
    shape: BlockShape,
    w: BlockWeights,
    hidden_ND: Tensor,
    rotary: Rotary,
    documents: Documents,
    index_K: Tensor | None,
    detach: Detach,
    products: bool,
) -> tuple[Tensor, Lent, Products | None]:
    qkv, q, k, v = block.query_key_value(shape, w, hidden_ND, rotary)
    attended, lse = attend(q, k, v, documents, shape.scale, shape.window)
    after, out, gate, up, down = block.after_attention(shape, w, hidden_ND, attended)
    # Contiguous copies: a view would keep the whole product alive.
    if detach == "const":
        lent = Lent(k.contiguous(), v.contiguous())
    else:
        lent = Lent(hidden_ND, qkv[:, shape.heads * shape.head_dim :].contiguous())
    if not products:
        return after, lent, None
    every = Products(qkv, attended, lse, out, gate, up, down)
    return after, lent, every if index_K is None else every.rows(index_K)


def _lend(shape: BlockShape, w: BlockWeights, hidden_ND: Tensor, rotary: Rotary, detach: Detach) -> Lent:
    kv = block.linear(block.first_norm(shape, w, hidden_ND), *block.joined(w, "kv"), None)
    if detach == "live":
        return Lent(hidden_ND, kv)
    k, v = block.keys(shape, w, kv, rotary)
    return Lent(k, v.contiguous())


class Overlay(torch.autograd.Function):
    """Hidden states of all positions, constants but for the kept ones, whose values are equal."""

    @staticmethod
    def forward(ctx: Any, hidden_KD: Tensor, hidden_ND: Tensor, index_K: Tensor, filled_K: Tensor) -> Tensor:
        ctx.save_for_backward(index_K, filled_K)
        return hidden_ND.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        index_K, filled_K = ctx.saved_tensors
        return grads[0].index_select(0, index_K) * filled_K.unsqueeze(1), None, None, None


def _inputs_const(
    shape: BlockShape, w: BlockWeights, hidden_KD: Tensor, rotary_K: Rotary, given_KC: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return block.query_key_value(shape, w, hidden_KD, rotary_K, given_KC)[1:]


def _inputs_live(
    shape: BlockShape,
    w: BlockWeights,
    hidden_KD: Tensor,
    rotary_K: Rotary,
    rotary_N: Rotary,
    lent: Lent,
    index_K: Tensor,
    filled_K: Tensor,
    given_KC: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    given = None if given_KC is None else given_KC[:, : shape.heads * shape.head_dim]
    q = block.linear(block.first_norm(shape, w, hidden_KD), *block.joined(w, "q"), given)
    hidden_ND: Tensor = Overlay.apply(hidden_KD, lent.first, index_K, filled_K)
    kv = block.linear(block.first_norm(shape, w, hidden_ND), *block.joined(w, "kv"), lent.second)
    return block.queries(shape, w, q, rotary_K), *block.keys(shape, w, kv, rotary_N)


def _after(
    shape: BlockShape, w: BlockWeights, hidden_KD: Tensor, attended_KHE: Tensor, given: Products | None
) -> Tensor:
    return block.after_attention(shape, w, hidden_KD, attended_KHE, given)[0]


class SparseLayers:
    """Capture and replay on one device.

    Kept rows alone are computed again: with `block` from their hidden states, with `selective` from their products.
    """

    def __init__(self, device: torch.device, detach: Detach, checkpointing: Checkpointing) -> None:
        self.detach, self.checkpointing = detach, checkpointing
        self._capture, self._lend = compiled_on(device, _capture), compiled_on(device, _lend)
        self._inputs = compiled_on(device, _inputs_const if detach == "const" else _inputs_live)
        self._after = compiled_on(device, _after)

    @torch.no_grad()
    def capture(
        self,
        shape: BlockShape,
        w: BlockWeights,
        hidden_ND: Tensor,
        rotary: Rotary,
        documents: Documents,
        index_K: Tensor | None = None,
        products: bool = True,
    ) -> tuple[Tensor, Trace]:
        """(hidden states of all rows after the layer, what is left of it: of all rows, or of those of `index_K`)."""
        products = products and self.checkpointing != "block"
        hidden_ND, lent, found = self._capture(shape, w, hidden_ND, rotary, documents, index_K, self.detach, products)
        return hidden_ND, Trace(lent, found)

    @torch.no_grad()
    def lend(self, shape: BlockShape, w: BlockWeights, hidden_ND: Tensor, rotary: Rotary) -> Trace:
        """What all rows leave for the kept ones, and nothing else: of a layer behind which only those are read."""
        return Trace(self._lend(shape, w, hidden_ND, rotary, self.detach), None)

    def replay(
        self, shape: BlockShape, w: BlockWeights, hidden_KD: Tensor, rotary_N: Rotary, kept: Kept, trace: Trace
    ) -> Tensor:
        """Hidden states of the kept rows after the layer, with gradient."""
        if self.checkpointing != "none":
            out: Tensor = torch.utils.checkpoint.checkpoint(
                self._replay, shape, w, hidden_KD, rotary_N, kept, trace, use_reentrant=False, preserve_rng_state=False
            )
            return out
        return self._replay(shape, w, hidden_KD, rotary_N, kept, trace)

    def _replay(
        self, shape: BlockShape, w: BlockWeights, hidden_KD: Tensor, rotary_N: Rotary, kept: Kept, trace: Trace
    ) -> Tensor:
        given = trace.products
        raw = None if given is None else given.qkv_RC
        if self.detach == "const":
            q, k, v = self._inputs(shape, w, hidden_KD, kept.rotary_of(shape), raw)
            attended = self._attend_const(shape, q, k, v, kept, trace)
        else:
            q, k, v = self._inputs(
                shape, w, hidden_KD, kept.rotary_of(shape), rotary_N, trace.lent, kept.index_K, kept.filled_K, raw
            )
            attended = self._attend_live(shape, q, k, v, kept, trace)
        found: Tensor = self._after(shape, w, hidden_KD, attended, given)
        return found

    def _attend_const(self, shape: BlockShape, q: Tensor, k: Tensor, v: Tensor, kept: Kept, trace: Trace) -> Tensor:
        spans, among = kept.spans[shape.window], kept.among[shape.window]
        if trace.products is None:
            with torch.no_grad():
                out, lse = row_attention_forward(q, *trace.lent, spans, shape.scale)
        else:
            out, lse = trace.products.attended_RHE, trace.products.lse_HR
        return given_row_attention_const(q, k, v, *trace.lent, out, lse, spans, among, shape.scale)

    def _attend_live(self, shape: BlockShape, q: Tensor, k: Tensor, v: Tensor, kept: Kept, trace: Trace) -> Tensor:
        spans = kept.spans[shape.window]
        if trace.products is None:
            return row_attention(q, k, v, spans, shape.scale)
        out, lse = trace.products.attended_RHE, trace.products.lse_HR
        return given_row_attention(q, k, v, out, lse, spans, shape.scale)
