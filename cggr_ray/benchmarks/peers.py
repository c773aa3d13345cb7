"""Other people's optimizers, beside ours where their packages are installed.

`torchao_adamw8bit` and `bitsandbytes_adamw8bit` for all parameters; `galore_torch` projects hidden matrices to RANK
whatever their shape, every REFRESH_EVERY updates, and is a plain AdamW for the rest. All of them work on the model's
own weights: in bf16 they have no float32 masters, and what galore_torch and torchao do not quantise is bf16 too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cggr_ray.benchmarks.rows import installed

Weights = list[nn.Parameter]
# From (hidden matrices, the rest) to optimizers that step one after the other.
Build = Callable[[Weights, Weights], list[torch.optim.Optimizer]]

LR = 1e-3
RANK, REFRESH_EVERY = 256, 200
# Factor on an update, as in the examples of galore_torch.
GALORE_SCALE = 0.25


def torchao_adamw8bit(matrix: Weights, rest: Weights) -> list[torch.optim.Optimizer]:
    from torchao.optim import AdamW8bit

    return [AdamW8bit(matrix + rest, lr=LR)]


def bitsandbytes_adamw8bit(matrix: Weights, rest: Weights) -> list[torch.optim.Optimizer]:
    from bitsandbytes.optim import AdamW8bit

    return [AdamW8bit(matrix + rest, lr=LR)]


def galore_torch(matrix: Weights, rest: Weights) -> list[torch.optim.Optimizer]:
    from galore_torch import GaLoreAdamW

    projection = {"rank": RANK, "update_proj_gap": REFRESH_EVERY, "scale": GALORE_SCALE, "proj_type": "std"}
    groups = [{"params": rest}, {"params": matrix, **projection}]
    return [GaLoreAdamW(groups, lr=LR, no_deprecation_warning=True)]


@dataclass(frozen=True)
class Peer:
    """How to build an optimizer, the packages without which it cannot be imported, and the parameters up to which it
    is timed."""

    packages: tuple[str, ...]
    build: Build
    timed_below: float = inf


PEERS = {
    "torchao_adamw8bit": Peer(("torchao",), torchao_adamw8bit),
    "bitsandbytes_adamw8bit": Peer(("bitsandbytes",), bitsandbytes_adamw8bit),
    # Its first update decomposes every matrix: minutes for a model of 1.5B.
    "galore_torch": Peer(("galore_torch", "bitsandbytes"), galore_torch, timed_below=10**9),
}


def present() -> dict[str, Peer]:
    return {name: peer for name, peer in PEERS.items() if all(map(installed, peer.packages))}


def missing() -> list[str]:
    return [name for name in PEERS if name not in present()]


def tensors_in(state: Any) -> list[Tensor]:
    """Every plain tensor behind an optimizer's state: inside dicts, objects (GaLore's projector), tensor subclasses."""
    if is_traceable_wrapper_subclass(state):
        names, _ = state.__tensor_flatten__()
        inner = [getattr(state, name) for name in names]
    elif isinstance(state, Tensor):
        return [state]
    else:
        inner = list((state if isinstance(state, dict) else getattr(state, "__dict__", {})).values())
    return [tensor for part in inner for tensor in tensors_in(part)]
