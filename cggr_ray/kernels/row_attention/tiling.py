"""How the kernels of `row_attention` are cut into tiles, by the width of a head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """How a kernel is cut up: queries and keys a tile, warps a program, tiles in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


# By padded width of a head, in 16 bits. Narrower heads use the first entry that holds them.
FORWARD = {64: Launch(64, 64, 4, 3), 128: Launch(64, 64, 4, 3), 256: Launch(64, 32, 4, 3)}
QUERIES = {64: Launch(64, 64, 4, 3), 128: Launch(64, 64, 4, 2), 256: Launch(64, 32, 4, 3)}
KEYS = {64: Launch(64, 64, 4, 3), 128: Launch(32, 64, 4, 3), 256: Launch(32, 32, 4, 2)}
# Products in float32 do not use the tensor cores, and larger tiles than these would not fit in the registers.
FLOAT32 = {128: Launch(32, 32, 8, 1), 256: Launch(16, 16, 8, 1)}


def launch_for(table: dict[int, Launch], head: Tensor) -> Launch:
    """The entry for heads as wide as the last dimension of a tensor."""
    if head.dtype == torch.float32:
        table = FLOAT32
    for width, launch in table.items():
        if head.shape[-1] <= width:
            return launch
    raise ValueError(f"a head of {head.shape[-1]} is too wide for attention of kept queries, at most {max(table)}")
