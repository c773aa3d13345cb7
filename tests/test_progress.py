from __future__ import annotations

import math

import pytest

from cggr_ray.progress import Budget, Progress, ramp


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, -math.inf])
def test_a_budget_is_a_positive_number(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"{seconds}"):
        Budget(seconds)


def test_a_budget_is_spent_from_its_last_second_on() -> None:
    budget = Budget(3)
    assert [budget.spent(s) for s in (0, 2.999, 3, 3.5)] == [False, False, True, True]


@pytest.mark.parametrize(("used", "fraction"), [(0, 0), (5, 0.25), (20, 1), (21, 1)])
def test_fraction_is_the_used_part_of_the_budget(used: float, fraction: float) -> None:
    assert Progress(step=7, train_seconds=used, budget_seconds=20, tokens_seen=0).fraction == fraction


@pytest.mark.parametrize(
    ("fraction", "start", "end", "expected"),
    [
        (0.0, 0.2, 0.6, 0.0),
        (0.2, 0.2, 0.6, 0.0),
        (0.3, 0.2, 0.6, 0.25),
        (0.5, 0.2, 0.6, 0.75),
        (0.6, 0.2, 0.6, 1.0),
        (0.9, 0.2, 0.6, 1.0),
        (0.0, 0.0, 0.0, 1.0),
        (0.29, 0.3, 0.3, 0.0),
        (0.3, 0.3, 0.3, 1.0),
        (0.31, 0.3, 0.3, 1.0),
    ],
)
def test_ramp(fraction: float, start: float, end: float, expected: float) -> None:
    assert ramp(fraction, start, end) == pytest.approx(expected, abs=1e-12)
