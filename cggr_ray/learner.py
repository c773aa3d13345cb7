"""Learner.step: the whole training algorithm, without a branch on any method's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cggr_ray.data.batch import Batch
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress
from cggr_ray.recipe import Recipe
from cggr_ray.schema import (
    GRAD_NORM,
    KEPT_LOSS,
    LEARNING_RATE,
    ROUTER_ACTIVE_PARAMS,
    ROUTER_KEPT_FRACTION,
    TRAIN_LOSS,
)


@dataclass(frozen=True)
class StepRow:
    """What a step leaves behind: values on the device, to be read when they are there, and values of the host."""

    progress: Progress
    device_values: dict[str, Tensor]
    host_values: dict[str, float]


class Learner:
    """The running parts of a recipe on one model."""

    def __init__(self, recipe: Recipe, adapter: Adapter, seed: int) -> None:
        self.recipe, self.adapter = recipe, adapter
        self.router = recipe.tokens.build(seed, adapter.device)
        named = adapter.named_parameters()
        self.optimizer = recipe.optimizer.build(named, adapter.hidden_names(), adapter.device)
        self.parameters = sum(p.numel() for _, p in named)

    def step(self, batch: Batch, progress: Progress, ratio: float | None = None) -> StepRow:
        """One optimizer update. Queues work on the device and returns; nothing is read back.

        Args:
            ratio: kept ratio to use instead of the router's own; only warm-up asks for one.
        """
        layers = len(self.adapter.layers)
        self.adapter.set_active_layers(self.recipe.updates.active_layers(layers, progress))
        ratio = self.router.ratio(progress) if ratio is None else ratio
        losses, statistics = [], []
        for micro in batch.micros:
            stream = self.adapter.forward(micro)
            route = self.router.after(stream, micro, ratio, progress) if ratio < 1 else None
            loss = self.recipe.objective.loss(stream, micro, route, batch.labelled)
            loss.total.backward()
            if len(batch.micros) > 1:
                self.optimizer.accumulate()
            losses.append(loss.reported)
            statistics.append(route.statistics if route else {})
        norm = self.optimizer.step(progress)
        loss_name = TRAIN_LOSS if ratio == 1 else KEPT_LOSS
        device_values = {loss_name: torch.stack(losses).sum(), GRAD_NORM: norm, **_merge(statistics)}
        return StepRow(progress, device_values, self._host_values(progress, ratio))

    def observe(self, values: dict[str, float], progress: Progress) -> None:
        """Gives the parts what an earlier step measured, two steps late."""
        self.router.observe(values, progress)

    def state_dict(self) -> dict[str, Any]:
        """Host state of the parts. Weights and optimizer tensors are saved beside it."""
        return {"router": self.router.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.router.load_state_dict(state["router"])

    def _host_values(self, progress: Progress, ratio: float) -> dict[str, float]:
        return {
            LEARNING_RATE: self.optimizer.learning_rate(progress),
            ROUTER_KEPT_FRACTION: ratio,
            ROUTER_ACTIVE_PARAMS: float(self.parameters),
        }


def _merge(statistics: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Means over micro-batches; a histogram's counts are averaged too."""
    names = statistics[0].keys()
    return {name: torch.stack([s[name] for s in statistics]).mean(dim=0) for name in names}
