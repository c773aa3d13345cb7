"""From gradients to weights: the rules give directions, the optimizer owns clipping, lr, decay, scale and masters.

Parameters of one shape live in one stacked tensor (each parameter becomes a view of it), so momentum, orthogonalisation
and the update are a few large kernels a shape, not a few small ones a parameter. Models in a 16-bit dtype get a float32
master copy here; a float32 model is its own master.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from cggr_ray.compiling import compiled_on
from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.gauge import Gauge, Measure
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.partition import Named, by_shape, partition
from cggr_ray.optim.rule import LARGEST_RATE
from cggr_ray.optim.schedules import WSD, Linear
from cggr_ray.optim.split import split
from cggr_ray.optim.stack import REWARM_STEPS, Part, Stack, parts
from cggr_ray.progress import Progress
from cggr_ray.workers import ALONE, Workers


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
        if not max(self.matrix.lr, self.rest.lr) * self.lr_scale <= LARGEST_RATE:
            rates = f"{self.matrix.lr:g} and {self.rest.lr:g} with lr_scale = {self.lr_scale:g}"
            raise ValueError(f"learning rates {rates}; accepted: products of at most {LARGEST_RATE:.2g}")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm = {self.clip_norm}; accepted: a positive number (inf clips nothing)")

    def build(
        self,
        named: Iterable[Named],
        hidden: Iterable[str],
        device: torch.device,
        workers: Workers = ALONE,
        fused: Iterable[str] = (),
    ) -> StackedOptimizer:
        """`hidden`, `fused`: names of what is in the blocks, and of the matrices there that are three, see `split`."""
        return StackedOptimizer(self, list(named), list(hidden), device, workers, set(fused))


def apply_rule(
    stack: Stack | Part, gradient: Tensor, lr: Tensor, clip: Tensor, finite: Tensor, measure: Measure | None = None
) -> Tensor | None:
    """One update of a stack, or of a part. Plain tensor code, so it compiles into one graph a shape.

    Args:
        lr: learning rate of this step, 0-d. clip: factor on the gradient. finite: 1, or 0 to change nothing at all.
        measure: what to return of the update.
    """
    raw, gradient = gradient, torch.where(finite > 0, gradient.float() * clip, 0.0)
    direction = stack.rule.direction(gradient, stack.state, finite, stack.workers)
    stack.awake.add_(finite)
    rate = lr * finite
    measured = None
    if measure is not None:
        own = partial(own_update, stack, gradient, rate)
        measured = measure(raw.float(), stack.master, own)
    rate = rate * (stack.awake / REWARM_STEPS).clamp(max=1.0)
    if stack.rule.weight_decay:
        decay = rate * stack.rule.weight_decay
        stack.master.mul_(1 - decay * (direction * stack.master > 0) if stack.rule.cautious else 1 - decay)
    stack.master.sub_(direction * (rate * stack.scale))
    if stack.master is not stack.weights:
        stack.weights.copy_(stack.master)
    return measured


def own_update(stack: Stack | Part, gradient: Tensor, rate: Tensor) -> Tensor:
    return stack.rule.without_momentum(gradient, stack.state) * (rate * stack.scale)


class StackedOptimizer:
    """The running optimizer of a recipe. No host synchronisation in `step`."""

    def __init__(
        self,
        config: Optimizer,
        named: list[Named],
        hidden: list[str],
        device: torch.device,
        workers: Workers,
        fused: set[str],
    ) -> None:
        self.config = config
        matrix, rest = partition(named, hidden)
        whole = [one for one in matrix if one[0] not in fused]
        threefold = [one for one in matrix if one[0] in fused]
        self._matrix_rate, self._rest_rate = (torch.zeros((), device=device) for _ in range(2))
        # 0 in a rehearsal, whose updates change nothing.
        self._moves = torch.ones((), device=device)
        self.stacks: dict[str, Stack] = {}
        self._rates = dict[str, Tensor]()
        for group, rule, members, rate in (
            ("matrix", config.matrix, whole, self._matrix_rate),
            ("fused", config.matrix, threefold, self._matrix_rate),
            ("rest", config.rest, rest, self._rest_rate),
        ):
            for shape, same in by_shape(members).items():
                own, several = split(rule, shape) if group == "fused" else rule, parts(same)
                for part, some in enumerate(several):
                    name = f"{group}.{'x'.join(map(str, shape))}"
                    name = f"{name}.{part}" if part else name
                    self.stacks[name] = Stack(name, own, some, len(several) > 1, workers)
                    self._rates[name] = rate
        for stack in self.stacks.values() if config.project_early else ():
            stack.project_early()
        self._begun: int | None = None
        # Of the last step: the norm of every gradient, and of which parameters (by id) they are.
        self.norms, self.normed = torch.zeros(0), tuple[int, ...]()
        self._model_order = [id(p) for _, p in named]
        self._apply: Callable[..., Tensor | None] = compiled_on(device, apply_rule)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of them, as they stand in the stacks."""
        return [p for stack in self.stacks.values() for p in stack.parameters]

    def learning_rate(self, progress: Progress) -> float:
        """Learning rate of the hidden matrices, as logged."""
        return self.config.matrix.lr * self._multiplier(progress)

    def _multiplier(self, progress: Progress) -> float:
        return self.config.lr_scale * self.config.schedule.multiplier(progress)

    def begin(self, progress: Progress) -> None:
        """Before the backward pass of a step; `step` makes up for it where no gradient is accumulated or projected
        before."""
        self.begin_number(progress.step)

    def begin_number(self, step: int) -> None:
        """The same by the number of the step alone."""
        self._begun = step
        for stack in self.stacks.values():
            stack.begin(step)

    def rewind(self) -> None:
        """Back to where `begin` left it, before `step`: drops gradients and sums, undoes refreshed projections."""
        for stack in self.stacks.values():
            stack.rewind()

    def wake(self, parameters: Iterable[nn.Parameter], steps: int) -> None:
        """Before a step in which these parameters learn again after so many in which they did not."""
        woken = {id(p) for p in parameters}
        for stack in self.stacks.values():
            if which := [i for i, p in enumerate(stack.parameters) if id(p) in woken]:
                stack.wake(which, steps)

    def step(self, progress: Progress, gauge: Gauge | None = None) -> Tensor:
        """`update` at the schedule's learning rates."""
        multiplier = self._multiplier(progress)
        return self.update(progress.step, self.config.matrix.lr * multiplier, self.config.rest.lr * multiplier, gauge)

    @torch.no_grad()
    def update(self, step: int, matrix_lr: float, rest_lr: float, gauge: Gauge | None = None) -> Tensor:
        """Clips by the global norm, updates every parameter in place, drops the gradients; returns the norm, 0-d.

        A norm that is not finite changes nothing: no weight, no moment, no count, but for a refresh that was due, or a
        period of GaLore's correction that was to begin.
        """
        if self._begun != step:
            self.begin_number(step)
        self._begun = None
        self._matrix_rate.fill_(matrix_lr)
        self._rest_rate.fill_(rest_lr)
        learning = {name: stack for name, stack in self.stacks.items() if stack.learning}
        gradients = {name: stack.gradient() for name, stack in learning.items()}
        norm = self._norm(learning, gradients)
        clip = (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        finite = norm.isfinite() * self._moves
        for name, stack in learning.items():
            gradient, rate = gradients.pop(name), self._rates[name]
            for part, rows in stack.pieces():
                found = self._apply(part, gradient[rows], rate, clip, finite, gauge and gauge.measure)
                part.back()
                if gauge is not None and found is not None:
                    gauge.add(found)
        return norm

    def _norm(self, learning: dict[str, Stack], gradients: dict[str, Tensor]) -> Tensor:
        """Of all gradients; by one a parameter, in the model's order and in float32, as torch's own clipping does."""
        norms = [n for g in gradients.values() for n in torch._foreach_norm(g.unbind(), 2.0, dtype=torch.float32)]
        stacked = [id(stack.parameters[i]) for stack in learning.values() for i in stack.learning]
        place = {parameter: at for at, parameter in enumerate(stacked)}
        self.normed = tuple(i for i in self._model_order if i in place)
        self.norms = torch.stack([norms[place[i]] for i in self.normed])
        return torch.linalg.vector_norm(self.norms)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside, steps run as ever and change nothing: they take their gradients for ones that are not finite. What
        those change, of projected matrices, is put back."""
        projecting = [stack for stack in self.stacks.values() if stack.rule.projects(stack.state)]
        before = [(value, value.to("cpu", copy=True)) for stack in projecting for value in stack.state.values()]
        self._moves.zero_()
        try:
            yield
        finally:
            self._moves.fill_(1.0)
            for value, was in before:
                value.copy_(was)

    def accumulate(self) -> None:
        """Adds the gradients of one micro-batch of several to the float32 sums that `step` will use."""
        assert self._begun is not None, "the step has not begun"
        for stack in self.stacks.values():
            if stack.learning:
                stack.accumulate()

    def state_dict(self) -> dict[str, Tensor]:
        """Masters and states by stack. Weights of a float32 model are the model's, and are saved with it."""
        return {
            f"{name}.{key}": value
            for name, stack in self.stacks.items()
            for key, value in stack.tensors().items()
            if key != "weights"
        }

    def waiting(self) -> dict[str, list[int]]:
        """By stack, which of its parameters have a basis to come, in loops that rest and wake them as they like."""
        return {name: sorted(stack.woken) for name, stack in self.stacks.items() if stack.woken}

    def wait(self, waiting: Mapping[str, list[int]]) -> None:
        """Takes what `waiting` gave."""
        for name, stack in self.stacks.items():
            stack.woken = {*waiting.get(name, ())}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        mine = self.state_dict()
        if mine.keys() != state.keys():
            less, more = sorted(mine.keys() - state.keys())[:3], sorted(state.keys() - mine.keys())[:3]
            raise ValueError(f"optimizer state without {less}, with {more}; accepted: that of this optimizer")
        for key, value in mine.items():
            stored = state[key]
            if stored.shape != value.shape:
                shapes = tuple(stored.shape), tuple(value.shape)
                raise ValueError(f"optimizer state {key!r} of shape {shapes[0]}; accepted: {shapes[1]}")
            value.copy_(stored)
