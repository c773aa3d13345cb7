"""Parameters of one shape as one tensor: what a rule updates at once, all of them or those that learn in a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cggr_ray.optim.partition import Named
from cggr_ray.optim.rule import Rule
from cggr_ray.optim.state_formats import State
from cggr_ray.transfer import to_device, to_host
from cggr_ray.workers import ALONE, Workers

# Steps over which the learning rate of a parameter that learns again rises to that of the others.
REWARM_STEPS = 10
# Values of a stack at most, so that what is formed in full size on the way of an update stays small beside the model.
LARGEST_STACK = 2**28


class Stack:
    """All parameters of one shape under one rule: weights, float32 master, state, as tensors of shape (N, *shape).

    A parameter that requires no gradient rests: nothing of it moves, and nothing of its state.
    """

    def __init__(
        self, name: str, rule: Rule, named: list[Named], one_of_several: bool = False, workers: Workers = ALONE
    ) -> None:
        self._one_of_several, self.workers = one_of_several, workers
        self.name, self.rule, self.parameters = name, rule, [p for _, p in named]
        shape = self.parameters[0].shape
        self.weights = torch.stack([p.detach() for p in self.parameters])
        for parameter, view in zip(self.parameters, self.weights.unbind(), strict=True):
            parameter.data = view
        self.master = self.weights if self.weights.dtype == torch.float32 else self.weights.float()
        self.state = rule.init_state(self.master)
        self.awake = torch.full((len(named), *[1] * len(shape)), float(REWARM_STEPS), device=self.weights.device)
        # Those whose basis is due in the first step in which they learn.
        self.learning, self.woken = list(range(len(named))), set[int]()
        # Whose basis is refreshed in this step; true where the old one is worth nothing, as at the first step.
        self._due: dict[int, bool] = {}
        # Of the bases that this step has refreshed before its update: what was due, and, on the host, the state before.
        self._refreshed: dict[int, tuple[bool, State]] = {}
        self._arrived = [0] * len(named)
        self.scale = rule.shape_scale(shape[0], shape[1]) if len(shape) == 2 else 1.0
        self._sum: Tensor | None = None
        self._early = False

    def begin(self, step: int) -> None:
        """Before the first gradient of a step."""
        self.rule.begin(self.state, len(self.parameters), step, self.name)
        self.learning = [i for i, p in enumerate(self.parameters) if p.requires_grad]
        due = {*self.rule.due(len(self.parameters), step), *self.woken}
        self._due = {i: step == 0 or i in self.woken for i in self.learning if i in due}
        self.woken = ({*range(len(self.parameters))} if step == 0 else self.woken) - {*self.learning}
        self._sum, self._arrived, self._refreshed = None, [0] * len(self.parameters), {}

    def rest_without_gradient(self) -> None:
        """After `begin`, in loops where a parameter may have none: it rests in this step, and what its basis lacks is
        due when it has one."""
        self.learning = [i for i in self.learning if self.parameters[i].grad is not None]
        self.woken |= {i for i, first in self._due.items() if first} - {*self.learning}

    @torch.no_grad()
    def read_again(self, which: list[int]) -> None:
        """Takes weights that somebody else has written over; masters of values that are as they were stay."""
        if self.master is not self.weights:
            for i in which:
                same = self.master[i].to(self.weights.dtype) == self.weights[i]
                self.master[i] = torch.where(same, self.master[i], self.weights[i].float())

    @torch.no_grad()
    def rewind(self) -> None:
        """Back to where `begin` left it, before the update."""
        for parameter in self.parameters:
            parameter.grad = None
        for i, (first, before) in self._refreshed.items():
            self._due[i] = first
            for key, value in before.items():
                self.state[key][i : i + 1].copy_(value, non_blocking=True)
        self._sum, self._arrived, self._refreshed = None, [0] * len(self.parameters), {}

    def wake(self, which: list[int], steps: int) -> None:
        """Before a step in which these parameters learn again after so many in which they did not."""
        part = Part(self, which)
        self.rule.wake(part.state, steps)
        part.awake.zero_()
        part.back()
        self.woken |= {*which}

    def pieces(self) -> list[tuple[Stack | Part, slice]]:
        """What learns in this step, and which of its gradients: in one piece, but for scattered parameters of a shape
        that fills several stacks. How many of them fall into a stack is up to chance, and every number would be
        compiled: they learn one by one."""
        if self._one_of_several and not neighbours(self.learning):
            return [(Part(self, [i]), slice(at, at + 1)) for at, i in enumerate(self.learning)]
        return [(self._learners(), slice(None))]

    def _learners(self) -> Stack | Part:
        return self if len(self.learning) == len(self.parameters) else Part(self, self.learning)

    def back(self) -> None:
        """What `Part` has to do after an update: of a whole stack, nothing."""

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
            # Bases follow the gradient of all workers, so that theirs are added up before they are projected.
            if self.workers.size == 1:
                gradient = self._project(gradient, rewinds=True)
            self._sum = gradient.float() if self._sum is None else self._sum.add_(gradient)

    def gradient(self) -> Tensor:
        """What the rule uses of the step's gradients, stacked; the parameters' own are gone afterwards.

        Those of several workers are added up here, a stack at a time, in the dtype that they have: the model's, or
        float32 after several micro-batches.
        """
        assert len({self._arrived[i] for i in self.learning}) == 1, "a parameter of an active layer has no gradient"
        whole = self._sum is None or self.workers.size > 1
        gradient, self._sum = self._take() if self._sum is None else self._sum, None
        if whole:
            self.workers.sum(gradient)
            gradient = self._project(gradient, rewinds=False)
        self._refreshed = {}
        return gradient[rows_of(self.learning, gradient.device)] if self._early else gradient

    def _take(self) -> Tensor:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        assert len(gradients) == len(self.learning), "a parameter of an active layer has no gradient"
        for parameter in self.parameters:
            parameter.grad = None
        return torch.stack(gradients) if len(gradients) > 1 else gradients[0].unsqueeze(0)

    def _project(self, stacked: Tensor, rewinds: bool) -> Tensor:
        if not self.rule.projects(self.state):
            return stacked
        for at, i in enumerate(self.learning):
            if i in self._due:
                # One by one, so that no more than one is there in float32.
                self._refresh(i, stacked[at : at + 1], rewinds)
        self._due = {}
        return self.rule.project(stacked, self._learners().state)

    def _refresh(self, i: int, gradient: Tensor, rewinds: bool) -> None:
        which = slice(i, i + 1)
        if rewinds:
            of_each = {key: value[which] for key, value in self.state.items() if self.rule.of_matrices(key)}
            before = {key: to_host(value) for key, value in of_each.items()}
            self._refreshed[i] = self._due[i], before
        self.rule.refresh(gradient, self.state, which, self._due[i])

    @torch.no_grad()
    def _project_one(self, i: int, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.unsqueeze(0), None
        if i in self._due and not self._arrived[i]:
            self._refresh(i, gradient, rewinds=True)
        self._arrived[i] += 1
        found = self.rule.project(gradient, self.state, slice(i, i + 1))
        if self._sum is None:
            self._sum = torch.zeros(len(self.parameters), *found.shape[1:], device=found.device)
        self._sum[i] += found[0]

    @property
    def projected(self) -> Tensor | None:
        """What there is of this step's gradients beside the parameters' own: sums of several, or projected ones."""
        return self._sum

    def tensors(self) -> dict[str, Tensor]:
        masters = {} if self.master is self.weights else {"master": self.master}
        return {"weights": self.weights, "awake": self.awake, **masters, **self.state}


class Part:
    """Some parameters of a stack: views of it where they are neighbours, else copies that `back` writes."""

    def __init__(self, stack: Stack, which: list[int]) -> None:
        self.rule, self.scale, self.workers = stack.rule, stack.scale, stack.workers
        self._rows, self._of = rows_of(which, stack.weights.device), stack.tensors()
        self._own = {key: value[self._rows] for key, value in self._of.items()}
        rest = dict(self._own)
        self.weights, self.awake = rest.pop("weights"), rest.pop("awake")
        self.master = rest.pop("master", self.weights)
        self.state = rest

    def back(self) -> None:
        if isinstance(self._rows, Tensor):
            for key, value in self._own.items():
                self._of[key].index_copy_(0, self._rows, value)


def neighbours(which: list[int]) -> bool:
    return which == list(range(which[0], which[-1] + 1))


def rows_of(which: list[int], device: torch.device) -> slice | Tensor:
    """A slice where they are neighbours, else an index."""
    return slice(which[0], which[-1] + 1) if neighbours(which) else to_device(torch.tensor(which), device)


def parts(same: list[Named]) -> list[list[Named]]:
    """Parameters of one shape, in stacks of one dtype each and of LARGEST_STACK values at most."""
    most = max(1, LARGEST_STACK // max(1, same[0][1].numel()))
    by_dtype = [[one for one in same if one[1].dtype == dtype] for dtype in dict.fromkeys(p.dtype for _, p in same)]
    return [own[at : at + most] for own in by_dtype for at in range(0, len(own), most)]


def call_if_alive(method: weakref.WeakMethod[Callable[..., None]], *args: Any) -> None:
    """What a hook calls: nothing any more where the optimizer is gone and the model is not."""
    alive = method()
    if alive is not None:
        alive(*args)
