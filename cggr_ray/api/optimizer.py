"""The optimizers of the races as an optimizer of PyTorch: Muon, GaLore and AdamW, with state in float32 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from cggr_ray.models.families import FUSED_NAME
from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.optimizer import Optimizer
from cggr_ray.optim.partition import Named, partition
from cggr_ray.optim.split import is_fused
from cggr_ray.optim.stack import Stack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class MatrixOptimizer(torch.optim.Optimizer):
    """One rule for a model's hidden matrices, AdamW for its embeddings, head, norms and biases.

        optimizer = MatrixOptimizer(model, Muon(lr=2e-3, state=Int8Blockwise()), AdamW(lr=2e-3))
        loss.backward(); optimizer.step(); scheduler.step()

    Takes the parameters that require a gradient when it is made, on one device. Those of one shape lie in one tensor
    from then on and are updated together, in a few kernels that are compiled on a GPU; a model that is moved to another
    device is followed there at the next step. 16-bit parameters have float32 masters here. `c_attn` of GPT-2 is updated
    as the three projections that it holds, of queries, keys and values. Learning rates stand in `param_groups`,
    `matrix` before `rest`, for schedulers of torch; all else is in the rules. A step drops the gradients, and where one
    is not finite it changes nothing at all. A parameter without a gradient rests; of the matrices that GaLore's
    `full_rank` corrects, all of a shape have gradients or none has.

    Sources: Muon, Jordan et al. 2024 and arXiv:2502.16982; 8-bit state, arXiv:2509.23106; GaLore, arXiv:2403.03507 and
    arXiv:2504.20437; AdamW, arXiv:1711.05101.

    Args:
        model: weights may be loaded into it later too, and it may be moved; cast it must not be.
        matrix: `Muon`, `GaLore` around it or around `AdamW`, or `AdamW`. rest: `AdamW`.
        hidden: names of parameters in the model's blocks, of which the two-dimensional ones are hidden matrices. By
            default all in a `nn.ModuleList`, but for embeddings and for what `get_output_embeddings` returns.
        clip_norm: of all gradients together, for loops that do not clip by themselves.

    Raises:
        ValueError: it is no module, or a rule none of these; no parameter learns, there is no hidden matrix, a name is
            unknown, or a parameter is of a dtype, a kind or a device that cannot be updated with the others.
    """

    def __init__(
        self,
        model: nn.Module,
        matrix: Muon | GaLore | AdamW | None = None,
        rest: AdamW | None = None,
        hidden: Iterable[str] | None = None,
        clip_norm: float = inf,
    ) -> None:
        check_arguments(model, matrix, rest, clip_norm)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        check_parameters(named)
        inside = inside_blocks(model, named) if hidden is None else known(hidden, named)
        matrices, others = partition(named, inside)
        if not matrices:
            raise ValueError("no hidden matrix: no two-dimensional parameter that learns in a nn.ModuleList, or among "
                             "the names; accepted: hidden = the names of the blocks' parameters")  # fmt: skip
        config = Optimizer(matrix or Muon(), rest or AdamW(), clip_norm=clip_norm)
        self._named, self._inside, self._config = named, inside, config
        self._steps, self._complete = 0, False
        groups = (("matrix", matrices, config.matrix.lr), ("rest", others, config.rest.lr))
        super().__init__([{"params": [p for _, p in own], "lr": lr, "name": n} for n, own, lr in groups if own], {})
        self._complete = True
        self._stack_weights()
        # Of all gradients in the last step, 0-d; None before the first.
        self.grad_norm: Tensor | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure` does.

        Raises:
            RuntimeError: the model was cast, or a weight resized, after the optimizer was made; a gradient is sparse;
                or some matrices of a shape that `full_rank` corrects have a gradient, and others have none.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._look_at_weights()
        self._check_gradients()
        self._inner.begin_number(self._steps)
        for stack in self._inner.stacks.values():
            stack.rest_without_gradient()
            self._check_resting(stack)
        if any(stack.learning for stack in self._inner.stacks.values()):
            rates = {group["name"]: float(group["lr"]) for group in self.param_groups}
            self.grad_norm = self._inner.update(self._steps, rates["matrix"], rates.get("rest", 0.0))
            self._steps += 1
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """What `copy.deepcopy` and `pickle` take: the parameters, which a model in the same call shares with the copy,
        and values of stacks, which are the copy's own."""
        own = {key: self.__dict__[key] for key in ("_named", "_inside", "_config", "_steps", "_complete", "grad_norm")}
        stacks = {"tensors": self._inner.state_dict(), "waiting": self._inner.waiting()}
        return {**super().__getstate__(), **own, "stacks": stacks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        stacks = state["stacks"]
        super().__setstate__({key: value for key, value in state.items() if key != "stacks"})
        self._stack_again(**stacks)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ValueError: the parameters of a shape are stacked once, when the optimizer is made."""
        if self._complete:
            raise ValueError("add_param_group; accepted: a new optimizer, made when all parameters are there")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """State of all stacks, float32 masters too, and the groups; for `torch.save`, or `accelerate`."""
        names = self._names()
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            | {"params": [bare(names[id(p)]) for p in group["params"]]}
            for group in self.param_groups
        ]
        state = {"steps": self._steps, "tensors": self._inner.state_dict(), "waiting": self._inner.waiting()}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on as the optimizer that was saved, whether or not either model was compiled or wrapped for DDP.

        Raises:
            ValueError: the state is that of another kind of optimizer, of other parameters or of other rules.
        """
        if "tensors" not in state_dict["state"]:
            raise ValueError("state of another kind of optimizer; accepted: that of a MatrixOptimizer")
        mine, stored = self.state_dict()["param_groups"], state_dict["param_groups"]
        if [group["params"] for group in mine] != [[*map(bare, group["params"])] for group in stored]:
            raise ValueError("state of an optimizer of other parameters; accepted: that of the same model")
        self._inner.load_state_dict(state_dict["state"]["tensors"])
        self._inner.wait(state_dict["state"].get("waiting", {}))
        self._steps = int(state_dict["state"]["steps"])
        for group, values in zip(self.param_groups, stored, strict=True):
            group.update({key: value for key, value in values.items() if key != "params"})

    def _check_gradients(self) -> None:
        for name, p in self._named:
            if p.grad is not None and p.grad.layout is not torch.strided:
                raise RuntimeError(f"gradient of {name!r} with layout {p.grad.layout}; accepted: dense ones, as of "
                                   "nn.Embedding without sparse=True")  # fmt: skip

    def _check_resting(self, stack: Stack) -> None:
        """Those drawn to learn at full rank are counted among all of a stack, so that none of it can be left out."""
        some = 0 < len(stack.learning) < len(stack.parameters)
        if some and not all(stack.rule.of_matrices(key) for key in stack.state):
            resting = next(p for i, p in enumerate(stack.parameters) if i not in stack.learning)
            raise RuntimeError(f"parameter {self._names()[id(resting)]!r} has no gradient, others of shape "
                               f"{tuple(resting.shape)} have one, and full_rank draws among them; accepted: gradients "
                               "for all of a shape or for none, or full_rank = 0")  # fmt: skip

    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self._named}

    def _stack_weights(self) -> None:
        """Stacks the weights where they are now."""
        fused = [name for name, p in self._named if name.endswith(FUSED_NAME) and is_fused(p.shape)]
        device = self.param_groups[0]["params"][0].device
        self._inner = self._config.build(self._named, self._inside, device, fused=fused)
        for stack in self._inner.stacks.values():
            for p in stack.parameters:
                # As a tensor of its own on the same memory: safetensors, and with it accelerate, saves and loads no
                # parameter that is part of a larger tensor.
                p.data = torch.from_dlpack(p.data)
        self._seen = {name: seen(stack.parameters) for name, stack in self._inner.stacks.items()}

    def _look_at_weights(self) -> None:
        """Whether all weights are where they were, and which were written by others since the last step."""
        for name, stack in self._inner.stacks.items():
            before, now = self._seen[name], seen(stack.parameters)
            if any(one.place != old.place for one, old in zip(now, before, strict=True)):
                self._follow_weights()
                return
            if written := [i for i, one in enumerate(now) if one != before[i]]:
                stack.read_again(written)
                self._seen[name] = now

    def _follow_weights(self) -> None:
        """All of it again where the weights are now, with the state that there was."""
        stacks, names = self._inner.stacks, self._names()
        for stack in stacks.values():
            for p in stack.parameters:
                if p.dtype != stack.weights.dtype or p.shape != stack.weights.shape[1:]:
                    raise RuntimeError(f"parameter {names[id(p)]!r} was cast or resized after the optimizer was "
                                       "made; accepted: first the model's dtype, then the optimizer")  # fmt: skip
        check_parameters([(names[id(p)], p) for stack in stacks.values() for p in stack.parameters])
        self._stack_again(self._inner.state_dict(), self._inner.waiting())

    def _stack_again(self, tensors: dict[str, Tensor], waiting: dict[str, list[int]]) -> None:
        """Stacks the weights where they are now, with the state that there was of them."""
        self._stack_weights()
        self._inner.load_state_dict(tensors)
        self._inner.wait(waiting)
        for stack in self._inner.stacks.values():
            stack.read_again(list(range(len(stack.parameters))))


class Seen(NamedTuple):
    """Where a parameter's values are, and how often they were written in place; writes of its stack do not count."""

    place: int
    version: int


def seen(parameters: Iterable[nn.Parameter]) -> list[Seen]:
    return [Seen(p.data_ptr(), p._version) for p in parameters]


def bare(name: str) -> str:
    """A parameter's name without what `torch.compile` and `DistributedDataParallel` put into it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def check_arguments(model: Any, matrix: Any, rest: Any, clip_norm: Any) -> None:
    """Raises ValueError for what other optimizers take in their place."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model of type {type(model).__name__}; accepted: the nn.Module itself, not its parameters")
    if not isinstance(matrix, Muon | GaLore | AdamW | None):
        raise ValueError(f"matrix = {matrix!r}; accepted: Muon, GaLore or AdamW of cggr_ray, or None")
    if not isinstance(rest, AdamW | None):
        raise ValueError(f"rest = {rest!r}; accepted: AdamW of cggr_ray, or None")
    if not isinstance(clip_norm, int | float):
        raise ValueError(f"clip_norm = {clip_norm!r}; accepted: a positive number (inf clips nothing)")


def check_parameters(named: list[Named]) -> None:
    """Raises ValueError where parameters cannot be stacked."""
    if not named:
        raise ValueError("no parameter requires a gradient; accepted: a model of which something learns")
    for name, p in named:
        if type(p.data) is not Tensor or p.is_meta:
            raise ValueError(f"parameter {name!r} is a {type(p.data).__name__} on {p.device}; accepted: plain tensors, "
                             "not sharded, quantised or on the meta device")  # fmt: skip
        if p.dtype not in DTYPES:
            raise ValueError(f"parameter {name!r} of dtype {p.dtype}; accepted: float32, bfloat16, float16")
        if p.device != named[0][1].device:
            raise ValueError(f"parameter {name!r} on {p.device}, others on {named[0][1].device}; accepted: one device")


def inside_blocks(model: nn.Module, named: list[Named]) -> list[str]:
    """Names of the parameters in a `nn.ModuleList`, but for embeddings and the output embedding."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # What a parametrized weight is made of is a list too.
    lists = [module for module in lists if not isinstance(module, ParametrizationList)]
    outside = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if callable(head := getattr(model, "get_output_embeddings", None)) and (found := head()) is not None:
        outside.append(found)
    blocks, others = ({id(p) for module in modules for p in module.parameters()} for modules in (lists, outside))
    return [name for name, p in named if id(p) in blocks - others]


def known(hidden: Iterable[str], named: list[Named]) -> list[str]:
    """The names, of which each is that of a parameter that learns; ValueError names the first that is not."""
    names, learning = list(hidden), {name for name, _ in named}
    for name in names:
        if name not in learning:
            raise ValueError(f"hidden name {name!r}; accepted: names of the model's parameters that require a gradient")
    return names
