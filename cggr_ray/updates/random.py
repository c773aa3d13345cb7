"""Controls of every part that chooses layers: as many layers, drawn by chance and anew every so many steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cggr_ray.progress import Progress
from cggr_ray.routing.draws import UPDATES, seed_of
from cggr_ray.updates.schedule import (
    Active,
    Learning,
    Schedule,
    Stateless,
    check_every,
    check_fraction,
    check_levels,
    check_window,
    every_layer,
    in_full,
    levels_between,
    part_of,
    suffix,
)


@dataclass(frozen=True)
class RandomBlocks:
    """Control: `keep` of the layers learn, wherever they are, drawn anew every `every` steps (LISA, arXiv:2403.17919).

    Differs from LISA: a part of the budget may be full, what the optimizer knows of resting layers is kept, and the
    embedding rests with the first layer.
    """

    IS_PART: ClassVar[bool] = True

    keep: float = 0.5
    every: int = 20
    full_until: float = 0.0
    full_from: float = 1.0

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_every(self.every)
        check_window(self.full_until, self.full_from)

    def build(self, layers: int, seed: int) -> Schedule:
        return BlockDraws(self, layers, seed)


@dataclass(frozen=True)
class RandomSuffix:
    """Control: the last layers learn, as many as one of `levels` between two fractions, drawn every `every` steps.

    In the mean (smallest + largest) / 2 of the layers learn: to be set to what the arm that it controls comes to.
    """

    IS_PART: ClassVar[bool] = True

    smallest: float = 0.25
    largest: float = 1.0
    levels: int = 6
    every: int = 25
    full_until: float = 0.0
    full_from: float = 1.0

    def __post_init__(self) -> None:
        check_levels(self.smallest, self.largest, self.levels)
        check_every(self.every)
        check_window(self.full_until, self.full_from)

    def build(self, layers: int, seed: int) -> Schedule:
        return SuffixDraws(self, layers, seed)


class BlockDraws(Stateless):
    """The running part of `RandomBlocks`."""

    def __init__(self, config: RandomBlocks, layers: int, seed: int) -> None:
        self.config, self._layers, self._seed = config, layers, seed
        self._learning = part_of(layers, config.keep)

    def begin(self, progress: Progress) -> Learning:
        if in_full(progress, self.config.full_until, self.config.full_from):
            return Learning(every_layer(self._layers))
        drawn = generator(self._seed, progress.step // self.config.every).permutation(self._layers)[: self._learning]
        return Learning(tuple(i in drawn for i in range(self._layers)))

    def reachable(self) -> list[Learning]:
        """Too many to name: in these, layers that learn and that rest come above some that learn and above none."""
        return list(dict.fromkeys([Learning(every_layer(self._layers)), *(self._spread(first) for first in (0, 1))]))

    def _spread(self, first: int) -> Learning:
        """Every other layer from `first` on, then what is missing from above."""
        order = [*range(first, self._layers, 2), *reversed(range(1 - first, self._layers, 2))]
        chosen = order[: self._learning]
        return Learning(tuple(i in chosen for i in range(self._layers)))


class SuffixDraws(Stateless):
    """The running part of `RandomSuffix`."""

    def __init__(self, config: RandomSuffix, layers: int, seed: int) -> None:
        self.config, self._layers, self._seed = config, layers, seed
        self.levels = levels_between(layers, config.smallest, config.largest, config.levels)

    def begin(self, progress: Progress) -> Learning:
        if in_full(progress, self.config.full_until, self.config.full_from):
            return Learning(every_layer(self._layers))
        draw = generator(self._seed, progress.step // self.config.every).integers(len(self.levels))
        return Learning(self._suffix(self.levels[draw]))

    def reachable(self) -> list[Learning]:
        every = every_layer(self._layers)
        return [Learning(active) for active in dict.fromkeys((every, *map(self._suffix, reversed(self.levels))))]

    def _suffix(self, learning: int) -> Active:
        return suffix(self._layers, learning)


def generator(seed: int, draw: int) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, UPDATES, draw))
