"""What an objective is: the loss that a recipe minimises, with the parameters that it brings along.

The rows of a loss are K positions of a micro-batch: all of them, or those that a route keeps. With y_{t+k} the token k
steps after position t, the target k steps ahead of t counts where t + k - 1 lies in the document of t and has a label.
Shapes: B rows of T positions, N = B T, K rows of the loss, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cggr_ray.data.batch import IGNORE, MicroBatch
from cggr_ray.models.adapter import Stream
from cggr_ray.progress import Progress
from cggr_ray.routing.route import TokenRoute


class Loss(NamedTuple):
    total: Tensor
    """What is differentiated: weighted NLL summed over kept positions, over the labelled count of the global batch,
    and whatever else the objective minimises."""
    reported: Tensor
    """The next-token loss alone, detached: this micro-batch's part of the step's training loss."""
    index_K: Tensor
    """Flat positions whose loss was computed."""
    nll_K: Tensor
    """Their next-token NLL in nats, float32, 0 without a label, NaN in an empty slot. No gradient."""
    auxiliary: Tensor | None = None
    """What `total` has beyond `reported`, detached; None where the objective adds nothing."""


class Objective(Protocol):
    """The running object of an `objective` part."""

    def begin(self, progress: Progress) -> None:
        """What the host has to say before a step: weights that change, put in place into tensors of the device."""
        ...

    def loss(self, stream: Stream, micro: MicroBatch, route: TokenRoute | None, scale: Tensor) -> Loss:
        """`scale`: 1 / labelled positions of the global batch, 0-d float32, so that micro-batches add up."""
        ...

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What the objective owns and trains, apart from the language model."""
        ...

    def hidden_names(self) -> list[str]:
        """Of these, the parameters inside decoder layers."""
        ...


class OwnsNothing:
    """Of an objective without parameters of its own."""

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return []

    def hidden_names(self) -> list[str]:
        return []


class Rows(NamedTuple):
    """The positions that a loss is of."""

    index_K: Tensor
    weights_K: Tensor
    """float32, the route's weights times 1 / labelled positions of the global batch."""
    filled_K: Tensor | None
    """False for an empty slot of a route; None where every position is a row."""

    def of(self, values: Tensor) -> Tensor:
        """The rows of what has (B, T, ...) values."""
        flat = values.flatten(0, 1)
        return flat if self.filled_K is None else flat.index_select(0, self.index_K)

    def hidden(self, stream: Stream) -> Tensor:
        """(K, D) final hidden states."""
        return stream.hidden_RD if self.filled_K is None else stream.at(self.index_K)

    def loss(self, total: Tensor, nll_K: Tensor, reported: Tensor | None = None) -> Loss:
        """`reported`: the next-token loss, where `total` has more in it."""
        if self.filled_K is not None:
            # An empty slot repeats a position, but a forward of kept rows may give it no attention.
            nll_K = torch.where(self.filled_K, nll_K, torch.nan)
        detached = total.detach()
        if reported is None:
            return Loss(total, detached, self.index_K, nll_K)
        return Loss(total, reported, self.index_K, nll_K, detached - reported)


def rows_of(micro: MicroBatch, route: TokenRoute | None, scale: Tensor) -> Rows:
    """All positions, or those of the route with its weights."""
    count = micro.labels_BT.numel()
    if route is None:
        return Rows(torch.arange(count, device=micro.labels_BT.device), scale.expand(count), None)
    index_K = route.flat_index(count // len(route.index_BK))
    return Rows(index_K, route.weights_BK.flatten() * scale, route.filled_BK.flatten())


def labels_ahead(micro: MicroBatch, steps: int) -> Tensor:
    """(B, T), the token `steps` after each position, -100 where it is of another document or its label is masked.

    One step ahead are the labels themselves.
    """
    labels_BT, positions_BT = micro.labels_BT, micro.positions_BT
    ahead = torch.full_like(labels_BT, IGNORE)
    shift = steps - 1
    if shift >= labels_BT.shape[1]:
        return ahead
    end = labels_BT.shape[1] - shift
    inside = positions_BT[:, shift:] == positions_BT[:, :end] + shift
    ahead[:, :end] = torch.where(inside, labels_BT[:, shift:], IGNORE)
    return ahead


class _OneAtATime(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: Sequence[Callable[[Tensor], Tensor]], shared: Tensor, *parameters: Tensor) -> Tensor:
        leaf = shared.detach().requires_grad_()
        total = torch.zeros((), device=shared.device)
        sums: list[Tensor | None] = [None] * (1 + len(parameters))
        for term in terms:
            with torch.enable_grad():
                value = term(leaf)
            total += value.detach()
            found = torch.autograd.grad(value, (leaf, *parameters), allow_unused=True)
            del value
            sums = [_plus(old, new) for old, new in zip(sums, found, strict=True)]
        ctx.sums = sums
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: these are the largest gradients there are, and nobody asks twice.
        sums, ctx.sums = ctx.sums, None
        return None, *(None if g is None else g.mul_(grads[0]) for g in sums)


def _plus(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    return old if new is None else new if old is None else old + new


def one_at_a_time(
    terms: Sequence[Callable[[Tensor], Tensor]], shared: Tensor, parameters: Sequence[nn.Parameter]
) -> Tensor:
    """The sum of the terms of `shared`, 0-d float32. Each is differentiated before the next one is computed.

    So the activations of one term exist at a time, and one chunk of logits; the sum keeps gradients alone. The terms
    read no other tensor with a gradient than `shared` and `parameters` (arXiv 2404.19737, section 2).
    """
    learning = [p for p in parameters if p.requires_grad]
    total: Tensor = _OneAtATime.apply(terms, shared, *learning)
    return total
