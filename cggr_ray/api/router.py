"""A router cut from the model's own first layers: no copy of a module, no parameter of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cggr_ray.api.borrowed import Borrowed
from cggr_ray.api.selection import score_name
from cggr_ray.data.batch import MicroBatch
from cggr_ray.routing.scorers import own_scores
from cggr_ray.sparse.plan import Seen, seen_after

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TruncatedModel:
    """The model after `num_layers` layers: their hidden states through the last norm and the head.

    Not an `nn.Module`, so whoever holds it registers nothing twice. `CGGRModel` runs these layers as part of its own
    forward; called by itself it runs them alone.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int) -> None:
        self.borrowed, self.model, self.num_layers = Borrowed(model), model, num_layers
        count = len(self.borrowed.adapter.layers)
        if not 1 <= num_layers < count:
            raise ValueError(f"num_layers = {num_layers} of a model with {count}; accepted: 1 to {count - 1}")

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V), without gradient. Arguments, and what is refused, are as for `CGGRModel`."""
        micro = self.borrowed.micro_batch(input_ids, attention_mask, input_ids, position_ids)
        found = self._seen(micro)
        return (found.final_ND @ found.head_VD.mT).view(*input_ids.shape, -1)

    @torch.no_grad()
    def scores(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        scoring: str = "combined",
    ) -> Tensor:
        """Difficulty (B, T) in float32 of predicting the next token, -inf where there is none to predict.

        `labels` are unshifted, as in Hugging Face models; without them every next token is one.
        """
        name = score_name(scoring)
        labels = input_ids if labels is None else labels
        micro = self.borrowed.micro_batch(input_ids, attention_mask, labels, position_ids)
        found = self._seen(micro)
        return own_scores(name, found, micro).scores_BT

    def _seen(self, micro: MicroBatch) -> Seen:
        with self.borrowed.running() as adapter:
            return seen_after(adapter, micro, self.num_layers)


def create_truncated_router(model: PreTrainedModel, num_layers: int = 4) -> TruncatedModel:
    """A router that shares the first layers, the last norm and the head of `model`; no memory of its own.

    Raises:
        ValueError: the family is not supported, or the model has no more than `num_layers` layers.
    """
    return TruncatedModel(model, num_layers)
