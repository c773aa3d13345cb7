"""`suffix_SHARE` of `bench step`: forward and backward of a step in which the last layers alone learn, and its update.

The limit of a suffix' speed-up is that of the arithmetic (`costs`). With the optimizer it is

    (full + O) / (full cost_k + O_k)

where full, O and O_k are measured: full training, an update of all layers, and one of the suffix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cggr_ray.benchmarks.costs import Costs
from cggr_ray.benchmarks.timing import Timing
from cggr_ray.benchmarks.workload import NOW
from cggr_ray.data.batch import MicroBatch
from cggr_ray.models.adapter import Adapter
from cggr_ray.optim.optimizer import Optimizer
from cggr_ray.updates.schedule import part_of, suffix

SHARES = (0.75, 0.5, 0.25)
# Parameters of a model whose optimizer fits beside everything else that is measured there.
OPTIMIZER_BELOW = 2 * 10**9
Step = Callable[[MicroBatch, Tensor], None]


class Suffixes:
    """Steps and updates of suffixes of one model. It moves the weights, so it comes before a graph is captured."""

    def __init__(self, adapter: Adapter) -> None:
        named, hidden = adapter.named_parameters(), adapter.hidden_names()
        self.adapter, self._steps = adapter, itertools.count()
        small = sum(p.numel() for _, p in named) < OPTIMIZER_BELOW
        self._optimizer = Optimizer().build(named, hidden, adapter.device) if small else None
        self._gradients = {p: torch.randn_like(p) for _, p in named} if small else {}

    def steps(self, step: Step) -> dict[str, Step]:
        """Forward and backward with a suffix that learns."""
        return {f"suffix_{share}": partial(self._step, share, step) for share in SHARES}

    def updates(self) -> dict[str, Callable[[], None]]:
        """The update of all layers and of each suffix, where an optimizer fits."""
        shares = () if self._optimizer is None else (1.0, *SHARES)
        return {f"update_{share}": partial(self._update, share) for share in shares}

    def values(self, name: str, times: dict[str, Timing], full: float, costs: Costs) -> dict[str, float]:
        """Units and values of a provider of `steps`. `full`: milliseconds of full training."""
        share = float(name.removeprefix("suffix_").removesuffix("_graph"))
        layers = len(self.adapter.layers)
        own, cost = times[name].p50, costs.suffix(part_of(layers, share) / layers)
        found = {"arithmetic_limit": 1 / cost, "limit_share": full / own * cost}
        if self._optimizer is not None:
            whole, part = times["update_1.0"].p50, times[f"update_{share}"].p50
            speedup, limit = (full + whole) / (own + part), (full + whole) / (full * cost + part)
            found |= {"speedup_with_optimizer": speedup, "limit_share_with_optimizer": speedup / limit}
        return found

    def _let(self, share: float) -> None:
        layers = len(self.adapter.layers)
        self.adapter.set_active_layers(suffix(layers, part_of(layers, share)))

    def _step(self, share: float, step: Step, micro: MicroBatch, scale: Tensor) -> None:
        self._let(share)
        step(micro, scale)
        self._let(1.0)

    def _update(self, share: float) -> None:
        assert self._optimizer is not None
        self._let(share)
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient if parameter.requires_grad else None
        self._optimizer.step(replace(NOW, step=next(self._steps)))
        self._let(1.0)
