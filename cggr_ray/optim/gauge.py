"""What may look at an update while it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Measure = Callable[[Tensor, Tensor, Callable[[], Tensor]], Tensor]
"""Of stacks of n gradients before clipping, of the weights before the update, and of what these gradients alone would
take off them at the full rate: whether a parameter has rested must not tell."""


class Gauge(Protocol):
    """Looks at an update."""

    measure: Measure

    def add(self, found: Tensor) -> None:
        """Takes what was measured of the next stack."""
        ...
