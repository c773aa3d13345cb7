"""`head_stats`: scores' raw material from hidden states, chunk by chunk; compiled on a GPU, eager elsewhere."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from cggr_ray.compiling import compiled_on
from cggr_ray.kernels.head_stats.reference import HeadStats, chunk_stats
from cggr_ray.kernels.selected_ce.op import chunks


@cache
def _on(device: torch.device) -> Any:
    return compiled_on(device, chunk_stats)


@torch.no_grad()
def head_stats(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> HeadStats:
    """Statistics of every row; see `reference`. Keeps one chunk of logits at a time, and no gradient."""
    stats = _on(hidden_ND.device)
    parts = chunks(hidden_ND, head_VD)
    found = [stats(hidden_ND[part] @ head_VD.mT, labels_N[part]) for part in parts]
    return HeadStats(*(torch.cat(values) for values in zip(*found, strict=True)))
