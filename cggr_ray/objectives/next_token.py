"""Next-token prediction: the neutral objective. A sum over positions; the learner divides by the global count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from cggr_ray.data.batch import MicroBatch
from cggr_ray.kernels.selected_ce.op import selected_cross_entropy
from cggr_ray.models.adapter import Stream
from cggr_ray.routing.route import TokenRoute


class Loss(NamedTuple):
    total: Tensor
    """What is differentiated: weighted NLL summed over kept positions, over the labelled count of the global batch."""
    reported: Tensor
    """The same number, detached: this micro-batch's part of the step's training loss."""
    index_K: Tensor
    """Flat positions whose loss was computed."""
    nll_K: Tensor
    """Their NLL in nats, float32, 0 without a label, NaN in an empty slot. No gradient."""


@dataclass(frozen=True)
class NextToken:
    """L = (1 / labelled) sum_t w_t nll_t over kept positions t; w = 1 on all labelled positions without a route."""

    IS_PART: ClassVar[bool] = True

    def loss(self, stream: Stream, micro: MicroBatch, route: TokenRoute | None, scale: Tensor) -> Loss:
        """`scale`: 1 / labelled positions of the global batch, 0-d float32, so that micro-batches add up."""
        labels = micro.labels_BT.flatten()
        if route is None:
            index = torch.arange(len(labels), device=labels.device)
            hidden, weights = stream.hidden_RD, scale.expand(len(labels))
        else:
            index = route.flat_index(len(labels) // len(route.index_BK))
            hidden, labels = stream.at(index), labels.index_select(0, index)
            weights = route.weights_BK.flatten() * scale
        total, nll = selected_cross_entropy(hidden, stream.head_VD, labels, weights)
        if route is not None:
            # An empty slot repeats a position, but a forward of kept rows may give it no attention.
            nll = torch.where(route.filled_BK.flatten(), nll, torch.nan)
        return Loss(total, total.detach(), index, nll)
