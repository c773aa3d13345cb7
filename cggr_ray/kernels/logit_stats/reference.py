"""The statistics of `head_stats` where the logits exist already; `chunk_stats` there is the definition of both.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_ray.kernels.head_stats.reference import HeadStats, chunk_stats

# What one chunk of logits takes in float32: a few of them exist at a time, and stay in a CPU's cache.
CHUNK_BYTES = 1 << 22


def logit_stats_reference(logits_NV: Tensor, labels_N: Tensor) -> HeadStats:
    """Statistics of every row, a chunk of rows at a time."""
    size = max(1, CHUNK_BYTES // (4 * logits_NV.shape[1]))
    parts = [chunk_stats(*part) for part in zip(logits_NV.split(size), labels_N.split(size), strict=True)]
    return HeadStats(*(torch.cat(values) for values in zip(*parts, strict=True)))
