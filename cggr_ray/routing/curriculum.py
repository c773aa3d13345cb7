"""How the kept ratio moves over the budget, and the few values it may take (each is a graph of its own)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cggr_ray.progress import Progress, ramp

# Steps of the ratio between `keep` and 1, and between the smallest ratio of a dynamic threshold and `keep`.
LEVELS_ABOVE, LEVELS_BELOW = 4, 4
SMALLEST_OF_KEEP = 0.5


@dataclass(frozen=True)
class Curriculum:
    """Fractions of the budget: everything is kept until `full_until`, the target ratio is reached at `target_at`, and
    everything is kept again from `full_from`.

    `full_every`: in between, the last step of so many keeps everything too, whatever the budget; None for no such step.
    It costs what a full step does, and its memory: what is dropped otherwise has a gradient now and then.
    """

    full_until: float = 0.0
    target_at: float = 0.1
    full_from: float = 1.0
    full_every: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.full_until <= self.target_at <= self.full_from <= 1:
            raise ValueError(f"{self}; accepted: 0 <= full_until <= target_at <= full_from <= 1")
        if self.full_every is not None and self.full_every < 2:
            raise ValueError(f"full_every = {self.full_every}; accepted: none, or at least 2 steps, as 1 would be full "
                             "training")  # fmt: skip

    @property
    def ramps(self) -> bool:
        """Whether the ratio passes through values between 1 and its target."""
        return self.target_at > self.full_until

    @property
    def full(self) -> bool:
        """Whether everything is ever kept."""
        return self.target_at > 0 or self.full_from < 1 or self.full_every is not None

    def ratio(self, keep: float, progress: Progress) -> float:
        """1 before `full_until`, linear to `keep`, 1 again at the end; 1 in the last of `full_every` steps."""
        if progress.fraction >= self.full_from and self.full_from < 1:
            return 1.0
        if self.full_every is not None and (progress.step + 1) % self.full_every == 0:
            return 1.0
        return 1 - ramp(progress.fraction, self.full_until, self.target_at) * (1 - keep)


@dataclass(frozen=True)
class DynamicThreshold:
    """Moves the ratio with the model's mean confidence c (largest probability), measured two steps before.

    `upstream`: base (1 + (1 - c) sensitivity), which can only rise above base although it promises to fall as the model
    grows confident. `corrected`: base (1 + sensitivity (c_ref - c) / c_ref), where c is a running mean and c_ref its
    value when the curriculum reached its target.
    """

    rule: Literal["corrected", "upstream"] = "corrected"
    sensitivity: float = 0.5
    smoothing: float = 0.95

    def __post_init__(self) -> None:
        if not (0 <= self.sensitivity < float("inf") and 0 <= self.smoothing < 1):
            raise ValueError(f"{self}; accepted: a finite sensitivity >= 0, smoothing in [0, 1)")

    @property
    def below(self) -> bool:
        """Whether the ratio can fall below its base."""
        return self.rule == "corrected"

    def ratio(self, base: float, confidence: float, reference: float) -> float:
        if self.rule == "upstream":
            return min(1.0, max(0.5 * base, base * (1 + (1 - confidence) * self.sensitivity)))
        moved = base * (1 + self.sensitivity * (reference - confidence) / max(reference, 1e-6))
        return min(1.0, max(SMALLEST_OF_KEEP * base, moved))


def ratio_levels(keep: float, below: bool, between: bool = True, full: bool = True) -> tuple[float, ...]:
    """All ratios a run may use, ascending: `keep` is exactly among them, and 1 where it is.

    `below`, `between`, `full`: whether the ratio can fall below `keep`, lie between it and 1, and be 1.
    """
    down = [keep * (SMALLEST_OF_KEEP + (1 - SMALLEST_OF_KEEP) * i / LEVELS_BELOW) for i in range(LEVELS_BELOW)]
    up = [keep + (1 - keep) * i / LEVELS_ABOVE for i in range(LEVELS_ABOVE if between else 1)]
    return tuple(sorted({*(down if below else []), *up, *([1.0] if full else [])}))


def snap(ratio: float, levels: tuple[float, ...]) -> float:
    """The smallest level not below `ratio`, up to rounding."""
    return next((level for level in levels if level >= ratio - 1e-9), levels[-1])
