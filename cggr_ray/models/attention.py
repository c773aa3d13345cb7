"""Attention inside documents: causal, never across a document boundary of a packed row.

On a GPU, FlashAttention over variable lengths (`torch.nn.attention.varlen`); elsewhere SDPA with an explicit mask.
Both are reached through Hugging Face's attention interface, so the models' own layers run unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

DOCUMENT_FLASH = "cggr_document_flash"


def document_flash(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BGTE: Tensor,
    value_BGTE: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    document_starts: Tensor | None = None,
    longest_document: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """FlashAttention over the documents of a micro-batch; rows are B x T flattened, G key-value heads serve H heads.

    Args:
        document_starts: int32 offsets of the documents in the flattened rows, the total last, repeated as padding.
        longest_document: an upper bound of a document's length.
    """
    from torch.nn.attention.varlen import varlen_attn

    assert document_starts is not None and attention_mask is None and dropout == 0.0
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query_BHTE, key_BGTE, value_BGTE))
    # torch 2.13 wants to be told about grouped heads; 2.11 has no such argument and groups by itself.
    grouped: dict[str, Any] = {"enable_gqa": True} if torch.__version__ >= "2.12" else {}
    out: Any = varlen_attn(
        query,
        key,
        value,
        document_starts,
        document_starts,
        longest_document,
        longest_document,
        scale=scaling,
        window_size=(-1, 0),
        **grouped,
    )
    return out.unflatten(0, (query_BHTE.shape[0], -1)), None


def register_document_flash() -> str:
    """Makes `document_flash` known to Hugging Face's layers; returns its name there."""
    from transformers import AttentionInterface

    AttentionInterface.register(DOCUMENT_FLASH, document_flash)
    return DOCUMENT_FLASH


def document_mask(documents_BT: Tensor) -> Tensor:
    """Boolean (B, 1, T, T): query i may see key j of its own document, j <= i."""
    positions = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    same = documents_BT[:, :, None] == documents_BT[:, None, :]
    return (same & (positions[:, None] >= positions[None, :])).unsqueeze(1)
