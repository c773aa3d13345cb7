"""What GaLore adds to its inner rule: into the bases and back for all matrices, and a refresh of every basis.

Timed without the compiler, a stack at a time, which is more than an update takes: there the way back is compiled with
what follows it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cggr_ray.benchmarks.timing import Timing, interleaved
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.optimizer import StackedOptimizer
from cggr_ray.optim.stack import Stack


def projection(
    optimizer: StackedOptimizer, gradients: Mapping[int, Tensor | None], rounds: int, device: torch.device
) -> dict[str, Timing]:
    """`galore_project`, of every step, and `galore_refresh`, of all bases, which take turns over `refresh_every` steps.

    Args:
        gradients: by id of the parameter.
    """
    projected = [
        (stack, torch.stack([g for p in stack.parameters if (g := gradients[id(p)]) is not None]))
        for stack in optimizer.stacks.values()
        if stack.rule.projects(stack.state)
    ]
    calls = {"galore_project": lambda: _project(projected), "galore_refresh": lambda: _refresh(projected)}
    return interleaved(calls, rounds, device)


def _project(projected: list[tuple[Stack, Tensor]]) -> None:
    for stack, gradient in projected:
        assert isinstance(stack.rule, GaLore)
        stack.rule.full_size(stack.rule.project(gradient, stack.state).float(), stack.state)


def _refresh(projected: list[tuple[Stack, Tensor]]) -> None:
    for stack, gradient in projected:
        for i in range(len(gradient)):
            stack.rule.refresh(gradient[i : i + 1], stack.state, slice(i, i + 1), False)
