"""The `updates` parts that measure nothing: every layer, which is neutral, or the same last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cggr_ray.progress import Progress
from cggr_ray.updates.schedule import (
    Active,
    Learning,
    Schedule,
    Stateless,
    check_fraction,
    check_window,
    every_layer,
    in_full,
    part_of,
    suffix,
)


@dataclass(frozen=True)
class FullUpdate:
    """Every layer learns in every step."""

    IS_PART: ClassVar[bool] = True

    def build(self, layers: int, seed: int) -> Schedule:
        return Fixed(every_layer(layers), 0.0, 1.0)


@dataclass(frozen=True)
class StaticSuffix:
    """The last layers alone learn, `keep` of them; all until `full_until` of the budget and from `full_from`."""

    IS_PART: ClassVar[bool] = True

    keep: float = 0.5
    full_until: float = 0.0
    full_from: float = 1.0

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_window(self.full_until, self.full_from)

    def build(self, layers: int, seed: int) -> Schedule:
        return Fixed(suffix(layers, part_of(layers, self.keep)), self.full_until, self.full_from)


class Fixed(Stateless):
    """All layers at the edges of the budget, the same ones between."""

    def __init__(self, active: Active, full_until: float, full_from: float) -> None:
        self._active, self._full_until, self._full_from = active, full_until, full_from

    def begin(self, progress: Progress) -> Learning:
        full = in_full(progress, self._full_until, self._full_from)
        return Learning(every_layer(len(self._active)) if full else self._active)

    def reachable(self) -> list[Learning]:
        return list(dict.fromkeys((Learning(every_layer(len(self._active))), Learning(self._active))))
