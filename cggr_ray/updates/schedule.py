"""Which layers learn in a step: what the running `updates` parts answer, and in which words.

Layers below the lowest one that learns are not in the backward pass: they store nothing for it. The embedding learns
where the first layer does, the last norm and the head always. A head tied to the embedding keeps learning as a head.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

from cggr_ray.progress import Progress
from cggr_ray.updates.relevance import RelevanceName

Active = tuple[bool, ...]
"""Whether each layer learns, the lowest first."""


class Learning(NamedTuple):
    """What a step is to do: which layers learn, and whether their relevance is measured."""

    active: Active
    probe: bool = False


class Schedule(Protocol):
    """The running part. `begin` is asked once a step; what a step measured comes back by `observe`, two steps late."""

    @property
    def relevance(self) -> RelevanceName | None:
        """What a probe measures, where there are probes."""
        ...

    def begin(self, progress: Progress) -> Learning: ...

    def reachable(self) -> list[Learning]:
        """All that `begin` may ever answer, or one of every kind where what compiles does not depend on more."""
        ...

    def observe(self, values: dict[str, Any], progress: Progress) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stateless:
    """What a schedule without memory shares: its answer depends on the progress alone."""

    relevance: RelevanceName | None = None

    def observe(self, values: dict[str, Any], progress: Progress) -> None:
        """Nothing is measured."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def every_layer(layers: int) -> Active:
    return (True,) * layers


def suffix(layers: int, learning: int) -> Active:
    """The last `learning` of so many layers."""
    return (False,) * (layers - learning) + (True,) * learning


def part_of(layers: int, fraction: float) -> int:
    """A fraction of the layers in whole ones, at least one; halves go up."""
    return max(1, math.floor(fraction * layers + 0.5))


def levels_between(layers: int, smallest: float, largest: float, levels: int) -> tuple[int, ...]:
    """Evenly spaced numbers of layers between two fractions of all, ascending; fewer in a small model."""
    steps = max(1, levels - 1)
    return tuple(sorted({part_of(layers, smallest + (largest - smallest) * i / steps) for i in range(levels)}))


def check_fraction(name: str, fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"{name} = {fraction}; accepted: a fraction of the layers in (0, 1]")


def check_levels(smallest: float, largest: float, levels: int) -> None:
    check_fraction("smallest", smallest)
    check_fraction("largest", largest)
    if smallest > largest or levels < 1:
        raise ValueError(f"smallest = {smallest}, largest = {largest}, levels = {levels}; "
                         "accepted: smallest <= largest, at least 1 level")  # fmt: skip


def check_every(every: int) -> None:
    if every < 1:
        raise ValueError(f"every = {every}; accepted: at least 1 step")


def check_window(full_until: float, full_from: float) -> None:
    if not 0 <= full_until <= full_from <= 1:
        raise ValueError(f"full_until = {full_until}, full_from = {full_from}; "
                         "accepted: 0 <= full_until <= full_from <= 1")  # fmt: skip


def in_full(progress: Progress, full_until: float, full_from: float) -> bool:
    """Whether every layer learns at this point of the budget; a `full_from` of 1 means never again."""
    return progress.fraction < full_until or (full_from < 1 and progress.fraction >= full_from)
