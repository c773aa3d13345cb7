"""Attention over a shape and a mask, by every backend that there is, and exactly.

Inputs are (B, T, H, E) and (B, T, G, E), contiguous as projections leave them; a backend that wants heads first gets
transposed views. Masks, all causal: `causal`; `documents`, eight of random lengths in every row; `window`, a quarter of
the positions. One product counts 2 a multiplication and addition:

    forward flops = 2 products x 2 H E pairs        pairs: (query, key) that the mask lets see

so a backend that computes what the mask hides gets a lower rate. H query heads, G key-value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cggr_ray.compiling import compiled_on
from cggr_ray.models.attention import document_flash, document_mask

MASKS = ("causal", "documents", "window")
DOCUMENTS_A_ROW = 8
WINDOW_SHARE = 4

Inputs = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionShape:
    """`4x4096x32x8x128`: rows, positions, query heads, key-value heads, head width."""

    rows: int
    positions: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def parse(cls, text: str) -> AttentionShape:
        parts = text.split("x")
        accepted = "accepted: ROWSxPOSITIONSxHEADSxKV_HEADSxHEAD_DIM, such as 4x4096x32x8x128"
        if len(parts) != 5 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"shape {text!r}; {accepted}")
        shape = cls(*map(int, parts))
        if shape.heads % shape.kv_heads:
            raise ValueError(f"shape {text!r}: {shape.kv_heads} key-value heads do not divide {shape.heads} heads; "
                             f"{accepted}")  # fmt: skip
        if shape.positions < DOCUMENTS_A_ROW:
            raise ValueError(f"shape {text!r} with {shape.positions} positions; accepted: at least {DOCUMENTS_A_ROW}")
        return shape

    def __str__(self) -> str:
        return f"{self.rows}x{self.positions}x{self.heads}x{self.kv_heads}x{self.head_dim}"


@dataclass(frozen=True)
class Cell:
    """A shape and a mask on a device. `first_BT`: the first position that each query may see, but for the window."""

    shape: AttentionShape
    mask: str
    first_BT: Tensor
    window: int | None

    @classmethod
    def of(cls, shape: AttentionShape, mask: str, device: torch.device) -> Cell:
        first = torch.zeros(shape.rows, shape.positions, dtype=torch.int64)
        if mask == "documents":
            generator = torch.Generator().manual_seed(0)
            for row in first:
                cuts = torch.randperm(shape.positions - 1, generator=generator)[: DOCUMENTS_A_ROW - 1] + 1
                row[cuts] = cuts
            first = first.cummax(dim=1).values
        window = max(1, shape.positions // WINDOW_SHARE) if mask == "window" else None
        return cls(shape, mask, first.to(device), window)

    @cached_property
    def seen_B1TT(self) -> Tensor:
        return document_mask(self.first_BT, self.window)

    @cached_property
    def starts(self) -> Tensor:
        """int32 offsets of the documents in the flattened rows, the total last."""
        places = torch.arange(self.shape.positions, device=self.first_BT.device)
        starts = (places == self.first_BT).flatten().nonzero().flatten()
        return F.pad(starts, (0, 1), value=self.first_BT.numel()).int()

    @cached_property
    def longest(self) -> int:
        return int(self.starts.diff().max())

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    @property
    def grouped(self) -> bool:
        return self.shape.heads != self.shape.kv_heads

    @property
    def forward_flops(self) -> int:
        """Two products of every pair that the mask lets see."""
        seen_BT = torch.arange(self.shape.positions, device=self.first_BT.device) - self.first_BT + 1
        pairs = int(seen_BT.clamp_max(self.window or self.shape.positions).sum())
        return 2 * 2 * self.shape.heads * self.shape.head_dim * pairs

    def inputs(self, dtype: torch.dtype) -> tuple[Inputs, Tensor]:
        """((q, k, v), gradient of the output), drawn from a seed."""
        s, device = self.shape, self.first_BT.device
        g = torch.Generator(device).manual_seed(0)
        sizes = [(s.rows, s.positions, heads, s.head_dim) for heads in (s.heads, s.kv_heads, s.kv_heads, s.heads)]
        q, k, v, gradient = (torch.randn(size, generator=g, device=device, dtype=dtype) for size in sizes)
        return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), gradient


def sdpa(backend: SDPBackend) -> Callable[[Cell], Attention]:
    """torch's scaled_dot_product_attention held to one backend; a mask that is not plainly causal is explicit."""

    def make(cell: Cell) -> Attention:
        causal = cell.mask == "causal"
        mask = None if causal else cell.seen_B1TT

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=cell.grouped)
            return out.transpose(1, 2)

        return attend

    return make


def flex(cell: Cell) -> Attention:
    """flex_attention with a block mask; compiled on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    first_BT, positions, window = cell.first_BT, cell.shape.positions, cell.window

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= first_BT[b, i])

    def windowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert window is not None
        return (j <= i) & (j > i - window)

    seen = {"causal": causal, "documents": documents, "window": windowed}[cell.mask]
    rows = cell.shape.rows if cell.mask == "documents" else None
    blocks = create_block_mask(seen, rows, None, positions, positions, device=first_BT.device)
    attention: Any = compiled_on(first_BT.device, flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = attention(q, k, v, block_mask=blocks, enable_gqa=cell.grouped)
        return out.transpose(1, 2)

    return attend


def varlen(cell: Cell) -> Attention:
    """torch's varlen attention as this project's models call it."""
    starts, longest, module = cell.starts, cell.longest, nn.Identity()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        document: dict[str, Any] = {"document_starts": starts, "longest_document": longest}
        return document_flash(module, q, k, v, None, cell.scale, sliding_window=cell.window, **document)[0]

    return attend


def flash_attn(cell: Cell) -> Attention:
    """The flash-attn package."""
    from flash_attn import flash_attn_varlen_func

    starts, longest = cell.starts, cell.longest
    window = (-1, -1) if cell.window is None else (cell.window - 1, 0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out: Tensor = flash_attn_varlen_func(
            *flat, starts, starts, longest, longest, causal=True, window_size=window, softmax_scale=cell.scale
        )
        return out.unflatten(0, q.shape[:2])

    return attend


BACKENDS: Mapping[str, Callable[[Cell], Attention]] = {
    "math": sdpa(SDPBackend.MATH),
    "efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
    "varlen": varlen,
    "flash_attn": flash_attn,
}


def exact(cell: Cell, inputs: Inputs, gradient: Tensor) -> list[Tensor]:
    """Output and gradients of q, k, v by plain float32 arithmetic, one row and key-value head at a time: scores are
    T x T, and long rows of many heads would not fit."""
    found = [torch.empty_like(x, dtype=torch.float32) for x in (gradient, *inputs)]
    groups = cell.shape.heads // cell.shape.kv_heads
    for row in range(cell.shape.rows):
        hidden_TT = ~cell.seen_B1TT[row, 0]
        for head in range(cell.shape.kv_heads):
            queries, keys = slice(head * groups, (head + 1) * groups), slice(head, head + 1)
            parts = (queries, queries, keys, keys)
            leaves = [
                x[row, :, part].detach().float().requires_grad_() for x, part in zip(inputs, parts[1:], strict=True)
            ]
            q, k, v = (x.transpose(0, 1) for x in leaves)
            weights = (q @ k.mT * cell.scale).masked_fill(hidden_TT, -torch.inf).softmax(-1)
            out = (weights @ v).transpose(0, 1)
            gradients = torch.autograd.grad(out, leaves, gradient[row, :, queries].float())
            for whole, part, value in zip(found, parts, (out.detach(), *gradients), strict=True):
                whole[row, :, part] = value
    return found
