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


@dataclass(frozen=True)
class NextToken:
    """L = (1 / labelled) sum_t w_t nll_t over kept positions t; w = 1 on all labelled positions without a route."""

    IS_PART: ClassVar[bool] = True

    def loss(self, stream: Stream, micro: MicroBatch, route: TokenRoute | None, labelled: int) -> Loss:
        """`labelled` counts the labelled positions of the global batch, over all micro-batches."""
        labels = micro.labels_BT.flatten()
        if route is None:
            weights = torch.full(labels.shape, 1 / labelled, device=labels.device)
            hidden = stream.hidden_ND
        else:
            index = route.flat_index(micro.labels_BT.numel() // len(route.index_BK))
            hidden, labels = stream.hidden_ND.index_select(0, index), labels.index_select(0, index)
            weights = route.weights_BK.flatten() / labelled
        total, _ = selected_cross_entropy(hidden, stream.head_VD, labels, weights)
        return Loss(total, total.detach())
