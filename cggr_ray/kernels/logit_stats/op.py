"""`logit_stats`: the statistics of `head_stats` from logits. Triton on a GPU, plain PyTorch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_ray.kernels.head_stats.op import check_dtype
from cggr_ray.kernels.head_stats.reference import HeadStats
from cggr_ray.kernels.logit_stats.reference import logit_stats_reference


@torch.no_grad()
def logit_stats(logits_NV: Tensor, labels_N: Tensor) -> HeadStats:
    """Statistics of every row; see `head_stats.reference`. No gradient. On a GPU every logit is read once.

    Args:
        logits_NV: bf16, fp16 or float32, on a CPU also float64, of which the statistics are float64; rows may be
            strided. -inf is a token that cannot come.
        labels_N: next token, -100 where there is none.

    Raises:
        ValueError: shapes, a dtype or devices that do not fit.
    """
    if logits_NV.ndim != 2 or labels_N.shape != logits_NV.shape[:1]:
        raise ValueError(f"logits {tuple(logits_NV.shape)}, labels {tuple(labels_N.shape)}; accepted: (N, V), (N,)")
    if logits_NV.device != labels_N.device:
        raise ValueError(f"devices {logits_NV.device}, {labels_N.device}; accepted: one for both")
    check_dtype(logits_NV)
    if logits_NV.is_cuda:
        from cggr_ray.kernels.logit_stats.kernel import launch_logit_stats

        return launch_logit_stats(logits_NV, labels_N)
    return logit_stats_reference(logits_NV, labels_N)
