"""How much a layer has to learn, measured from one step's gradients, all parameters of a layer together.

With g the gradient before clipping, W the weights before the update, u what the gradient alone would take off them, at
the full rate, without momentum and decay:

    gradient_norm   |g| / (|W| + eps)
    saliency        sum |g W|
    fisher          sum g^2
    decrease        <g, u>, what the loss falls by to first order: the only one that knows that an orthogonalised update
                    is as long whatever the gradient. Momentum is left out because a layer that has rested has none

Embeddings belong to no layer here.
Shapes: P parameters in stacks of n, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cggr_ray.optim.gauge import Measure

RelevanceName = Literal["gradient_norm", "saliency", "fisher", "decrease"]
# Measures that multiply the gradient by something of the weights' size, which a projected gradient has not.
WHOLE_GRADIENT = ("saliency", "decrease")
EPS = 1e-12


class Relevance(NamedTuple):
    """What is measured of n parameters, c numbers each (n, c), and what a layer's sums of them (L, c) come to."""

    measure: Measure
    combine: Callable[[Tensor], Tensor]


def _columns(*values: Tensor) -> Tensor:
    return torch.stack([value.flatten(1).sum(1) for value in values], 1)


def _norms(gradient: Tensor, weights: Tensor, update: Callable[[], Tensor]) -> Tensor:
    return _columns(gradient.square(), weights.square())


def _saliency(gradient: Tensor, weights: Tensor, update: Callable[[], Tensor]) -> Tensor:
    return _columns((gradient * weights).abs())


def _fisher(gradient: Tensor, weights: Tensor, update: Callable[[], Tensor]) -> Tensor:
    return _columns(gradient.square())


def _decrease(gradient: Tensor, weights: Tensor, update: Callable[[], Tensor]) -> Tensor:
    return _columns(gradient * update())


def _ratio_of_norms(sums_L2: Tensor) -> Tensor:
    return sums_L2[:, 0].sqrt() / (sums_L2[:, 1].sqrt() + EPS)


def _itself(sums_L1: Tensor) -> Tensor:
    return sums_L1[:, 0]


RELEVANCES: dict[RelevanceName, Relevance] = {
    "gradient_norm": Relevance(_norms, _ratio_of_norms),
    "saliency": Relevance(_saliency, _itself),
    "fisher": Relevance(_fisher, _itself),
    "decrease": Relevance(_decrease, _itself),
}


class Probe:
    """Relevance of the layers of one model.

    Args:
        order: the parameters in the order in which their numbers come. layers: the parameters of each layer.
    """

    def __init__(
        self, name: RelevanceName, order: Sequence[nn.Parameter], layers: Sequence[Sequence[nn.Parameter]]
    ) -> None:
        self.measure, self._combine = RELEVANCES[name]
        of_layer = {id(p): i for i, parameters in enumerate(layers) for p in parameters}
        index = torch.tensor([of_layer.get(id(p), len(layers)) for p in order], device=order[0].device)
        # What belongs to no layer is in the last row, which is dropped. A product adds up in the same order every time.
        self._membership_LP = F.one_hot(index, len(layers) + 1).float().T[:-1].contiguous()
        self._found: list[Tensor] = []

    def add(self, found: Tensor) -> None:
        """Takes (n, c) of the next stack; all parameters learn in the step of a probe."""
        self._found.append(found)

    def of_layers(self) -> Tensor:
        """(L,) of what was added."""
        found_Pc, self._found = torch.cat(self._found), []
        return self._combine(self._membership_LP @ found_Pc)
