"""What GaLore adds to its inner rule: into the bases and back for all matrices, and a refresh of every basis.

Timed without the compiler, a stack at a time: products with the bases, and what makes bf16 of these.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cggr_ray.benchmarks.timing import Timing, interleaved
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.optimizer import Optimizer, StackedOptimizer
from cggr_ray.optim.state_formats import State

# The rule and the state of a stack, and its gradients.
Projected = tuple[GaLore, State, Tensor]


def projection(
    optimizer: StackedOptimizer, gradients: Mapping[int, Tensor | None], rounds: int, device: torch.device
) -> dict[str, Timing]:
    """`galore_project`, of every step, and `galore_refresh`, of all bases, which take turns over `refresh_every` steps.

    Args:
        gradients: by id of the parameter.
    """
    projected = [
        (stack.rule, stack.state, torch.stack([g for p in stack.parameters if (g := gradients[id(p)]) is not None]))
        for stack in optimizer.stacks.values()
        if isinstance(stack.rule, GaLore) and stack.rule.projects(stack.state)
    ]
    calls = {"galore_project": lambda: _project(projected), "galore_refresh": lambda: _refresh(projected)}
    return interleaved(calls, rounds, device)


def spread(apart: Mapping[str, Timing], config: Optimizer) -> Timing:
    """Of an average step: everything there and back, and a part of a refresh of all."""
    assert isinstance(config.matrix, GaLore)
    there, refresh, steps = apart["galore_project"], apart["galore_refresh"], config.matrix.refresh_every
    return Timing(
        p20=there.p20 + refresh.p20 / steps,
        p50=there.p50 + refresh.p50 / steps,
        p80=there.p80 + refresh.p80 / steps,
        peak_mib=max(there.peak_mib, refresh.peak_mib),
    )


def _project(projected: list[Projected]) -> None:
    for rule, state, gradient in projected:
        rule.full_size(rule.project(gradient, state), state)


def _refresh(projected: list[Projected]) -> None:
    for rule, state, gradient in projected:
        for i in range(len(gradient)):
            rule.refresh(gradient[i : i + 1], state, slice(i, i + 1), False)
