"""How much a layer has to learn, measured from one step's gradients, all parameters of a layer together.

With g the gradient before clipping, W the weights before the update, u what the update takes off them at the full rate,
decay left out:

    gradient_norm   |g| / (|W| + eps)
    saliency        sum |g W|
    fisher          sum g^2
    decrease        <g, u>, what the loss falls by to first order: the only one that knows that an orthogonalised update
                    is as long whatever the gradient

Shapes: P parameters in stacks of n, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

RelevanceName = Literal["gradient_norm", "saliency", "fisher", "decrease"]
# Measures that multiply the gradient by something of the weights' size, which a projected gradient has not.
WHOLE_GRADIENT = ("saliency", "decrease")
EPS = 1e-12

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(gradients, weights, updates), each a stack of n, to two numbers a parameter that add up over a layer: (n, 2)."""


class Relevance(NamedTuple):
    """What is measured of a parameter, and what a layer's sums of it come to."""

    measure: Measure
    combine: Callable[[Tensor, Tensor], Tensor]


def _pair(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack((first.flatten(1).sum(1), second.flatten(1).sum(1)), 1)


def _squares(gradient: Tensor, weights: Tensor, update: Tensor) -> Tensor:
    return _pair(gradient.square(), weights.square())


def _saliency(gradient: Tensor, weights: Tensor, update: Tensor) -> Tensor:
    return _pair((gradient * weights).abs(), weights.square())


def _decrease(gradient: Tensor, weights: Tensor, update: Tensor) -> Tensor:
    return _pair(gradient * update, weights.square())


def _ratio_of_norms(first_L: Tensor, second_L: Tensor) -> Tensor:
    return first_L.sqrt() / (second_L.sqrt() + EPS)


def _first(first_L: Tensor, second_L: Tensor) -> Tensor:
    return first_L


RELEVANCES: dict[RelevanceName, Relevance] = {
    "gradient_norm": Relevance(_squares, _ratio_of_norms),
    "saliency": Relevance(_saliency, _first),
    "fisher": Relevance(_squares, _first),
    "decrease": Relevance(_decrease, _first),
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
        # What belongs to no layer is added up behind them, and dropped.
        self._layers = len(layers)
        index = [of_layer.get(id(p), self._layers) for p in order]
        self._index_P = torch.tensor(index, device=order[0].device)
        self._found: list[Tensor] = []

    def add(self, found: Tensor) -> None:
        """Takes (n, 2) of the next stack; all parameters learn in the step of a probe."""
        self._found.append(found)

    def of_layers(self) -> Tensor:
        """(L,) of what was added."""
        pairs, self._found = torch.cat(self._found), []
        sums = pairs.new_zeros(self._layers + 1, 2).index_add_(0, self._index_P, pairs)[:-1]
        return self._combine(sums[:, 0], sums[:, 1])
