"""TokenRoute: which positions carry a gradient, and with what weight. Made by the `tokens` part, read by everybody."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Depth(NamedTuple):
    """How far down the gradient of a position goes: as far as its bucket's, 0 the whole way; see `depth`."""

    bucket_BT: Tensor
    last: int
    """The easiest bucket that is told apart, known on the host. Unlabelled positions are in it."""


@dataclass(frozen=True)
class TokenRoute:
    """Kept positions of a micro-batch of B rows, K slots each.

    A row with fewer than K positions to keep leaves slots empty: at its end, repeating its last position, with weight
    0, so they count for nothing.
    """

    index_BK: Tensor
    """int64, positions of each row, sorted."""
    weights_BK: Tensor
    """float32. labelled / kept on every kept position makes the loss a mean over them; 1/pi makes it unbiased."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """What was seen on the way, by schema name: 0-d means over labelled positions, a 1-d histogram of the scores; of
    `router/kept_fraction` the count alone, as who makes a route does not know what a whole step has labelled."""
    depth: Depth | None = None
    """None: through all layers."""

    @property
    def filled_BK(self) -> Tensor:
        """False for an empty slot."""
        return self.weights_BK > 0

    def kept(self, labels_BT: Tensor) -> Tensor:
        """How many labelled positions are kept, 0-d. `labels_BT`: in the route's rows."""
        return ((labels_BT.gather(1, self.index_BK) >= 0) & self.filled_BK).sum()

    def flat_index(self, row_tokens: int) -> Tensor:
        """Positions in the flattened rows, of length B K."""
        rows = torch.arange(len(self.index_BK), device=self.index_BK.device).unsqueeze(1)
        return (self.index_BK + rows * row_tokens).flatten()
