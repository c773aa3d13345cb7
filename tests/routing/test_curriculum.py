"""The kept ratio over the budget: the curriculum and its levels, the dynamic threshold, and what a restart keeps."""

import math

import numpy as np
import pytest
from test_tokens import SETTING, at

from cggr_ray.routing.curriculum import Curriculum, DynamicThreshold, ratio_levels, snap
from cggr_ray.routing.tokens import AllTokens, RandomTokens, SelectedTokens
from cggr_ray.schema import ROUTER_CONFIDENCE


@pytest.mark.parametrize(
    "curriculum, keep, fraction, expected",
    [
        (Curriculum(), 0.25, 0.0, 1.0),
        (Curriculum(), 0.25, 0.05, 0.625),
        (Curriculum(), 0.25, 0.1, 0.25),
        (Curriculum(), 0.25, 1.0, 0.25),
        (Curriculum(0.2, 0.6, 1.0), 0.5, 0.1, 1.0),
        (Curriculum(0.2, 0.6, 1.0), 0.5, 0.2, 1.0),
        (Curriculum(0.2, 0.6, 1.0), 0.5, 0.3, 0.875),
        (Curriculum(0.2, 0.6, 0.9), 0.5, 0.6, 0.5),
        (Curriculum(0.2, 0.6, 0.9), 0.5, 0.89, 0.5),
        (Curriculum(0.2, 0.6, 0.9), 0.5, 0.9, 1.0),
        (Curriculum(0.2, 0.6, 0.9), 0.5, 1.0, 1.0),
        (Curriculum(0.0, 0.0, 1.0), 0.1, 0.0, 0.1),
        (Curriculum(0.3, 0.3, 1.0), 0.1, 0.29, 1.0),
        (Curriculum(0.3, 0.3, 1.0), 0.1, 0.3, 0.1),
    ],
)
def test_curriculum_by_hand(curriculum, keep, fraction, expected):
    assert curriculum.ratio(keep, at(fraction=fraction)) == pytest.approx(expected, abs=1e-12)
    for part in (RandomTokens(keep=keep, curriculum=curriculum), SelectedTokens(keep=keep, curriculum=curriculum)):
        router = part.build(0, SETTING)
        snapped = router.ratio(at(fraction=fraction))
        # One of eight equal steps from keep to 1, and never fewer positions than asked for.
        assert snapped in router.levels() and -1e-9 <= snapped - expected < (1 - keep) / 8
        if expected in (keep, 1.0):
            assert snapped == expected


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.999, 1.0])
@pytest.mark.parametrize("below", [False, True])
def test_levels_hold_keep_and_one(keep, below):
    levels = ratio_levels(keep, below)
    assert keep in levels and levels[-1] == 1.0 and list(levels) == sorted(set(levels))
    assert levels[0] == pytest.approx(keep / 2 if below else keep) and len(levels) <= 13
    for ratio in np.linspace(levels[0], 1, 301):
        found = snap(float(ratio), levels)
        assert found in levels and found >= ratio - 1e-8
        assert not any(ratio <= level < found for level in levels)
    assert snap(keep, levels) == keep and snap(1.0, levels) == 1.0 and snap(keep + 1e-12, levels) == keep


# Dynamic threshold


@pytest.mark.parametrize(
    "base, confidence, sensitivity, expected",
    [
        (0.25, 0.0, 0.5, 0.375),
        (0.25, 0.9, 0.5, 0.2625),
        (0.25, 1.0, 0.5, 0.25),
        (0.8, 0.2, 0.5, 1.0),
        (0.5, 0.5, 0.0, 0.5),
        (0.4, 0.25, 1.0, 0.7),
    ],
)
def test_upstream_threshold_by_hand(base, confidence, sensitivity, expected):
    rule = DynamicThreshold(rule="upstream", sensitivity=sensitivity)
    assert rule.ratio(base, confidence, reference=0.123) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "base, confidence, reference, sensitivity, expected",
    [
        (0.25, 0.4, 0.4, 0.5, 0.25),
        # A quarter more confident than at the reference: an eighth fewer positions.
        (0.4, 0.5, 0.4, 0.5, 0.35),
        (0.4, 0.3, 0.4, 0.5, 0.45),
        (0.4, 0.9, 0.3, 0.5, 0.2),
        (0.8, 0.0, 0.5, 0.5, 1.0),
        (0.4, 0.9, 0.1, 0.0, 0.4),
    ],
)
def test_corrected_threshold_by_hand(base, confidence, reference, sensitivity, expected):
    rule = DynamicThreshold(rule="corrected", sensitivity=sensitivity)
    assert rule.ratio(base, confidence, reference) == pytest.approx(expected, abs=1e-12)


def test_upstream_router_uses_the_last_confidence():
    router = SelectedTokens(keep=0.25, dynamic=DynamicThreshold(rule="upstream")).build(0, SETTING)
    assert router.ratio(at(fraction=0.5)) == 0.25
    for confidence, expected in ((0.9, 0.2625), (0.0, 0.375), (1.0, 0.25)):
        router.observe({ROUTER_CONFIDENCE: confidence}, at(fraction=0.5))
        assert router.ratio(at(fraction=0.5)) == snap(expected, router.levels())
    # What was not measured, or is not a number, changes nothing; and a full step stays full.
    router.observe({ROUTER_CONFIDENCE: math.nan}, at())
    router.observe({}, at())
    assert router.ratio(at(fraction=0.5)) == 0.25
    router.observe({ROUTER_CONFIDENCE: 0.5}, at())
    assert router.ratio(at(fraction=0.0)) == 1.0


def test_corrected_router_by_hand():
    dynamic = DynamicThreshold(sensitivity=0.5, smoothing=0.5)
    router = SelectedTokens(keep=0.4, dynamic=dynamic, curriculum=Curriculum(0.0, 0.2, 0.9)).build(0, SETTING)
    assert router.levels()[:4] == pytest.approx([0.2, 0.25, 0.3, 0.35])
    router.observe({ROUTER_CONFIDENCE: 0.2}, at(fraction=0.1))
    # Before the target is reached nothing is compared with: the curriculum alone decides.
    assert router.ratio(at(fraction=0.1)) == snap(0.7, router.levels())
    router.observe({ROUTER_CONFIDENCE: 0.6}, at(fraction=0.2))
    # The running mean is 0.4, and so is the reference.
    assert router.ratio(at(fraction=0.3)) == pytest.approx(0.4)
    router.observe({ROUTER_CONFIDENCE: 0.6}, at(fraction=0.3))
    # 0.5: a quarter above the reference.
    assert router.ratio(at(fraction=0.4)) == pytest.approx(0.35)
    router.observe({ROUTER_CONFIDENCE: 1.0}, at(fraction=0.4))
    # 0.75: seven eighths of 0.4 less: 0.4 (1 - 0.5 * 0.875) = 0.225, and the next level is 0.25.
    assert router.ratio(at(fraction=0.5)) == pytest.approx(0.25)
    # Full steps at the end stay full, however confident the model is.
    assert router.ratio(at(fraction=0.95)) == 1.0


@pytest.mark.parametrize("part", [
    SelectedTokens(keep=0.4, dynamic=DynamicThreshold(smoothing=0.5)), SelectedTokens(), RandomTokens(), AllTokens(),
])  # fmt: skip
def test_state_survives_a_restart(part):
    def observed(router, values):
        for i, value in values:
            router.observe({ROUTER_CONFIDENCE: value}, at(fraction=i / 10))
            yield router.ratio(at(fraction=i / 10))

    values = list(enumerate([0.2, 0.5, 0.3, 0.9, 0.8, 0.1, 0.4, 0.7]))
    straight = part.build(0, SETTING)
    expected = list(observed(straight, values))
    first, second = part.build(0, SETTING), part.build(0, SETTING)
    found = list(observed(first, values[:4]))
    second.load_state_dict(first.state_dict())
    found += list(observed(second, values[4:]))
    assert found == expected and second.state_dict() == straight.state_dict()
