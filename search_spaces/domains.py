"""Domains: the values that a dotted recipe key may take in a search. In a file, a table with its `kind`.

Every domain draws a value itself (`sample`), says which values a grid has (`grid`), translates to the distributions of
Optuna and back (`distribution`, `encode`, `decode`), and says what it is in a line (`in_words`).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from cggr_ray.codec import Plain

# Characters that the values of a choice may take where all of them are shown.
SHOWN = 80


@dataclass(frozen=True)
class Choice(Plain):
    """One of some values, whole parts among them. A value that stands here twice is drawn twice as often at random."""

    KIND: ClassVar[str] = "choice"
    IS_PART: ClassVar[bool] = True

    of: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.of:
            raise ValueError("of = []; accepted: at least one value")

    def sample(self, random: np.random.Generator) -> Any:
        return self.of[int(random.integers(len(self.of)))]

    def grid(self, points: int) -> list[Any]:
        """Every value once, however many `points` are asked for."""
        return list({_text(value): value for value in self.of}.values())

    def distribution(self) -> BaseDistribution:
        return CategoricalDistribution(list(range(len(self.grid(0)))))

    def encode(self, value: Any) -> int:
        return [_text(known) for known in self.grid(0)].index(_text(value))

    def decode(self, drawn: Any) -> Any:
        return self.grid(0)[drawn]

    def moved(self, value: Any, factor: float) -> Any:
        """The value itself: there is no near one."""
        return value

    def in_words(self) -> str:
        values = [_text(value) for value in self.grid(0)]
        shown = ", ".join(values)
        return f"one of {shown}" if len(shown) <= SHOWN else f"one of {len(values)}, such as {values[0]}"


@dataclass(frozen=True)
class Uniform(Plain):
    """A number from `low` to `high`."""

    KIND: ClassVar[str] = "uniform"
    IS_PART: ClassVar[bool] = True

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, -math.inf)

    def sample(self, random: np.random.Generator) -> float:
        return float(random.uniform(self.low, self.high))

    def grid(self, points: int) -> list[Any]:
        return [float(value) for value in np.linspace(self.low, self.high, points)]

    def distribution(self) -> BaseDistribution:
        return FloatDistribution(self.low, self.high)

    def encode(self, value: Any) -> float:
        return float(value)

    def decode(self, drawn: Any) -> float:
        return float(drawn)

    def moved(self, value: Any, factor: float) -> float:
        """The value times a factor, within the bounds."""
        return min(max(value * factor, self.low), self.high)

    def in_words(self) -> str:
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class LogUniform(Uniform):
    """A positive number from `low` to `high`, its logarithm uniform."""

    KIND: ClassVar[str] = "loguniform"

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, 0.0)

    def sample(self, random: np.random.Generator) -> float:
        return self.moved(math.exp(random.uniform(math.log(self.low), math.log(self.high))), 1.0)

    def grid(self, points: int) -> list[Any]:
        return [self.moved(float(value), 1.0) for value in np.geomspace(self.low, self.high, points)]

    def distribution(self) -> BaseDistribution:
        return FloatDistribution(self.low, self.high, log=True)

    def in_words(self) -> str:
        return f"{super().in_words()}, evenly by its logarithm"


@dataclass(frozen=True)
class Integers(Plain):
    """A whole number from `low` to `high`, both included."""

    KIND: ClassVar[str] = "integers"
    IS_PART: ClassVar[bool] = True

    low: int
    high: int

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, -math.inf)

    def sample(self, random: np.random.Generator) -> int:
        return int(random.integers(self.low, self.high + 1))

    def grid(self, points: int) -> list[Any]:
        return sorted({round(value) for value in np.linspace(self.low, self.high, points)})

    def distribution(self) -> BaseDistribution:
        return IntDistribution(self.low, self.high)

    def encode(self, value: Any) -> int:
        return int(value)

    def decode(self, drawn: Any) -> int:
        return int(drawn)

    def moved(self, value: Any, factor: float) -> Any:
        """The value itself: a size, which weights and states may have taken."""
        return value

    def in_words(self) -> str:
        return f"whole numbers from {self.low} to {self.high}"


Domain = Choice | Uniform | LogUniform | Integers
Domains = dict[str, Domain]


def _check_bounds(low: float, high: float, above: float) -> None:
    if not above < low < high < math.inf:
        bounds = "two finite numbers" if above < 0 else "two positive numbers"
        raise ValueError(f"low = {low}, high = {high}; accepted: {bounds}, low below high")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
