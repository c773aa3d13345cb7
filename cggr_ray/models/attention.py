"""Attention inside documents: causal, never across a document boundary of a packed row.

On a GPU, FlashAttention over variable lengths (`torch.nn.attention.varlen`); elsewhere SDPA with an explicit mask.
Hugging Face's own layers reach it through their attention interface; the blocks of `cggr_ray.sparse` call `attend`.
Shapes: B rows of T positions, N = B T, H heads, G key-value heads, E head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DOCUMENT_FLASH = "cggr_document_flash"


def check_dtype(device: str, dtype: torch.dtype) -> None:
    """Raises ValueError for a dtype of weights that attention on a device of this kind does not have."""
    if device == "cuda" and dtype == torch.float32:
        raise ValueError("precision 'fp32' on a GPU; accepted: bf16, auto, or weights in bfloat16 or float16: "
                         "FlashAttention has no float32")  # fmt: skip


class Documents(NamedTuple):
    """Where the documents of a micro-batch are."""

    starts: Tensor
    """int32 offsets in the flattened rows, the total last, repeated as padding."""
    longest: int
    """An upper bound of a document's length."""
    first_BT: Tensor
    """int64, the first position of each position's document within its row."""


def documents_of(positions_BT: Tensor, starts: Tensor, longest: int) -> Documents:
    places = torch.arange(positions_BT.shape[1], device=positions_BT.device)
    return Documents(starts, longest, places - positions_BT)


def attend(
    q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, documents: Documents, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(output (N, H, E), log-sum-exp (H, N) in at least float32) of every position over its document.

    Logits have at least float32 too: a backward pass that computes them again divides by what they add up to here.
    """
    if q_NHE.is_cuda:
        return _flash(q_NHE, k_NGE, v_NGE, documents.starts, documents.longest, scale, window)
    rows = len(documents.first_BT)
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q_NHE, k_NGE, v_NGE))
    groups = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).repeat_interleave(groups, dim=1).mT * scale
    scores = scores.masked_fill(~document_mask(documents.first_BT, window), -torch.inf)
    out = scores.softmax(-1).to(q.dtype) @ v.repeat_interleave(groups, dim=1)
    return out.transpose(1, 2).flatten(0, 1), scores.logsumexp(-1).transpose(0, 1).flatten(1)


def _flash(
    q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    # torch 2.13 wants to be told about grouped heads; 2.11 has no such argument and groups by itself.
    grouped: dict[str, Any] = {"enable_gqa": True} if torch.__version__ >= "2.12" else {}
    # The kernel counts the keys to the left of a query, without itself.
    left = -1 if window is None or window > longest else window - 1
    out, lse = varlen_attn(
        q_NHE,
        k_NGE,
        v_NGE,
        starts,
        starts,
        longest,
        longest,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=(left, 0),
        **grouped,
    )
    return out, lse


def document_flash(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BGTE: Tensor,
    value_BGTE: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    document_starts: Tensor | None = None,
    longest_document: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """What Hugging Face's layers call on a GPU."""
    assert document_starts is not None and attention_mask is None and dropout == 0.0
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query_BHTE, key_BGTE, value_BGTE))
    out, _lse = _flash(query, key, value, document_starts, longest_document, scaling, sliding_window)
    return out.unflatten(0, (query_BHTE.shape[0], -1)), None


def register_document_flash() -> str:
    """Makes `document_flash` known to Hugging Face's layers; returns its name there."""
    from transformers import AttentionInterface

    AttentionInterface.register(DOCUMENT_FLASH, document_flash)
    return DOCUMENT_FLASH


def document_mask(first_BT: Tensor, window: int | None = None) -> Tensor:
    """Boolean (B, 1, T, T): query i may see key j of its own document, i - window < j <= i."""
    places = torch.arange(first_BT.shape[1], device=first_BT.device)
    seen = (places >= first_BT.unsqueeze(-1)) & (places <= places.unsqueeze(-1))
    if window is not None:
        seen &= places > places.unsqueeze(-1) - window
    return seen.unsqueeze(1)
