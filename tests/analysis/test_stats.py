"""Tests, corrections and detectable differences against scipy, brute force, hand examples and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from analysis.stats import (
    SIGNS,
    STUDENT,
    detectable,
    detectable_effect,
    holm,
    mean_interval,
    paired_p,
    sign_flip_p,
    spread_factors,
    student_p,
    which_test,
)

# The 97.5 % quantile of Student's t with one degree of freedom, tan(0.475 pi).
T_ONE = math.tan(0.475 * math.pi)


def test_mean_interval_agrees_with_scipy() -> None:
    values = [2.31, 2.35, 2.28, 2.40, 2.33]
    for confidence in (0.8, 0.95, 0.99):
        mean, half = mean_interval(values, confidence)
        low, high = stats.ttest_1samp(values, 0).confidence_interval(confidence)
        assert mean == pytest.approx(np.mean(values)) and half == pytest.approx((high - low) / 2)


def test_mean_interval_of_few_values() -> None:
    assert mean_interval([1.0, 3.0]) == pytest.approx((2.0, T_ONE))
    mean, half = mean_interval([7.0])
    assert mean == 7.0 and math.isnan(half)
    assert all(math.isnan(value) for value in (*mean_interval([]), *mean_interval([1.0, math.nan])))
    with pytest.raises(ValueError, match="95"):
        mean_interval([1.0], confidence=95)


@pytest.mark.parametrize("pairs", [2, 3, 5])
def test_below_six_pairs_it_is_scipys_paired_t(pairs: int) -> None:
    rng = np.random.default_rng(pairs)
    own, other = rng.normal(0.4, 1, pairs), rng.normal(0, 1, pairs)
    assert paired_p(own - other) == pytest.approx(stats.ttest_rel(own, other).pvalue)


@pytest.mark.parametrize("pairs", [6, 7, 9])
def test_from_six_pairs_on_it_is_every_way_to_give_signs(pairs: int) -> None:
    differences = np.random.default_rng(pairs).normal(0.5, 1, pairs)
    means = [abs(np.mean(differences * signs)) for signs in itertools.product((1, -1), repeat=pairs)]
    expected = np.mean([mean >= abs(differences.mean()) - 1e-12 for mean in means])
    assert paired_p(differences) == pytest.approx(expected)
    assert paired_p(-differences) == pytest.approx(expected)


def test_the_smallest_p_of_six_pairs_is_that_of_two_signs_in_sixty_four() -> None:
    assert paired_p([0.5, 0.1, 0.3, 0.2, 0.9, 0.4]) == pytest.approx(2 / 64)


def test_ties_of_scores_count_although_they_are_rounded() -> None:
    """Right answers of 1319 in seven pairs: whole numbers know no rounding."""
    own, other = [427, 916, 798, 1010, 914, 965, 447], [426, 915, 797, 1008, 912, 966, 442]
    gains = np.subtract(own, other)
    sums = [abs(int(np.dot(gains, signs))) for signs in itertools.product((1, -1), repeat=7)]
    expected = np.mean([found >= gains.sum() for found in sums])
    assert expected == 10 / 128 and sign_flip_p(np.divide(own, 1319) - np.divide(other, 1319)) == expected
    even = np.array([0.31, 0.42, 0.53, 0.64, 0.75, 0.86]) - [0.30, 0.43, 0.52, 0.65, 0.74, 0.87]
    assert sign_flip_p(even) == 1


def test_more_pairs_than_can_be_enumerated_are_drawn() -> None:
    differences = np.random.default_rng(3).normal(0.35, 1, 30)
    assert sign_flip_p(differences) == sign_flip_p(differences)
    assert sign_flip_p(differences) == pytest.approx(student_p(differences), abs=0.02)


def test_signs_are_tested_only_where_they_can_pass_the_correction() -> None:
    assert which_test(5) == STUDENT and which_test(6) == SIGNS
    assert which_test(6, comparisons=2) == STUDENT  # 2 x 2/64 > 0.05
    assert which_test(7, comparisons=3) == SIGNS and which_test(7, comparisons=4) == STUDENT
    differences = [0.5, 0.1, 0.3, 0.2, 0.9, 0.4]
    assert paired_p(differences, comparisons=2) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_pairs_that_prove_nothing_have_no_p() -> None:
    assert math.isnan(paired_p([])) and math.isnan(paired_p([1.0])) and math.isnan(paired_p([1.0, math.nan, 2.0]))


def test_pairs_that_agree_exactly_differ_by_nothing() -> None:
    assert paired_p([0.0] * 3) == 1 and paired_p([0.0] * 8) == 1
    assert paired_p([0.25] * 3) == 0  # the same difference every time, as with a fixed clock
    # One pair that does is a pair as any other.
    assert paired_p([0.0, 1.0, 2.0]) == pytest.approx(stats.ttest_1samp([0.0, 1.0, 2.0], 0).pvalue)


def test_holm_by_hand() -> None:
    # 0.01 x 4, 0.02 x 3, then 0.03 x 2 and 0.04 x 1, which may not fall below the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == [] and holm([0.03]) == [0.03]


def test_holm_does_not_count_what_was_not_tested() -> None:
    adjusted = holm([math.nan, 0.02, 0.01])
    assert math.isnan(adjusted[0]) and adjusted[1:] == pytest.approx([0.02, 0.02])


@pytest.mark.parametrize(("pairs", "alpha"), [(2, 0.05), (3, 0.05), (5, 0.01), (8, 0.05)])
def test_a_detectable_difference_is_detected_with_its_chance(pairs: int, alpha: float) -> None:
    effect = detectable_effect(pairs, alpha)
    draws = np.random.default_rng(0).normal(effect, 1, (40_000, pairs))
    found = np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue <= alpha)
    assert found == pytest.approx(0.8, abs=0.01)


def test_detectable_is_in_the_unit_of_the_differences() -> None:
    differences = [0.1, 0.3, 0.2, 0.6]
    expected = np.std(differences, ddof=1) * detectable_effect(4)
    assert detectable(differences) == pytest.approx(expected)
    assert detectable(1000 * np.array(differences)) == pytest.approx(1000 * expected)
    assert detectable([0.1, 0.4]) == pytest.approx(np.std([0.1, 0.4], ddof=1) * detectable_effect(2))
    for sample in ([0.2, 0.2], [0.31 - 0.30, 0.41 - 0.40], [0.2], [0.2, math.nan]):
        assert math.isnan(detectable(sample))
    assert detectable(differences, alpha=0.01) > detectable(differences)


def test_a_level_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha 0\.9 and chance 0\.8; accepted: 0 < alpha < chance < 1"):
        detectable_effect(3, alpha=0.9)


@pytest.mark.parametrize("pairs", [2, 3, 8])
def test_the_true_spread_lies_within_its_factors_as_often_as_said(pairs: int) -> None:
    low, high = spread_factors(pairs)
    drawn = np.random.default_rng(0).normal(0, 3.0, (40_000, pairs)).std(axis=1, ddof=1)
    assert np.mean(low * drawn > 3.0) == pytest.approx(0.025, abs=0.004)
    assert np.mean(high * drawn < 3.0) == pytest.approx(0.025, abs=0.004)
