"""`rank_classes` and `compact`: exact selection in rows. Triton on a GPU, plain PyTorch on a CPU; see `reference`.

Deterministic, and without a host synchronisation: what depends on the data stays on the device.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cggr_ray.kernels.select import reference


def implementation(device: torch.device) -> ModuleType:
    """The module that computes on a device."""
    if device.type == "cuda":
        from cggr_ray.kernels.select import kernel

        return kernel
    if device.type == "cpu":
        return reference
    raise ValueError(f"selection runs on cuda and cpu, not on {device}")


@torch.no_grad()
def rank_classes(keys_BT: Tensor, ranks_BJ: Tensor, groups_BT: Tensor | None = None, num_groups: int = 1) -> Tensor:
    """For every position the number of ranks_BJ that its own rank reaches, int32: class 0 of one rank k is the top k.

    Args:
        keys_BT: float32; the largest has rank 0, the lower index goes first among equals, NaN counts as -inf.
        ranks_BJ: integers, in any order; a rank of T or more is reached by nobody, one of 0 by everybody.
        groups_BT: integers from 0 to num_groups - 1 that come before the key: all of group 0, then all of group 1.
    """
    assert keys_BT.dtype == torch.float32, keys_BT.dtype
    with torch.cuda.device_of(keys_BT):
        return implementation(keys_BT.device).rank_classes(keys_BT, ranks_BJ, groups_BT, num_groups)


@torch.no_grad()
def compact(mask_BT: Tensor, slots: int, fill: int) -> Tensor:
    """Positions of the first `slots` true entries of each row, ascending, int64; slots left over hold `fill`."""
    assert mask_BT.dtype == torch.bool, mask_BT.dtype
    with torch.cuda.device_of(mask_BT):
        return implementation(mask_BT.device).compact(mask_BT, slots, fill)
