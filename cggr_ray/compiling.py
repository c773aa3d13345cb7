"""What is compiled and what is not, in one place: compiled on a GPU, eager elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# One function serves every layer, shape group and kept count of a race; each combination is a graph of its own, and
# torch goes eager past its default limit of eight.
RECOMPILE_LIMIT = 256


def compiled_on(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled with static shapes for a CUDA device, itself for any other."""
    if device.type != "cuda":
        return function
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(function, dynamic=False)


def never_eager() -> None:
    """From here on, in this process, more graphs than the limit are an error: where time is measured, code that goes
    eager with a warning would be measured too. Not for other people's loops, whose own code is compiled beside ours."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
