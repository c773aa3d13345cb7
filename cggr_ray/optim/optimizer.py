"""From gradients to weights: the rules give directions, the optimizer owns clipping, lr, decay, scale and masters.

Parameters of one shape live in one stacked tensor (each parameter becomes a view of it), so momentum, orthogonalisation
and the update are a few large kernels a shape, not a few small ones a parameter. Models in a 16-bit dtype get a float32
master copy here; a float32 model is its own master.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from cggr_ray.compiling import compiled_on
from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.partition import Named, by_shape, partition
from cggr_ray.optim.schedules import WSD, Linear
from cggr_ray.progress import Progress


class Rule(Protocol):
    """What an optimizer rule declares. `direction` updates its state in place and must ignore a step not finite."""

    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    def init_state(self, weights: Tensor) -> dict[str, Tensor]: ...
    def direction(self, grad: Tensor, state: dict[str, Tensor], finite: Tensor) -> Tensor: ...
    def shape_scale(self, rows: int, columns: int) -> float: ...


@dataclass(frozen=True)
class Optimizer:
    """How gradients become updates: one rule for hidden matrices, one for the rest, a clip and a schedule."""

    IS_PART: ClassVar[bool] = True

    matrix: Muon | AdamW = field(default_factory=Muon)
    rest: AdamW = field(default_factory=AdamW)
    schedule: Linear | WSD = field(default_factory=WSD)
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm = {self.clip_norm}; accepted: a positive number (inf clips nothing)")

    def build(self, named: Iterable[Named], hidden: Iterable[str], device: torch.device) -> StackedOptimizer:
        return StackedOptimizer(self, list(named), list(hidden), device)


class Stack:
    """All parameters of one shape under one rule: weights, float32 master, state, as tensors of shape (N, *shape)."""

    def __init__(self, rule: Rule, named: list[Named]) -> None:
        self.rule, self.parameters = rule, [p for _, p in named]
        shape = self.parameters[0].shape
        self.weights = torch.stack([p.detach() for p in self.parameters])
        for parameter, view in zip(self.parameters, self.weights.unbind(), strict=True):
            parameter.data = view
        self.master = self.weights if self.weights.dtype == torch.float32 else self.weights.float()
        self.state = rule.init_state(self.master)
        self.scale = rule.shape_scale(shape[0], shape[1]) if len(shape) == 2 else 1.0
        self._sum: Tensor | None = None

    def accumulate(self) -> None:
        """Moves the parameters' gradients into a float32 sum: one micro-batch of several."""
        gradient = self._take()
        self._sum = gradient.float() if self._sum is None else self._sum.add_(gradient)

    def gradient(self) -> Tensor:
        """The stacked gradient of the step, of shape (N, *shape); the parameters' own are gone afterwards."""
        gradient, self._sum = self._take() if self._sum is None else self._sum, None
        return gradient

    def _take(self) -> Tensor:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        assert len(gradients) == len(self.parameters), "a parameter of an active layer has no gradient"
        for parameter in self.parameters:
            parameter.grad = None
        return torch.stack(gradients) if len(gradients) > 1 else gradients[0].unsqueeze(0)

    def tensors(self) -> dict[str, Tensor]:
        masters = {} if self.master is self.weights else {"master": self.master}
        return {"weights": self.weights, **masters, **self.state}


def apply_rule(stack: Stack, gradient: Tensor, lr: Tensor, clip: Tensor, finite: Tensor) -> Tensor:
    """One update of a stack; returns the direction. Plain tensor code, so it compiles into one graph a shape.

    Args:
        lr: learning rate of this step, 0-d. clip: factor on the gradient. finite: 1, or 0 to change nothing at all.
    """
    gradient = torch.where(finite > 0, gradient.float() * clip, 0.0)
    direction = stack.rule.direction(gradient, stack.state, finite)
    rate = lr * finite
    if stack.rule.weight_decay:
        stack.master.mul_(1 - rate * stack.rule.weight_decay)
    stack.master.sub_(direction * (rate * stack.scale))
    if stack.master is not stack.weights:
        stack.weights.copy_(stack.master)
    return direction


class StackedOptimizer:
    """The running optimizer of a recipe. No host synchronisation in `step`."""

    def __init__(self, config: Optimizer, named: list[Named], hidden: list[str], device: torch.device) -> None:
        self.config = config
        matrix, rest = partition(named, hidden)
        self.stacks: dict[str, Stack] = {}
        for group, rule, members in (("matrix", config.matrix, matrix), ("rest", config.rest, rest)):
            for shape, same in by_shape(members).items():
                self.stacks[f"{group}.{'x'.join(map(str, shape))}"] = Stack(rule, same)
        stacked = [id(p) for stack in self.stacks.values() for p in stack.parameters]
        self._model_order = [stacked.index(id(p)) for _, p in named]
        self._rates = {id(rule): torch.zeros((), device=device) for rule in (config.matrix, config.rest)}
        self._apply: Callable[..., Tensor] = compiled_on(device, apply_rule)

    def learning_rate(self, progress: Progress) -> float:
        """Learning rate of the hidden matrices, as logged."""
        return self.config.matrix.lr * self.config.schedule.multiplier(progress)

    @torch.no_grad()
    def step(self, progress: Progress) -> Tensor:
        """Clips by the global norm, updates every parameter in place, drops the gradients; returns the norm, 0-d.

        A norm that is not finite changes nothing: no weight, no moment, no count.
        """
        multiplier = self.config.schedule.multiplier(progress)
        for rule in (self.config.matrix, self.config.rest):
            self._rates[id(rule)].fill_(rule.lr * multiplier)
        gradients = [stack.gradient() for stack in self.stacks.values()]
        single = [g for gradient in gradients for g in gradient.unbind()]
        # In the model's order, so that the norm is the one torch's own clipping would find.
        norm = nn.utils.get_total_norm([single[i] for i in self._model_order]).float()
        clip = (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        finite = norm.isfinite().float()
        for stack, gradient in zip(self.stacks.values(), gradients, strict=True):
            self._apply(stack, gradient, self._rates[id(stack.rule)], clip, finite)
        return norm

    def accumulate(self) -> None:
        """Adds the gradients of one micro-batch of several to the float32 sums that `step` will use."""
        for stack in self.stacks.values():
            stack.accumulate()

    def state_dict(self) -> dict[str, Tensor]:
        """Masters and states by stack. Weights of a float32 model are the model's, and are saved with it."""
        return {
            f"{name}.{key}": value
            for name, stack in self.stacks.items()
            for key, value in stack.tensors().items()
            if key != "weights"
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        mine = self.state_dict()
        if mine.keys() != state.keys():
            raise ValueError(f"optimizer state holds {sorted(state)[:3]}..., expected {sorted(mine)[:3]}...")
        for key, value in mine.items():
            value.copy_(state[key])
