"""Statistics of paired differences: intervals, tests, correction for many comparisons, and what could have been seen.

A difference d_s is that of two runs of one seed. With n pairs, mean m and standard deviation s,

    interval    m ± t_{0.975, n-1} s / sqrt(n)
    p           of Student's t = m sqrt(n) / s; from six pairs on the share of all 2^n ways to give the d_s signs whose
                mean is at least as far from 0 (exact up to fourteen pairs, drawn beyond)
    Holm        the i-th smallest of k p-values times (k - i + 1), never below the one before (Holm 1979): the chance of
                any false claim among the k is at most that of one
    MDE         the smallest true difference that a t test of level a finds with a chance of 80 %: Student's t with
                noncentrality d sqrt(n) / s lies beyond its quantiles so often

Pure functions on numbers; what is compared is said in `analysis.judging`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import special, stats

ALPHA = 0.05
POWER = 0.8
# From so many pairs on the signs are tested instead of assuming a normal spread.
SIGN_FLIP_PAIRS = 6
# All ways to give fourteen differences a sign; more pairs are tested by so many draws of them.
SIGN_FLIPS = 2**14
# This part of differences may be rounding: those of scores, as 0.31 - 0.30 and 0.41 - 0.40, are equal but for it.
ROUNDING = 1e-9
STUDENT, SIGNS = TESTS = ("paired t", "sign flips")


def mean_interval(values: Iterable[float], confidence: float = 1 - ALPHA) -> tuple[float, float]:
    """Mean and half width of its Student t interval; the half width is NaN below two values.

    A NaN among the values makes both NaN: leaving it out would flatter a recipe that sometimes fails.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}; accepted: between 0 and 1, both excluded")
    sample = np.asarray(list(values), dtype=float)
    if len(sample) == 0:
        return math.nan, math.nan
    mean = float(sample.mean())
    if len(sample) == 1:
        return mean, math.nan
    quantile = float(special.stdtrit(len(sample) - 1, (1 + confidence) / 2))
    return mean, quantile * float(sample.std(ddof=1)) / math.sqrt(len(sample))


def which_test(pairs: int, comparisons: int = 1) -> str:
    """Which of TESTS so many pairs get in a race of so many comparisons.

    Signs are tested from six pairs on, unless their smallest p, 2 / 2^n, could not pass Holm's first step even then:
    a sixth seed would make a race of several arms blind.
    """
    fine_enough = 2 / 2**pairs * comparisons <= ALPHA
    return SIGNS if pairs >= SIGN_FLIP_PAIRS and fine_enough else STUDENT


def paired_p(differences: Iterable[float], comparisons: int = 1) -> float:
    """Two-sided p of no difference by the test that `which_test` names; NaN below two pairs or with a NaN among them.

    Pairs that agree exactly are no evidence: p = 1 where all differences are 0.
    """
    sample = np.asarray(list(differences), dtype=float)
    if len(sample) < 2 or np.isnan(sample).any():
        return math.nan
    if not sample.any():
        return 1.0
    return sign_flip_p(sample) if which_test(len(sample), comparisons) == SIGNS else student_p(sample)


def student_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of the paired t test; 0 where all differences are the same and not 0."""
    sample = np.asarray(differences, dtype=float)
    error = float(sample.std(ddof=1)) / math.sqrt(len(sample))
    mean = float(sample.mean())
    return 2 * float(special.stdtr(len(sample) - 1, -abs(mean) / error)) if error else float(mean == 0)


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of the exact test that gives every difference both signs; drawn (seed 0) beyond fourteen pairs.

    Means that differ by rounding alone are ties, and count. Of drawn signs, those that were found are one draw more.
    """
    sample = np.asarray(differences, dtype=float)
    done = stats.permutation_test(
        (sample,), np.mean, permutation_type="samples", vectorized=True, n_resamples=SIGN_FLIPS, rng=0
    )
    means, found = np.abs(done.null_distribution), abs(done.statistic)
    far = int((means >= found - ROUNDING * np.abs(sample).mean()).sum())
    drawn = int(2 ** len(sample) > SIGN_FLIPS)
    return (far + drawn) / (len(means) + drawn)


def holm(p_values: Iterable[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given; a NaN was no test: it stays, and does not count."""
    raw = np.asarray(list(p_values), dtype=float)
    adjusted = np.full(len(raw), math.nan)
    order = [i for i in np.argsort(raw, kind="stable") if not math.isnan(raw[i])]
    steps = [raw[i] * (len(order) - rank) for rank, i in enumerate(order)]
    if order:
        adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(p) for p in adjusted]


def spread_factors(pairs: int, confidence: float = 1 - ALPHA) -> tuple[float, float]:
    """Between which multiples of the standard deviation of so many differences the true one lies, as chi squared."""
    freedom, tail = pairs - 1, (1 - confidence) / 2
    low, high = (math.sqrt(freedom / special.chdtri(freedom, above)) for above in (tail, 1 - tail))
    return low, high


def detectable(differences: Iterable[float], alpha: float = ALPHA, chance: float = POWER) -> float:
    """Smallest true difference that so many pairs of so much spread find with such a chance, in their unit.

    NaN below two pairs, with a NaN among them, or without any spread to go by but that of rounding.
    """
    sample = np.asarray(list(differences), dtype=float)
    if len(sample) < 2 or np.isnan(sample).any() or np.ptp(sample) <= ROUNDING * np.abs(sample).max():
        return math.nan
    return float(sample.std(ddof=1)) * detectable_effect(len(sample), alpha, chance)


def detectable_effect(pairs: int, alpha: float = ALPHA, chance: float = POWER) -> float:
    """The same in standard deviations of the differences: the noncentrality that `chance` needs, over sqrt(pairs).

    Finding it with the wrong sign is left out of the chance; at these levels that never happens.
    """
    if not 0 < alpha < chance < 1:
        raise ValueError(f"alpha {alpha} and chance {chance}; accepted: 0 < alpha < chance < 1")
    critical = float(special.stdtrit(pairs - 1, 1 - alpha / 2))
    return float(special.nctdtrinc(pairs - 1, 1 - chance, critical)) / math.sqrt(pairs)
