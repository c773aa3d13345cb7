"""The dynamic suffix against a replay of its whole rule from the list of what was measured, and in closed form."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from cggr_ray.progress import Progress
from cggr_ray.schema import KEPT_LOSS, RELEVANCE, SKIP_LOSS, TRAIN_LOSS
from cggr_ray.telemetry.jsonl import plain
from cggr_ray.updates.dynamic import Cadence, DynamicSuffix, Limits, Stability
from cggr_ray.updates.schedule import Learning, Schedule

STEPS, DELAY = 300, 2
Values = dict[str, Any]


def at(step: int, fraction: float | None = None) -> Progress:
    return Progress(step, float(step) if fraction is None else fraction * STEPS, float(STEPS), tokens_seen=0)


# The replay


def random_run(layers: int, seed: int) -> tuple[list[list[float]], list[float]]:
    """Relevance whose centre wanders through the layers, a loss that falls, stays, and rises; a few are not finite."""
    rng, slope = random.Random(seed), 0.0
    relevances, losses = [], []
    for step in range(STEPS):
        slope = 0.97 * slope + rng.gauss(0, 0.6)
        relevances.append([math.exp(slope * i / layers + rng.gauss(0, 0.3)) for i in range(layers)])
        losses.append((2 + math.exp(-step / 20) + 0.4 * math.sin(step / 60) ** 2) * math.exp(rng.gauss(0, 0.01)))
        if rng.random() < 0.05:
            relevances[-1][rng.randrange(layers)] = rng.choice([math.nan, math.inf])
        if rng.random() < 0.02:
            losses[-1] = rng.choice([math.nan, math.inf])
    return relevances, losses


def exact_levels(config: DynamicSuffix, layers: int) -> list[int]:
    low, high = Fraction(str(config.smallest)), Fraction(str(config.largest))
    spaced = [low + (high - low) * Fraction(i, max(1, config.levels - 1)) for i in range(config.levels)]
    return sorted({max(1, math.floor(layers * fraction + Fraction(1, 2))) for fraction in spaced})


def steady(gate: Stability, losses: list[float]) -> bool:
    losses = [loss for loss in losses if math.isfinite(loss)]
    if len(losses) < 2 * gate.window:
        return False
    early, late = losses[-2 * gate.window : -gate.window], losses[-gate.window :]
    change = abs(statistics.fmean(late) / statistics.fmean(early) - 1) * statistics.fmean(early)
    return (
        change < gate.mean_change * statistics.fmean(late)
        and statistics.pstdev(late) / statistics.fmean(late) < gate.variation
    )


def asked_for(config: DynamicSuffix, levels: list[int], measured: list[list[float]], raised: int) -> int:
    """The level that holds enough of the averages, which are taken from all measurements, unbiased."""
    weights = [config.beta ** (len(measured) - 1 - i) for i in range(len(measured))]
    averages = [
        sum(w * m for w, m in zip(weights, of_layer, strict=True)) / sum(weights)
        for of_layer in zip(*measured, strict=True)
    ]
    may_miss = (1 - config.threshold) * sum(averages)
    layers = len(averages)
    depth = min(k for k in range(1, layers + 1) if sum(averages[: layers - k]) <= may_miss)
    allowed = levels[raised:] if raised >= 0 else levels[:raised]
    return min([level for level in allowed if level >= depth], default=allowed[-1])


def replay(config: DynamicSuffix, layers: int, relevances: list[list[float]], losses: list[float]) -> list[Learning]:
    """Every answer of a run, by the rule as it is written down."""
    levels = exact_levels(config, layers)
    answers: list[Learning] = []
    measured: list[list[float]] = []
    asked: list[int] = []
    average = reference = math.nan
    depth, every, due, kept_in_a_row, raised, started = layers, config.cadence.first, 0, 0, 0, False
    for step in range(STEPS):
        seen = step - DELAY
        good = seen >= 0 and answers[seen].probe and all(map(math.isfinite, [*relevances[seen], losses[seen]]))
        if good:
            measured.append(relevances[seen])
            if (limits := config.limits) is not None:
                first = len(measured) == 1
                average = losses[seen] if first else average + (1 - limits.beta) * (losses[seen] - average)
                reference = average if first else reference
                up, down = average / reference > limits.upper, average / reference < limits.lower
                if up or down:
                    reference = average
                    raised = sorted((1 - len(levels), raised + (1 if up else -1), len(levels) - 1))[1]
            asked.append(asked_for(config, levels, measured, raised))
            agreed = len(asked) >= config.hysteresis and len(set(asked[-config.hysteresis :])) == 1
            if asked[-1] == depth:
                kept_in_a_row += 1
                if kept_in_a_row in (3, 6, 9, 12, 15, 18, 21, 24, 27, 30):
                    every = min(2 * every, config.cadence.longest)
            else:
                kept_in_a_row = 0
                if agreed:
                    depth, every = asked[-1], max(every // 2, config.cadence.shortest)
            due = seen + every
        if config.full_from < 1 and step >= config.full_from * STEPS:
            answers.append(Learning((True,) * layers))
            continue
        gate = config.stability is None or steady(config.stability, losses[: step - DELAY + 1])
        started |= bool(measured) and step >= config.full_until * STEPS and gate
        probe = step >= due
        due = step + every if probe else due
        learning = depth if started and not probe else layers
        answers.append(Learning(tuple(i >= layers - learning for i in range(layers)), probe))
    return answers


def values_of(learning: Learning, relevance: list[float], loss: float, name: str = TRAIN_LOSS) -> Values:
    return {name: loss, **({RELEVANCE: relevance} if learning.probe else {})}


def run(config: DynamicSuffix, layers: int, seed: int, reload: bool = False, name: str = TRAIN_LOSS) -> list[Learning]:
    """Every answer of the schedule in the loop's order; `reload`: saved and loaded into a new one before every call."""

    def again(schedule: Schedule) -> Schedule:
        if not reload:
            return schedule
        fresh = config.build(layers, seed)
        fresh.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
        return fresh

    schedule, (relevances, losses), answers = config.build(layers, seed), random_run(layers, seed), list[Learning]()
    for step in range(STEPS):
        if step >= DELAY:
            seen = step - DELAY
            schedule = again(schedule)
            values = values_of(answers[seen], relevances[seen], losses[seen], name)
            schedule.observe(json.loads(json.dumps(plain(values))) if reload else values, at(seen))
        schedule = again(schedule)
        answers.append(schedule.begin(at(step)))
    assert set(answers) <= set(schedule.reachable())
    return answers


QUICK = DynamicSuffix(cadence=Cadence(first=5, shortest=2, longest=20), full_until=0.1, beta=0.6, threshold=0.7)
MOVED = Limits(upper=1.01, lower=0.99, beta=0.7)
GATE = Stability(window=8, mean_change=0.02, variation=0.02)
GRID = {
    "as it comes": (DynamicSuffix(), 12),
    "quick": (QUICK, 12),
    "fixed cadence": (replace(QUICK, cadence=Cadence(3, 3, 3)), 12),
    "a probe every step": (replace(QUICK, cadence=Cadence(1, 1, 1)), 12),
    "stability": (replace(QUICK, stability=GATE), 12),
    "stability alone": (replace(QUICK, full_until=0.0, stability=GATE), 12),
    "limits": (replace(QUICK, limits=MOVED), 12),
    "limits, fixed cadence": (replace(QUICK, limits=MOVED, cadence=Cadence(2, 2, 2)), 12),
    "hysteresis 1": (replace(QUICK, hysteresis=1), 12),
    "hysteresis 3": (replace(QUICK, hysteresis=3, levels=3), 12),
    "largest below 1": (replace(QUICK, largest=0.6), 12),
    "largest below 1, limits": (replace(QUICK, smallest=0.1, largest=0.6, limits=MOVED), 12),
    "every layer a level": (replace(QUICK, smallest=0.01, levels=50), 12),
    "three layers": (replace(QUICK, limits=MOVED), 3),
    "two layers": (replace(QUICK, smallest=0.5, threshold=0.6), 2),
    "one layer": (replace(QUICK, limits=MOVED), 1),
    "one level": (replace(QUICK, levels=1, limits=MOVED), 12),
    "threshold 1": (replace(QUICK, threshold=1.0), 12),
    "threshold 1, limits": (replace(QUICK, threshold=1.0, largest=0.7, limits=MOVED), 12),
    "no average": (replace(QUICK, beta=0.0), 12),
    "no edges": (replace(QUICK, full_until=0.0, full_from=1.0), 12),
    "full throughout": (replace(QUICK, full_until=0.5, full_from=0.5), 12),
    "all at once": (replace(QUICK, stability=GATE, limits=MOVED, hysteresis=3, largest=0.8, threshold=0.6), 30),
}
# Where there is but one depth to come to, or none.
ONE_DEPTH = {"one layer", "a probe every step", "full throughout", "threshold 1", "one level"}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("setting", GRID)
def test_every_answer_is_that_of_a_replay(setting: str, seed: int) -> None:
    config, layers = GRID[setting]
    expected = replay(config, layers, *random_run(layers, seed))
    for step, (found, right) in enumerate(zip(run(config, layers, seed), expected, strict=True)):
        assert found == right, f"step {step}"
    depths = {sum(active) for active, _ in expected}
    assert len(depths) >= (1 if setting in ONE_DEPTH else 2), "the run moves nothing"


@pytest.mark.parametrize("setting", ["as it comes", "stability", "limits", "all at once"])
def test_a_schedule_that_is_loaded_goes_on_as_it_would_have(setting: str) -> None:
    config, layers = GRID[setting]
    assert run(config, layers, seed=4, reload=True) == run(config, layers, seed=4)


def test_every_loss_that_a_recipe_has_will_do() -> None:
    config = replace(QUICK, stability=GATE, limits=MOVED)
    runs = [run(config, 12, seed=3, name=name) for name in (TRAIN_LOSS, KEPT_LOSS, SKIP_LOSS)]
    assert runs[0] == runs[1] == runs[2] and len({sum(active) for active, _ in runs[0]}) > 2


# In closed form

AT_ONCE = DynamicSuffix(beta=0.5, hysteresis=1, full_until=0.0, cadence=Cadence(100, 100, 100))


def depth_after(config: DynamicSuffix, relevance: list[float], probes: int = 1) -> int:
    """Layers that learn once so many probes have found this."""
    schedule = config.build(len(relevance), seed=0)
    for step in range(0, 100 * probes, 100):
        assert schedule.begin(at(step, 0.5)) == Learning((True,) * len(relevance), probe=True)
        schedule.observe({TRAIN_LOSS: 3.0, RELEVANCE: relevance}, at(step, 0.5))
    learning = schedule.begin(at(100 * probes - 1, 0.5))
    assert not learning.probe and sorted(learning.active) == list(learning.active)
    return sum(learning.active)


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 12, 30])
@pytest.mark.parametrize("threshold", [0.03, 0.26, 0.5, 0.62, 0.85, 0.97, 1.0])
def test_flat_relevance_asks_for_the_threshold_itself(threshold: float, layers: int) -> None:
    exact = math.ceil(Fraction(str(threshold)) * layers)
    for config in (replace(AT_ONCE, threshold=threshold, smallest=0.01, levels=200),
                   replace(AT_ONCE, threshold=threshold, levels=3)):  # fmt: skip
        expected = min(level for level in exact_levels(config, layers) if level >= exact)
        for probes in (1, 4):
            assert depth_after(config, [1.0] * layers, probes) == expected


def test_relevance_at_one_end_asks_for_the_smallest_or_the_largest_level() -> None:
    for levels, smallest, largest in ((6, 3, 9), (1, 3, 3)):
        config = replace(AT_ONCE, largest=0.75, levels=levels)
        assert depth_after(config, [0.0] * 11 + [2.0]) == smallest
        assert depth_after(config, [2.0] + [0.0] * 11) == largest


def test_layers_of_no_relevance_are_left_out_at_a_threshold_of_one() -> None:
    config = replace(AT_ONCE, beta=0.0, threshold=1.0, smallest=0.01, levels=50)
    assert depth_after(config, [0.0, 0.0, 0.1, 0.2, 0.3]) == 3


def test_layers_whose_update_raises_the_loss_hold_nothing() -> None:
    config = replace(AT_ONCE, beta=0.0, threshold=0.7, smallest=0.01, levels=50)
    assert depth_after(config, [1.0, -9.0, 1.0, -9.0, 1.0]) == 5
    assert depth_after(config, [-9.0, 1.0, 1.0, -9.0, 1.0]) == 4
    assert depth_after(config, [0.0] * 5) == depth_after(config, [-1.0] * 5) == 5


@pytest.mark.parametrize("hysteresis", [1, 2, 3])
def test_as_many_probes_in_a_row_as_hysteresis_says_change_the_depth(hysteresis: int) -> None:
    config = replace(AT_ONCE, hysteresis=hysteresis)
    top = [0.0] * 11 + [1.0]
    assert [depth_after(config, top, probes) for probes in (1, 2, 3)] == [12] * (hysteresis - 1) + [3] * (
        4 - hysteresis
    )


@pytest.mark.parametrize("relevance, loss", [([math.nan, 1.0, 1.0, 9.0], 3.0), ([1.0, 1.0, 9.0, math.inf], 3.0),
                                             ([1.0, 1.0, 1.0, 9.0], math.nan),
                                             ([9.0, 1.0, 1.0, 1.0], math.inf)])  # fmt: skip
def test_what_is_not_finite_changes_nothing(relevance: list[float], loss: float) -> None:
    config = replace(AT_ONCE, limits=MOVED, stability=Stability(window=2))
    schedule = config.build(4, seed=0)
    for step in range(5):
        learning = schedule.begin(at(step, 0.5))
        schedule.observe(values_of(learning, [1.0, 1.0, 5.0, 9.0], 3.0), at(step, 0.5))
    before = schedule.state_dict()
    schedule.observe({TRAIN_LOSS: loss, RELEVANCE: relevance}, at(5, 0.5))
    after = schedule.state_dict()
    if math.isfinite(loss):
        # A finite loss still says whether losses are steady.
        assert after.pop("losses") == before.pop("losses")
    assert after == before


def test_the_first_measurement_may_be_lost() -> None:
    schedule = AT_ONCE.build(4, seed=0)
    schedule.observe({TRAIN_LOSS: 3.0, RELEVANCE: [math.nan] * 4}, at(0, 0.5))
    assert [schedule.begin(at(step, 0.5)).probe for step in range(201)] == [step % 100 == 0 for step in range(201)]
    assert schedule.begin(at(201, 0.5)) == Learning((True,) * 4)


# When it starts, and when it ends


def starts(config: DynamicSuffix, fractions: list[float], losses: list[float], measured_at: int = 0) -> list[bool]:
    """Of each step, whether less than everything learns, where the top layer alone matters."""
    schedule, found = config.build(4, seed=0), []
    for step, (fraction, loss) in enumerate(zip(fractions, losses, strict=True)):
        found.append(not all(schedule.begin(at(step, fraction)).active))
        relevance = {RELEVANCE: [0.0, 0.0, 0.0, 1.0]} if step == measured_at else {}
        schedule.observe({TRAIN_LOSS: loss, **relevance}, at(step, fraction))
    return found


def test_it_starts_at_full_until_and_never_goes_back() -> None:
    config = replace(AT_ONCE, full_until=0.25)
    assert starts(config, [0.0, 0.1, 0.2499, 0.25, 0.3, 0.89], [3.0] * 6) == [False] * 3 + [True] * 3


def test_it_starts_no_earlier_than_the_first_measurement() -> None:
    assert starts(AT_ONCE, [0.5] * 7, [3.0] * 7, measured_at=4) == [False] * 5 + [True] * 2
    # Steady losses before there is a measurement are no start, which comes while they are not.
    config, losses = replace(AT_ONCE, stability=Stability(window=2)), [3.0, 3.0, 3.0, 3.0, 9.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    assert starts(config, [0.5] * 10, losses, measured_at=4) == [False] * 9 + [True]


@pytest.mark.parametrize("spread, expected", [(0.09, True), (0.11, False)])
def test_losses_that_vary_are_not_steady_around_one_mean(spread: float, expected: bool) -> None:
    losses = [1.0] * 4 + [1 + spread, 1 - spread] * 2
    assert Stability(window=4, variation=0.1).steady(losses) is expected


def test_it_starts_once_losses_are_steady() -> None:
    config = replace(AT_ONCE, stability=Stability(window=2, mean_change=0.02, variation=0.05))
    # Means of pairs: too short, then a change of 5 %, then steady; what comes later stops nothing.
    assert starts(config, [0.5] * 7, [1.05, 1.05, 1.0, 1.0, 1.0, 9.0, 1.0])[:5] == [False] * 5
    assert starts(config, [0.5] * 8, [1.05, 1.05, 1.0, 1.0, 1.0, 1.0, 9.0, 1.0]) == [False] * 6 + [True] * 2
    assert starts(config, [0.5] * 7, [1.0] * 7) == [False] * 4 + [True] * 3
    # Equal means, but losses that swing by 10 % about them.
    assert not any(starts(config, [0.5] * 20, [0.9, 1.1] * 10))
    assert any(starts(replace(config, stability=Stability(2, 0.02, 0.11)), [0.5] * 20, [0.9, 1.1] * 10))


def test_recovery_starts_exactly_at_full_from_and_makes_no_probe() -> None:
    schedule = replace(AT_ONCE, full_from=0.75).build(4, seed=0)
    schedule.begin(at(0, 0.1))
    schedule.observe({TRAIN_LOSS: 3.0, RELEVANCE: [0.0, 0.0, 0.0, 1.0]}, at(0, 0.1))
    assert schedule.begin(at(1, 0.7499)) == Learning((False, False, False, True))
    state = schedule.state_dict()
    for step, fraction in ((2, 0.75), (100, 0.8), (101, 0.99), (500, 1.0), (501, 1.2)):
        assert schedule.begin(at(step, fraction)) == Learning((True,) * 4)
    assert schedule.state_dict() == state


# Parts of it


def test_limits_move_a_level_at_a_time_and_stop_at_the_ends() -> None:
    config = replace(AT_ONCE, cadence=Cadence(1, 1, 1), limits=Limits(1.1, 0.9, beta=0.0), levels=4)
    # Levels 3, 6, 9, 12, of which relevance alone would ask for the second; losses and the depth that they lead to.
    relevance = [0.0] * 6 + [1.0] + [0.0] * 5
    by_hand = [(1.0, 6), (1.2, 6), (1.25, 6), (1.4, 9), (1.6, 12), (1.8, 12), (1.5, 9), (1.3, 6), (1.1, 6), (0.9, 6)]
    by_hand += [(0.8, 6), (0.7, 3), (0.6, 3), (0.5, 3), (0.54, 3), (0.7, 6), (1.0, 6)]
    schedule = config.build(12, seed=0)
    for loss, depth in by_hand:
        schedule.observe({TRAIN_LOSS: loss, RELEVANCE: relevance}, at(0, 0.5))
        assert schedule.state_dict()["depth"] == depth, loss


def test_the_cadence_by_hand() -> None:
    schedule = replace(AT_ONCE, beta=0.0, cadence=Cadence(4, 3, 20)).build(4, seed=0)
    top, flat = [0.0, 0.0, 0.0, 1.0], [1.0] * 4
    # A change halves, three alike double, within bounds.
    found = [top, top, top, top, flat, flat, flat, flat, flat, flat, flat, flat, flat, flat, top, flat, top]
    intervals = []
    for relevance in found:
        schedule.observe({TRAIN_LOSS: 3.0, RELEVANCE: relevance}, at(0, 0.5))
        intervals.append(schedule.state_dict()["every"])
    assert intervals == [3, 3, 3, 6, 3, 3, 3, 6, 6, 6, 12, 12, 12, 20, 10, 5, 3]
