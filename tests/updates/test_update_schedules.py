"""Fixed and random schedules: windows by hand, draws against their distribution, kinds of layers by enumeration."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from scipy.stats import chisquare

from cggr_ray.progress import Progress
from cggr_ray.updates.dynamic import Cadence, DynamicSuffix, Limits, Stability
from cggr_ray.updates.fixed import FullUpdate, StaticSuffix
from cggr_ray.updates.random import RandomBlocks, RandomSuffix
from cggr_ray.updates.schedule import Active, Learning, levels_between, part_of

Part = FullUpdate | StaticSuffix | RandomBlocks | RandomSuffix
DRAWS = 1500


def at(step: int = 0, seconds: float = 50.0) -> Progress:
    """A point in a budget of 100 seconds."""
    return Progress(step, seconds, 100.0, tokens_seen=0)


def counted(part: Part, layers: int, seed: int = 0) -> Counter[Active]:
    """How often every answer comes in the middle of the budget."""
    schedule = part.build(layers, seed)
    return Counter(schedule.begin(at(step)).active for step in range(DRAWS))


# Numbers of layers


def exact_part(layers: int, fraction: Fraction) -> int:
    """The nearest whole number of layers, found by looking at all of them; the larger of two as near."""
    return min(range(1, layers + 1), key=lambda n: (abs(n - fraction * layers), -n))


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 30])
def test_parts_and_levels_against_exact_fractions(layers: int) -> None:
    for percent in range(1, 101):
        assert part_of(layers, percent / 100) == exact_part(layers, Fraction(percent, 100)), percent
    for low, high, levels in itertools.product((5, 25, 50), (50, 75, 100), (1, 2, 3, 6, 40)):
        spaced = [Fraction(low) + Fraction((high - low) * i, max(1, levels - 1)) for i in range(levels)]
        expected = sorted({exact_part(layers, percent / 100) for percent in spaced})
        assert list(levels_between(layers, low / 100, high / 100, levels)) == expected, (low, high, levels)


def test_levels_by_hand() -> None:
    assert levels_between(30, 0.25, 1.0, 6) == (8, 12, 17, 21, 26, 30)
    assert levels_between(5, 0.25, 1.0, 6) == (1, 2, 3, 4, 5)
    assert levels_between(1, 0.25, 1.0, 6) == (1,)
    assert levels_between(30, 0.5, 1.0, 1) == (15,)


# Fixed


@pytest.mark.parametrize("seconds", [0.0, 19.9, 20.0, 50.0, 79.9, 80.0, 100.0, 120.0])
def test_a_static_suffix_learns_inside_its_window(seconds: float) -> None:
    last, every = (False, False, True), (True, True, True)
    windows = {(0.0, 1.0): (0.0, 999.0), (0.2, 0.8): (20.0, 80.0), (0.2, 1.0): (20.0, 999.0), (0.5, 0.5): (0.0, 0.0)}
    for (full_until, full_from), (start, end) in windows.items():
        schedule = StaticSuffix(1 / 3, full_until, full_from).build(3, seed=0)
        expected = Learning(last if start <= seconds < end else every)
        assert schedule.begin(at(7, seconds)) == expected and expected in schedule.reachable()


def test_a_suffix_of_all_layers_is_a_full_update() -> None:
    for part in (FullUpdate(), StaticSuffix(1.0), RandomBlocks(1.0), RandomSuffix(1.0, 1.0)):
        schedule = part.build(4, seed=0)
        assert schedule.reachable() == [Learning((True,) * 4)]
        assert {schedule.begin(at(step)) for step in range(50)} == {Learning((True,) * 4)}


# Random


@pytest.mark.parametrize("layers, keep, learning", [(1, 0.3, 1), (5, 0.4, 2), (5, 0.5, 3), (7, 0.99, 7), (30, 0.1, 3)])
def test_random_blocks_keep_the_exact_number(layers: int, keep: float, learning: int) -> None:
    schedule = RandomBlocks(keep, every=1).build(layers, seed=3)
    answers = [schedule.begin(at(step)) for step in range(100)]
    assert {(len(active), sum(active), probe) for active, probe in answers} == {(layers, learning, False)}


def test_random_blocks_are_uniform() -> None:
    found = counted(RandomBlocks(0.4, every=1), layers=5, seed=1)
    # All ten pairs are as likely as each other, and so is every layer.
    assert len(found) == 10 and chisquare(list(found.values())).pvalue > 1e-3
    for layer in range(5):
        times = sum(number for active, number in found.items() if active[layer])
        assert abs(times - 0.4 * DRAWS) < 4 * math.sqrt(DRAWS * 0.4 * 0.6)


@pytest.mark.parametrize("layers, levels", [(12, (3, 5, 7, 8, 10, 12)), (3, (1, 2, 3)), (1, (1,))])
def test_random_suffixes_are_uniform_over_the_levels(layers: int, levels: tuple[int, ...]) -> None:
    found = counted(RandomSuffix(every=1), layers, seed=2)
    assert set(found) == {(False,) * (layers - k) + (True,) * k for k in levels}
    assert chisquare(list(found.values())).pvalue > 1e-3 if len(levels) > 1 else len(found) == 1
    mean = sum(levels) / len(levels)
    spread = math.sqrt(sum((k - mean) ** 2 for k in levels) / len(levels) / DRAWS)
    assert abs(sum(sum(active) * number for active, number in found.items()) / DRAWS - mean) <= 4 * spread


@pytest.mark.parametrize("part", [RandomBlocks(every=20), RandomSuffix(every=20)])
def test_draws_are_held_and_then_made_anew(part: Part) -> None:
    schedule = part.build(24, seed=5)
    answers = [schedule.begin(at(step)).active for step in range(30 * 20)]
    periods = [set(answers[start : start + 20]) for start in range(0, len(answers), 20)]
    assert all(len(period) == 1 for period in periods)
    # Two draws in a row may be the same suffix by chance, one in six.
    assert sum(a != b for a, b in itertools.pairwise(periods)) > 15


@pytest.mark.parametrize("part", [RandomBlocks(every=7), RandomSuffix(every=7)])
def test_draws_depend_on_seed_and_step_alone(part: Part) -> None:
    schedule = part.build(24, seed=5)
    answers = [schedule.begin(at(step)) for step in range(400)]
    resumed = part.build(24, seed=5)
    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    resumed.observe({"train/loss": 1.0}, at(3))
    assert [resumed.begin(at(step, 99.0)) for step in reversed(range(400))] == answers[::-1]
    assert [part.build(24, seed=6).begin(at(step)) for step in range(400)] != answers


@pytest.mark.parametrize("part", [RandomBlocks(every=1, full_until=0.2, full_from=0.8),
                                  RandomSuffix(0.25, 0.5, every=1, full_until=0.2, full_from=0.8)])  # fmt: skip
def test_nothing_is_drawn_at_the_edges_of_the_budget(part: Part) -> None:
    schedule = part.build(8, seed=0)
    for seconds, full in ((0.0, True), (19.9, True), (20.0, False), (79.9, False), (80.0, True), (100.0, True)):
        assert {all(schedule.begin(at(step, seconds)).active) for step in range(20)} == {full}


def kinds(active: Active) -> set[tuple[bool, bool]]:
    """Of every layer: whether something below it learns, so that its input has a gradient, and whether it learns.

    The embedding learns where the first layer does."""
    return {(any(active[:i]) or active[0], learns) for i, learns in enumerate(active)}


def drawable(layers: int, learning: int) -> list[Active]:
    return [tuple(i in some for i in range(layers)) for some in itertools.combinations(range(layers), learning)]


@pytest.mark.parametrize("layers, learning", [(n, k) for n in (1, 2, 3, 4, 6, 7) for k in range(1, n + 1)])
def test_every_kind_of_layer_of_random_blocks_is_reachable(layers: int, learning: int) -> None:
    reachable = RandomBlocks(learning / layers).build(layers, seed=0).reachable()
    assert reachable[0] == Learning((True,) * layers) and len(set(reachable)) == len(reachable)
    assert {sum(answer.active) for answer in reachable[1:]} <= {learning}
    wanted = set().union(*map(kinds, drawable(layers, learning)))
    assert set().union(*(kinds(answer.active) for answer in reachable)) >= wanted


def test_every_random_suffix_is_reachable() -> None:
    for layers in (1, 2, 3, 9):
        part = RandomSuffix(0.25, 0.75, every=1)
        reachable = part.build(layers, seed=0).reachable()
        assert len(set(reachable)) == len(reachable) and reachable[0] == Learning((True,) * layers)
        assert {Learning(active) for active in counted(part, layers)} | {reachable[0]} == set(reachable)


# What is refused

REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (StaticSuffix, {"keep": 0.0}, "keep = 0.0"),
    (StaticSuffix, {"keep": 1.5}, "keep = 1.5"),
    (StaticSuffix, {"keep": math.nan}, "keep = nan"),
    (StaticSuffix, {"full_until": -0.1}, "full_until = -0.1"),
    (StaticSuffix, {"full_until": 0.6, "full_from": 0.5}, "full_until = 0.6, full_from = 0.5"),
    (StaticSuffix, {"full_from": 1.1}, "full_from = 1.1"),
    (RandomBlocks, {"keep": -1.0}, "keep = -1.0"),
    (RandomBlocks, {"every": 0}, "every = 0"),
    (RandomBlocks, {"full_from": 2.0}, "full_from = 2.0"),
    (RandomSuffix, {"smallest": 0.0}, "smallest = 0.0"),
    (RandomSuffix, {"largest": 1.01}, "largest = 1.01"),
    (RandomSuffix, {"smallest": 0.6, "largest": 0.5}, "smallest = 0.6, largest = 0.5"),
    (RandomSuffix, {"levels": 0}, "levels = 0"),
    (RandomSuffix, {"every": -2}, "every = -2"),
    (RandomSuffix, {"full_until": 1.2}, "full_until = 1.2"),
    (DynamicSuffix, {"smallest": -0.5}, "smallest = -0.5"),
    (DynamicSuffix, {"largest": 0.0}, "largest = 0.0"),
    (DynamicSuffix, {"levels": -1}, "levels = -1"),
    (DynamicSuffix, {"full_from": 0.1}, "full_from = 0.1"),
    (DynamicSuffix, {"beta": 1.0}, "beta = 1.0"),
    (DynamicSuffix, {"beta": -0.1}, "beta = -0.1"),
    (DynamicSuffix, {"threshold": 0.0}, "threshold = 0.0"),
    (DynamicSuffix, {"threshold": 1.1}, "threshold = 1.1"),
    (DynamicSuffix, {"hysteresis": 0}, "hysteresis = 0"),
    (Cadence, {"shortest": 0}, "shortest=0"),
    (Cadence, {"first": 5}, "first=5"),
    (Cadence, {"first": 300}, "first=300"),
    (Limits, {"lower": 0.0}, "lower=0.0"),
    (Limits, {"lower": 1.0}, "lower=1.0"),
    (Limits, {"upper": 1.0}, "upper=1.0"),
    (Limits, {"beta": 1.0}, "beta=1.0"),
    (Limits, {"beta": -0.5}, "beta=-0.5"),
    (Stability, {"window": 1}, "window=1"),
    (Stability, {"mean_change": 0.0}, "mean_change=0.0"),
    (Stability, {"variation": -1.0}, "variation=-1.0"),
]


@pytest.mark.parametrize("part, values, named", REFUSED)
def test_what_is_refused_is_named(part: Callable[..., Any], values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as refused:
        part(**values)
    assert named in str(refused.value) and "accepted: " in str(refused.value)


def test_the_edges_of_what_is_accepted() -> None:
    RandomSuffix(1.0, 1.0, levels=1, every=1, full_until=0.0, full_from=0.0)
    DynamicSuffix(beta=0.0, threshold=1.0, hysteresis=1, full_until=1.0, full_from=1.0)
    assert (Cadence(1, 1, 1), Limits(beta=0.0), Stability(window=2)) is not None
