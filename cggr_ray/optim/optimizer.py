"""From gradients to weights: the rules give directions, the optimizer owns clipping, lr, decay, scale and masters.

Parameters of one shape live in one stacked tensor (each parameter becomes a view of it), so momentum, orthogonalisation
and the update are a few large kernels a shape, not a few small ones a parameter. Models in a 16-bit dtype get a float32
master copy here; a float32 model is its own master.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cggr_ray.compiling import compiled_on
from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.partition import Named, by_shape, partition
from cggr_ray.optim.rule import Rule
from cggr_ray.optim.schedules import WSD, Linear
from cggr_ray.progress import Progress

# Values of a stack at most, so that what is formed in full size on the way of an update stays small beside the model.
LARGEST_STACK = 2**28


@dataclass(frozen=True)
class Optimizer:
    """How gradients become updates: one rule for hidden matrices, one for the rest, a clip and a schedule.

    `lr_scale` multiplies the rates of both rules: what a race tunes, whatever the rules. `project_early`: a gradient
    that is projected (GaLore) is freed inside the backward pass, as soon as it is; all projected gradients together are
    what is left of those matrices' gradients. The norm is that of what is left.
    """

    IS_PART: ClassVar[bool] = True

    matrix: Muon | AdamW | GaLore = field(default_factory=Muon)
    rest: AdamW = field(default_factory=AdamW)
    schedule: Linear | WSD = field(default_factory=WSD)
    clip_norm: float = 1.0
    project_early: bool = False
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.project_early and not isinstance(self.matrix, GaLore):
            raise ValueError("project_early with a rule that projects nothing; accepted: with matrix = GaLore")
        if self.project_early and isinstance(self.matrix, GaLore) and self.matrix.full_rank:
            raise ValueError(f"project_early with full_rank = {self.matrix.full_rank}, which needs gradients whole; "
                             "accepted: one of the two")  # fmt: skip
        if not 0 < self.lr_scale < math.inf:
            raise ValueError(f"lr_scale = {self.lr_scale}; accepted: a positive number")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm = {self.clip_norm}; accepted: a positive number (inf clips nothing)")

    def build(self, named: Iterable[Named], hidden: Iterable[str], device: torch.device) -> StackedOptimizer:
        return StackedOptimizer(self, list(named), list(hidden), device)


class Stack:
    """All parameters of one shape under one rule: weights, float32 master, state, as tensors of shape (N, *shape)."""

    def __init__(self, name: str, rule: Rule, named: list[Named]) -> None:
        self.name, self.rule, self.parameters = name, rule, [p for _, p in named]
        shape = self.parameters[0].shape
        self.weights = torch.stack([p.detach() for p in self.parameters])
        for parameter, view in zip(self.parameters, self.weights.unbind(), strict=True):
            parameter.data = view
        self.master = self.weights if self.weights.dtype == torch.float32 else self.weights.float()
        self.state = rule.init_state(self.master)
        self._first, self._due, self._arrived = False, range(0), [0] * len(self.parameters)
        self.scale = rule.shape_scale(shape[0], shape[1]) if len(shape) == 2 else 1.0
        self._sum: Tensor | None = None
        self._early = False

    def begin(self, step: int) -> None:
        """Before the first gradient of a step."""
        self.rule.begin(self.state, len(self.parameters), step, self.name)
        self._first, self._due = step == 0, self.rule.due(len(self.parameters), step)
        self._sum, self._arrived = None, [0] * len(self.parameters)

    def project_early(self) -> None:
        """From now on, inside the backward pass; where the rule projects this stack."""
        self._early = self.rule.projects(self.state)
        # A hook that held the stack would keep both alive for ever: no garbage collector sees what a hook refers to.
        project = weakref.WeakMethod(self._project_one)
        for i, parameter in enumerate(self.parameters if self._early else []):
            parameter.register_post_accumulate_grad_hook(partial(call_if_alive, project, i))

    def accumulate(self) -> None:
        """Moves the parameters' gradients into a float32 sum: one micro-batch of several."""
        if not self._early:
            gradient = self._take()
            self._sum = gradient.float() if self._sum is None else self._sum.add_(gradient)

    def gradient(self) -> Tensor:
        """What the rule uses of the step's gradients, stacked; the parameters' own are gone afterwards."""
        assert len(set(self._arrived)) == 1, "a parameter of an active layer has no gradient"
        gradient, self._sum = self._take() if self._sum is None else self._sum, None
        return gradient

    def _take(self) -> Tensor:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        assert len(gradients) == len(self.parameters), "a parameter of an active layer has no gradient"
        for parameter in self.parameters:
            parameter.grad = None
        stacked = torch.stack(gradients) if len(gradients) > 1 else gradients[0].unsqueeze(0)
        for i in self._due if self.rule.projects(self.state) else ():
            # One by one, so that no more than one is there in float32.
            self.rule.refresh(stacked[i : i + 1], self.state, slice(i, i + 1), self._first)
        self._due = range(0)
        return self.rule.project(stacked, self.state)

    @torch.no_grad()
    def _project_one(self, i: int, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.unsqueeze(0), None
        which = slice(i, i + 1)
        if i in self._due and not self._arrived[i]:
            self.rule.refresh(gradient, self.state, which, self._first)
        self._arrived[i] += 1
        found = self.rule.project(gradient, self.state, which)
        if self._sum is None:
            self._sum = torch.zeros(len(self.parameters), *found.shape[1:], device=found.device)
        self._sum[i] += found[0]

    @property
    def projected(self) -> Tensor | None:
        """What there is of this step's gradients beside the parameters' own: sums of several, or projected ones."""
        return self._sum

    def tensors(self) -> dict[str, Tensor]:
        masters = {} if self.master is self.weights else {"master": self.master}
        return {"weights": self.weights, **masters, **self.state}


def parts(same: list[Named]) -> list[list[Named]]:
    """Parameters of one shape, in stacks of LARGEST_STACK values at most."""
    most = max(1, LARGEST_STACK // same[0][1].numel())
    return [same[at : at + most] for at in range(0, len(same), most)]


def call_if_alive(method: weakref.WeakMethod[Callable[..., None]], *args: Any) -> None:
    """What a hook calls: nothing any more where the optimizer is gone and the model is not."""
    alive = method()
    if alive is not None:
        alive(*args)


def apply_rule(stack: Stack, gradient: Tensor, lr: Tensor, clip: Tensor, finite: Tensor) -> None:
    """One update of a stack. Plain tensor code, so it compiles into one graph a shape.

    Args:
        lr: learning rate of this step, 0-d. clip: factor on the gradient. finite: 1, or 0 to change nothing at all.
    """
    gradient = torch.where(finite > 0, gradient.float() * clip, 0.0)
    direction = stack.rule.direction(gradient, stack.state, finite)
    rate = lr * finite
    if stack.rule.weight_decay:
        decay = rate * stack.rule.weight_decay
        stack.master.mul_(1 - decay * (direction * stack.master > 0) if stack.rule.cautious else 1 - decay)
    stack.master.sub_(direction * (rate * stack.scale))
    if stack.master is not stack.weights:
        stack.weights.copy_(stack.master)


class StackedOptimizer:
    """The running optimizer of a recipe. No host synchronisation in `step`."""

    def __init__(self, config: Optimizer, named: list[Named], hidden: list[str], device: torch.device) -> None:
        self.config = config
        matrix, rest = partition(named, hidden)
        self.stacks: dict[str, Stack] = {}
        for group, rule, members in (("matrix", config.matrix, matrix), ("rest", config.rest, rest)):
            for shape, same in by_shape(members).items():
                for part, some in enumerate(parts(same)):
                    name = f"{group}.{'x'.join(map(str, shape))}"
                    name = f"{name}.{part}" if part else name
                    self.stacks[name] = Stack(name, rule, some)
        for stack in self.stacks.values() if config.project_early else ():
            stack.project_early()
        self._begun: int | None = None
        stacked = [id(p) for stack in self.stacks.values() for p in stack.parameters]
        self._model_order = [stacked.index(id(p)) for _, p in named]
        self._rates = {id(rule): torch.zeros((), device=device) for rule in (config.matrix, config.rest)}
        self._apply: Callable[..., None] = compiled_on(device, apply_rule)

    def learning_rate(self, progress: Progress) -> float:
        """Learning rate of the hidden matrices, as logged."""
        return self.config.matrix.lr * self._multiplier(progress)

    def _multiplier(self, progress: Progress) -> float:
        return self.config.lr_scale * self.config.schedule.multiplier(progress)

    def begin(self, progress: Progress) -> None:
        """Before the backward pass of a step; `step` makes up for it where no gradient is accumulated or projected
        before."""
        self._begun = progress.step
        for stack in self.stacks.values():
            stack.begin(progress.step)

    @torch.no_grad()
    def step(self, progress: Progress) -> Tensor:
        """Clips by the global norm, updates every parameter in place, drops the gradients; returns the norm, 0-d.

        A norm that is not finite changes nothing: no weight, no moment, no count, but for a refresh that was due, or a
        period of GaLore's correction that was to begin.
        """
        if self._begun != progress.step:
            self.begin(progress)
        self._begun = None
        multiplier = self._multiplier(progress)
        for rule in (self.config.matrix, self.config.rest):
            self._rates[id(rule)].fill_(rule.lr * multiplier)
        gradients = {name: stack.gradient() for name, stack in self.stacks.items()}
        # One a parameter, in the model's order and in float32, so that torch's own clipping would find the same there.
        norms = [n for g in gradients.values() for n in torch._foreach_norm(g.unbind(), 2.0, dtype=torch.float32)]
        norm = torch.linalg.vector_norm(torch.stack([norms[i] for i in self._model_order]))
        clip = (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        finite = norm.isfinite().float()
        for name, stack in self.stacks.items():
            self._apply(stack, gradients.pop(name), self._rates[id(stack.rule)], clip, finite)
        return norm

    def accumulate(self) -> None:
        """Adds the gradients of one micro-batch of several to the float32 sums that `step` will use."""
        assert self._begun is not None, "the step has not begun"
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
