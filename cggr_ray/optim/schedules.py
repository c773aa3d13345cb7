"""Learning-rate schedules: warm-up counted in tokens, decay driven by the fraction of the wall-clock budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cggr_ray.progress import Progress, ramp


def warmup(progress: Progress, warmup_tokens: int) -> float:
    """Rises linearly to 1 over the first `warmup_tokens` tokens, so arms of any step size warm up on equal data."""
    return 1.0 if warmup_tokens <= 0 else min(1.0, progress.tokens_seen / warmup_tokens)


def check(warmup_tokens: int, floor: float) -> None:
    if warmup_tokens < 0 or not 0 <= floor <= 1:
        raise ValueError(f"warmup_tokens = {warmup_tokens}, floor = {floor}; accepted: at least 0, a part in [0, 1]")


@dataclass(frozen=True)
class Linear:
    """Warm-up, then a straight line from 1 to `floor` at the end of the budget."""

    IS_PART: ClassVar[bool] = True

    warmup_tokens: int = 1_000_000
    floor: float = 0.0

    def __post_init__(self) -> None:
        check(self.warmup_tokens, self.floor)

    def multiplier(self, progress: Progress) -> float:
        return warmup(progress, self.warmup_tokens) * (1 - (1 - self.floor) * progress.fraction)


@dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay: 1 until `decay_start` of the budget, then a straight line to `floor` at its end."""

    IS_PART: ClassVar[bool] = True
    KIND: ClassVar[str] = "wsd"

    warmup_tokens: int = 1_000_000
    decay_start: float = 0.6
    floor: float = 0.0

    def __post_init__(self) -> None:
        check(self.warmup_tokens, self.floor)
        if not 0 <= self.decay_start < 1:
            raise ValueError(f"decay_start = {self.decay_start}; accepted: a fraction of the budget in [0, 1)")

    def multiplier(self, progress: Progress) -> float:
        decay = ramp(progress.fraction, self.decay_start, 1.0)
        return warmup(progress, self.warmup_tokens) * (1 - (1 - self.floor) * decay)
