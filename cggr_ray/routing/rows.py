"""The `rows` parts: which sequences enter the forward. Neutral: `AllRows`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class AllRows:
    """The whole global batch, every step."""

    IS_PART: ClassVar[bool] = True

    def rows_per_step(self, global_rows: int) -> int:
        return global_rows


@dataclass(frozen=True)
class FewerRows:
    """Control: full steps on fewer consecutive rows of the same stream.

    `fraction` is to be what a step of the routed arm costs against a full step, so that a step here costs the same: any
    selection has to beat simply taking smaller steps.
    """

    IS_PART: ClassVar[bool] = True

    fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction = {self.fraction}; accepted: a part of the global batch in (0, 1]")

    def rows_per_step(self, global_rows: int) -> int:
        return max(1, round(self.fraction * global_rows))
