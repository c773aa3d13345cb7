"""What an optimizer rule declares: from a stack of gradients and its state to a stack of directions.

Shapes: N parameters of one shape in a stack, n of them at a time.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cggr_ray.optim.state_formats import State
from cggr_ray.workers import ALONE, Workers

# Rates are float32 on the device.
LARGEST_RATE = torch.finfo(torch.float32).max


class Rule:
    """The optimizer owns learning rate, decay and scale; a rule owns its state, which `direction` updates in place and
    leaves as it is in a step that is not finite. What is here is a rule that uses gradients as they come."""

    ELEMENTWISE: ClassVar[bool] = False
    """Whether each value of a direction depends on the gradients of that value alone."""

    lr: float
    weight_decay: float
    cautious: bool = False

    def init_state(self, weights: Tensor) -> State:
        """For float32 weights of shape (N, *shape); may not keep them."""
        raise NotImplementedError

    def of_matrices(self, key: str) -> bool:
        """Whether what `init_state` calls so has one entry for each of the N parameters."""
        return True

    def direction(self, grad: Tensor, state: State, finite: Tensor, workers: Workers = ALONE) -> Tensor:
        """D of shape (N, *shape), float32, of what `project` made of the gradients. Compiled on a GPU.

        Args:
            finite: 0-d, 1 or 0; where it is 0 the gradients are 0 and no bit of the state may change.
            workers: those that ask the same, and may share the work.
        """
        raise NotImplementedError

    def wake(self, state: State, steps: int) -> None:
        """Before parameters learn again that have not for so many steps: ages their averages."""

    def without_momentum(self, grad: Tensor, state: State) -> Tensor:
        """What `direction` would be of these gradients alone. Asked for after it, in the same step."""
        raise NotImplementedError

    def shape_scale(self, rows: int, columns: int) -> float:
        """What multiplies the learning rate of a matrix."""
        return 1.0

    def begin(self, state: State, number: int, step: int, name: str) -> None:
        """Before the first gradient of a step of a stack of so many parameters. `name`: of the stack."""

    def projects(self, state: State) -> bool:
        """Whether `project` makes something smaller of a gradient."""
        return False

    def due(self, number: int, step: int) -> range:
        """Which of so many parameters `refresh` wants to see at a step."""
        return range(0)

    def refresh(self, grad_n: Tensor, state: State, which: slice, first: bool) -> None:
        """Adapts the projection to the gradients of some parameters. `first`: it says nothing of them so far."""

    def project(self, grad_n: Tensor, state: State, which: slice = slice(None)) -> Tensor:
        """What the rule uses of a gradient. Linear, so that the parts of several micro-batches may be added."""
        return grad_n


class Around(Rule):
    """A rule around another: learning rate, decay and caution are the inner one's."""

    rule: Rule

    @property
    def lr(self) -> float:  # type: ignore[override]
        return self.rule.lr

    @property
    def weight_decay(self) -> float:  # type: ignore[override]
        return self.rule.weight_decay

    @property
    def cautious(self) -> bool:  # type: ignore[override]
        return self.rule.cautious
