"""`head_stats`: scores' raw material from hidden states. Triton on a GPU, plain PyTorch in chunks of rows elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_ray.kernels.head_stats.reference import HeadStats, chunk_stats, soft_capped
from cggr_ray.kernels.selected_ce.op import chunks

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.no_grad()
def head_stats(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, softcap: float | None = None) -> HeadStats:
    """Statistics of every row; see `reference`. No gradient.

    On a GPU no logits are kept, they are not rounded to the dtype of the operands, and nothing waits for the device.
    Elsewhere one chunk of logits exists at a time, in the dtype of the operands.

    Args:
        hidden_ND: final hidden states. head_VD: the head's weight, of the same dtype (bf16, fp16 or float32; on a CPU
            also float64, of which the statistics are float64).
        labels_N: next token, -100 where there is none. softcap: c of c tanh(z / c) on the logits.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a softcap that is not positive.
    """
    check_operands(hidden_ND, head_VD, labels_N, softcap)
    if hidden_ND.is_cuda:
        from cggr_ray.kernels.head_stats.kernel import launch_head_stats

        return launch_head_stats(hidden_ND, head_VD, labels_N, softcap)
    parts = list(chunks(hidden_ND, head_VD)) or [slice(0, 0)]
    found = [chunk_stats(soft_capped(hidden_ND[part] @ head_VD.mT, softcap), labels_N[part]) for part in parts]
    return HeadStats(*(torch.cat(values) for values in zip(*found, strict=True)))


def check_operands(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, softcap: float | None) -> None:
    """Raises ValueError for what does not fit together."""
    fits = hidden_ND.ndim == head_VD.ndim == 2 and hidden_ND.shape[1] == head_VD.shape[1]
    if not fits or labels_N.shape != hidden_ND.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden_ND, head_VD, labels_N))
        raise ValueError(f"hidden, head, labels of shapes {shapes}; accepted: (N, D), (V, D), (N,)")
    if hidden_ND.dtype != head_VD.dtype:
        raise ValueError(f"hidden states {hidden_ND.dtype}, head {head_VD.dtype}; accepted: one dtype for both")
    check_dtype(hidden_ND)
    if not hidden_ND.device == head_VD.device == labels_N.device:
        raise ValueError(f"devices {hidden_ND.device}, {head_VD.device}, {labels_N.device}; accepted: one for all")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap {softcap!r}; accepted: a positive number, or None")


def check_dtype(values: Tensor) -> None:
    """Raises ValueError for values that the kernels do not read; a CPU reads float64 too."""
    if values.dtype not in DTYPES and not (values.dtype == torch.float64 and values.device.type == "cpu"):
        raise ValueError(f"{values.dtype} on {values.device.type!r}; accepted: bfloat16, float16, float32, "
                         "and float64 on a CPU")  # fmt: skip
