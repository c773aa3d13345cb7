"""DynamicSuffix: the last layers learn, as many as hold most of the relevance that probe steps measure.

With e_l the moving average of layer l's relevance, of L layers the smallest k is chosen with

    sum_{l > L - k} e_l >= threshold * sum_l e_l

and rounded up to one of a few levels. (What an average lacks at its start is alike for all layers and cancels.) A probe
is an ordinary step of every layer whose gradients are also measured. Before the schedule starts, and in the recovery at
the end of the budget, every layer learns in every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np

from cggr_ray.progress import Progress
from cggr_ray.schema import RELEVANCE, STEP_LOSSES
from cggr_ray.updates.relevance import RelevanceName
from cggr_ray.updates.schedule import (
    Learning,
    Schedule,
    check_levels,
    check_window,
    every_layer,
    in_full,
    levels_between,
    suffix,
)

# Probes in a row without a change after which they come half as often.
UNCHANGED = 3
# Of a sum of relevances, so that equal layers are counted alike.
ROUNDING = 1e-9


def is_finite(value: float | None) -> bool:
    """Of a measurement that may have been through JSON, which has no other word for what is not finite than null."""
    return value is not None and math.isfinite(value)


@dataclass(frozen=True)
class Stability:
    """The schedule starts only once the loss is steady: the means of two windows of steps in a row differ by less than
    `mean_change` of the later, whose standard deviation is below `variation` of its mean."""

    window: int = 50
    mean_change: float = 0.02
    variation: float = 0.10

    def __post_init__(self) -> None:
        if self.window < 2 or not (self.mean_change > 0 and self.variation > 0):
            raise ValueError(f"{self}; accepted: window of at least 2 steps, positive limits")

    def steady(self, losses: list[float]) -> bool:
        """Of the last steps' losses, the newest last; never before there are two windows of them."""
        if len(losses) < 2 * self.window:
            return False
        before, now = np.array(losses[-2 * self.window : -self.window]), np.array(losses[-self.window :])
        mean = now.mean()
        return bool(abs(mean - before.mean()) < self.mean_change * mean and now.std() < self.variation * mean)


@dataclass(frozen=True)
class Limits:
    """Moves the smallest and the largest number of layers by a level with the moving average of the probes' loss.

    Up where it rose above `upper` times what it was at the last move, down where it fell below `lower` times that. If
    positions are chosen, the loss is theirs, and rises as fewer of them are kept.
    """

    upper: float = 1.02
    lower: float = 0.98
    beta: float = 0.9

    def __post_init__(self) -> None:
        if not (0 < self.lower < 1 < self.upper and 0 <= self.beta < 1):
            raise ValueError(f"{self}; accepted: 0 < lower < 1 < upper, beta in [0, 1)")


@dataclass(frozen=True)
class Cadence:
    """Steps between probes: `first`, twice as many when three probes in a row left the depth as it was, half as many
    when it changed, within two bounds. Equal bounds fix it."""

    first: int = 25
    shortest: int = 10
    longest: int = 200

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.first <= self.longest:
            raise ValueError(f"{self}; accepted: 1 <= shortest <= first <= longest")

    def after(self, now: int, changed: bool, unchanged: int) -> int:
        if changed:
            return max(self.shortest, now // 2)
        return min(self.longest, 2 * now) if unchanged and unchanged % UNCHANGED == 0 else now


@dataclass(frozen=True)
class DynamicSuffix:
    """The last layers learn, as many as hold `threshold` of the relevance.

    `smallest`, `largest`, `levels`: the fractions of the layers between which there are so many depths. `hysteresis`:
    probes in a row that must ask for another depth; until they first have, every layer learns. The schedule starts at
    `full_until` of the budget, and not before the loss is steady where `stability` is set; from `full_from` every layer
    learns again.
    """

    IS_PART: ClassVar[bool] = True

    relevance: RelevanceName = "gradient_norm"
    beta: float = 0.9
    threshold: float = 0.85
    smallest: float = 0.25
    largest: float = 1.0
    levels: int = 6
    hysteresis: int = 2
    full_until: float = 0.15
    full_from: float = 0.9
    cadence: Cadence = field(default_factory=Cadence)
    stability: Stability | None = None
    limits: Limits | None = None

    def __post_init__(self) -> None:
        check_levels(self.smallest, self.largest, self.levels)
        check_window(self.full_until, self.full_from)
        if not (0 <= self.beta < 1 and 0 < self.threshold <= 1 and self.hysteresis >= 1):
            raise ValueError(f"beta = {self.beta}, threshold = {self.threshold}, hysteresis = {self.hysteresis}; "
                             "accepted: beta in [0, 1), threshold in (0, 1], at least 1 probe")  # fmt: skip

    def build(self, layers: int, seed: int) -> Schedule:
        return SuffixSchedule(self, layers)


@dataclass
class Memory:
    """Everything that the schedule remembers; plain values, so that it is saved as JSON.

    depth                  layers that learn between probes
    every, next_probe      steps between probes now, and the step of the next
    relevance              the average of each layer
    wanted, votes          the depth that the last probes asked for, and how many in a row did
    unchanged              probes in a row that asked for the depth as it is
    raised                 levels by which the limits were moved up
    loss, moved_at         the average loss of the probes now, and when the limits last moved
    losses                 of the last steps, where their steadiness matters
    """

    depth: int
    every: int
    relevance: list[float]
    next_probe: int = 0
    probes: int = 0
    started: bool = False
    wanted: int = 0
    votes: int = 0
    unchanged: int = 0
    raised: int = 0
    loss: float | None = None
    moved_at: float | None = None
    losses: list[float] = field(default_factory=list)


class SuffixSchedule:
    """The running part of `DynamicSuffix`."""

    def __init__(self, config: DynamicSuffix, layers: int) -> None:
        self.config, self._layers, self.relevance = config, layers, config.relevance
        self.levels = levels_between(layers, config.smallest, config.largest, config.levels)
        self.memory = Memory(layers, config.cadence.first, [0.0] * layers)

    def begin(self, progress: Progress) -> Learning:
        memory, every = self.memory, every_layer(self._layers)
        if in_full(progress, 0.0, self.config.full_from):
            return Learning(every)
        memory.started = memory.started or self._may_start(progress)
        probe = progress.step >= memory.next_probe
        if probe:
            memory.next_probe = progress.step + memory.every
        return Learning(suffix(self._layers, memory.depth) if memory.started and not probe else every, probe)

    def reachable(self) -> list[Learning]:
        every, suffixes = every_layer(self._layers), [suffix(self._layers, k) for k in reversed(self.levels)]
        return [Learning(every, probe=True), *(Learning(active) for active in dict.fromkeys((every, *suffixes)))]

    def observe(self, values: Mapping[str, Any], progress: Progress) -> None:
        loss = next(values[name] for name in STEP_LOSSES if name in values)
        if self.config.stability is not None and is_finite(loss):
            self.memory.losses = [*self.memory.losses, loss][-2 * self.config.stability.window :]
        if RELEVANCE in values and is_finite(loss) and all(map(is_finite, values[RELEVANCE])):
            self._measured(values[RELEVANCE], loss)
            self.memory.next_probe = progress.step + self.memory.every

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.memory)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory = Memory(**state)

    def _may_start(self, progress: Progress) -> bool:
        steady = self.config.stability is None or self.config.stability.steady(self.memory.losses)
        return progress.fraction >= self.config.full_until and self.memory.probes > 0 and steady

    def _measured(self, relevance: Sequence[float], loss: float) -> None:
        """What a probe found: new averages, new limits, perhaps another depth and another cadence."""
        memory, beta = self.memory, self.config.beta
        memory.relevance = [beta * old + (1 - beta) * new for old, new in zip(memory.relevance, relevance, strict=True)]
        memory.probes += 1
        if self.config.limits is not None:
            self._move_limits(self.config.limits, loss)
        wanted = self._wanted()
        memory.votes = memory.votes + 1 if wanted == memory.wanted else 1
        memory.wanted = wanted
        changed = wanted != memory.depth and memory.votes >= self.config.hysteresis
        memory.unchanged = memory.unchanged + 1 if wanted == memory.depth else 0
        if changed:
            memory.depth = wanted
        memory.every = self.config.cadence.after(memory.every, changed, memory.unchanged)

    def _move_limits(self, limits: Limits, loss: float) -> None:
        memory, most = self.memory, len(self.levels) - 1
        memory.loss = loss if memory.loss is None else limits.beta * memory.loss + (1 - limits.beta) * loss
        if memory.moved_at is None:
            memory.moved_at = memory.loss
        moves = (memory.loss > limits.upper * memory.moved_at) - (memory.loss < limits.lower * memory.moved_at)
        if moves:
            memory.raised, memory.moved_at = max(-most, min(most, memory.raised + moves)), memory.loss

    def _wanted(self) -> int:
        """The smallest suffix that holds enough of the relevance, within the limits, rounded up to a level."""
        most = len(self.levels) - 1
        # A layer whose update raises the loss holds nothing of what lowers it.
        held = list(accumulate(max(0.0, value) for value in reversed(self.memory.relevance)))
        enough = self.config.threshold * held[-1] * (1 - ROUNDING)
        depth = next(k for k, total in enumerate(held, 1) if total >= enough) if held[-1] > 0 else self._layers
        lowest = self.levels[max(0, self.memory.raised)]
        highest = self.levels[most + min(0, self.memory.raised)]
        depth = min(max(depth, lowest), highest)
        return next(level for level in self.levels if level >= depth)
