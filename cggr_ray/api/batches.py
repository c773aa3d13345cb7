"""A micro-batch from what a Hugging Face model is called with.

Labels are unshifted, as Hugging Face takes them: position t learns to predict labels[t + 1]. Here the first token of a
document is nobody's label, and neither is one that the attention mask leaves out. Padding on the left is a document of
its own; padding on the right needs none, as nothing behind it looks back. Shapes: B rows of T positions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cggr_ray.data.batch import IGNORE, MicroBatch
from cggr_ray.kernels.select.op import compact

FAULTS = (
    "attention_mask with holes; accepted: ones in one piece in every row, padding on its left or right",
    "attention_mask padded on the left, of a model with absolute positions; accepted: padding on the right",
    "position_ids that are no documents; accepted: 0, 1, 2, ... again and again, or None for padded rows",
)


class Prepared(NamedTuple):
    micro: MicroBatch
    faults: Tensor
    """Boolean, which of FAULTS there are; on the device, so that nobody waits for it."""


def prepare(
    tokens_BT: Tensor,
    attention_mask_BT: Tensor | None,
    labels_BT: Tensor,
    position_ids_BT: Tensor | None,
    absolute_positions: bool,
) -> Prepared:
    """Checks shapes here and values on the device. Waits for the device to count the documents of packed rows alone."""
    _check_shapes(tokens_BT, attention_mask_BT, labels_BT, position_ids_BT)
    rows, width = tokens_BT.shape
    device = tokens_BT.device
    places_BT = torch.arange(width, device=device).expand(rows, width)
    real_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if attention_mask_BT is None else attention_mask_BT != 0
    left, jumps = torch.zeros((2,), dtype=torch.bool, device=device).unbind()
    positions_BT, documents = places_BT, rows
    if position_ids_BT is not None:
        positions_BT = position_ids_BT.expand(rows, width)
        documents = _power_of_two(int((positions_BT == 0).sum()))
        after_BT = positions_BT[:, 1:]
        jumps = ((after_BT != 0) & (after_BT != positions_BT[:, :-1] + 1)).any() | (positions_BT[:, 0] != 0).any()
    elif attention_mask_BT is not None:
        positions_BT, documents = _after_padding(real_BT, places_BT), 2 * rows
        left = (~real_BT[:, 0] & real_BT.any(1)).any() & absolute_positions
    holes = (~real_BT[:, :-1] & real_BT[:, 1:] & (positions_BT[:, 1:] > 0)).any()
    shifted_BT = shifted(labels_BT, real_BT, positions_BT)
    starts = compact((positions_BT == 0).reshape(1, -1), documents + 1, rows * width)[0]
    micro = MicroBatch(
        tokens_BT=tokens_BT,
        labels_BT=shifted_BT,
        positions_BT=positions_BT,
        position_ids_BT=torch.where(real_BT, places_BT, -1),
        document_starts=starts.int(),
        longest_document=width,
        labelled_B=np.full(rows, -1),
        index=0,
    )
    return Prepared(micro, torch.stack((holes, left, jumps)))


def shifted(labels_BT: Tensor, real_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """The label of each position: that of the next token, where it belongs to the same document."""
    labels = torch.where(real_BT & (positions_BT > 0) & (labels_BT >= 0), labels_BT.long(), IGNORE)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def _after_padding(real_BT: Tensor, places_BT: Tensor) -> Tensor:
    """Positions that count from the first token; those of the padding before it count for themselves."""
    first_B1 = real_BT.int().argmax(1, keepdim=True)
    return torch.where(places_BT >= first_B1, places_BT - first_B1, places_BT)


def _power_of_two(count: int) -> int:
    """Few numbers of documents, so that few graphs are compiled."""
    return 1 << max(0, count - 1).bit_length()


def _check_shapes(tokens: Tensor, mask: Tensor | None, labels: Tensor, positions: Tensor | None) -> None:
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"input_ids of shape {tuple(tokens.shape)}; accepted: (B, T)")
    for name, value in (("attention_mask", mask), ("labels", labels), ("position_ids", positions)):
        one_row = name == "position_ids" and value is not None and value.shape == (1, tokens.shape[1])
        if value is not None and value.shape != tokens.shape and not one_row:
            raise ValueError(f"{name} of shape {tuple(value.shape)}; accepted: {tuple(tokens.shape)}, as input_ids")
        if value is not None:
            check_device(name, value, tokens.device, "input_ids")
    check_whole("labels", labels)


def check_device(name: str, value: Tensor, device: torch.device, other: str) -> None:
    """Raises ValueError for a tensor that is not where what it is used with is."""
    if value.device != device:
        raise ValueError(f"{name} on {str(value.device)!r}; accepted: {str(device)!r}, as {other}")


def check_whole(name: str, labels: Tensor) -> None:
    """Raises ValueError for labels that are no whole numbers."""
    if labels.is_floating_point():
        raise ValueError(f"{name} of {labels.dtype}; accepted: whole numbers")
