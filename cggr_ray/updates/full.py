"""The neutral `updates` part: every layer learns in every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cggr_ray.progress import Progress


@dataclass(frozen=True)
class FullUpdate:
    """Every layer learns in every step."""

    IS_PART: ClassVar[bool] = True

    def active_layers(self, layers: int, progress: Progress) -> Sequence[bool]:
        return [True] * layers
