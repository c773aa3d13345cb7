"""Gradient norms by layer, from the norms by parameter that clipping needs anyway: gradients are not read again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cggr_ray.transfer import to_device


class LayerNorms:
    """Adds norms of parameters up by layer; what is in no layer (embedding, last norm, head) is left out.

    A few launches of a small kernel a step, whatever the model.
    """

    def __init__(self, layers: Sequence[Sequence[nn.Parameter]], device: torch.device) -> None:
        self._layer_of = {id(p): layer for layer, parameters in enumerate(layers) for p in parameters}
        self._num_layers, self._device = len(layers), device
        self._index: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, norms_P: Tensor, of_P: tuple[int, ...]) -> Tensor:
        """(L,) float32; 0 for a layer of which no parameter is among `of_P`, the ids that `norms_P` is of."""
        if of_P not in self._index:
            layer_P = torch.tensor([self._layer_of.get(i, self._num_layers) for i in of_P])
            self._index[of_P] = to_device(layer_P, self._device)
        squares = torch.zeros(self._num_layers + 1, device=self._device)
        return squares.index_add_(0, self._index[of_P], norms_P.square())[:-1].sqrt()
