"""The largest size that fits, found by trying few: a try of a large model takes a minute or more."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

# The search stops when the rows that fit and the rows that do not are this close, relatively.
CLOSE = 0.03
# Of what a row is expected to take, what it takes at least: a step may keep a part of its positions.
LEAST_OF_A_ROW = 0.25
# A size that does not fit and was all but expected to is missed by little, for an allocator loses some memory between
# its blocks: what of it is tried next, one after the other, and up to which part of it the expectation counts as such.
A_LITTLE_LESS, NEAR = (0.95, 0.9), 1.1


def largest(
    sizes: Sequence[int], peak: Callable[[int], float | None], limit: float, of_a_row: float = 0.0, first: int = 1
) -> int | None:
    """The largest of ascending sizes that fits, or one that is close; None where the smallest does not.

    Larger sizes are taken to fit no better. The last one is never passed. What is tried next is where the peaks that
    are known would meet the limit; if they are wrong, twice as much further every time, a little less, or halfway
    between.

    Args:
        peak: MiB of a size, None where it does not fit.
        of_a_row: MiB that a row is expected to take; 0 where nothing is. first: near which the search begins.
    """
    low, high, gap, near = -1, len(sizes), 1, list(A_LITTLE_LESS)
    at = max(0, bisect_right(sizes, first) - 1)
    known: list[tuple[int, float]] = []
    while True:
        found = peak(sizes[at])
        if found is None:
            high = at
        else:
            low = at
            known.append((sizes[at], found))
        if high - low <= 1:
            break
        if not known:
            at = 0
            continue
        expected = _expected(known, limit, of_a_row)
        if high == len(sizes):
            further = sizes[low] + gap
            at = max(low + 1, bisect_right(sizes, max(expected, further)) - 1)
            gap = 1 if expected >= further else 2 * gap
        elif sizes[high] - sizes[low] <= CLOSE * sizes[low]:
            break
        else:
            if near and sizes[high] <= expected < NEAR * sizes[high]:
                expected = near.pop(0) * sizes[high]
            guess = bisect_right(sizes, expected) - 1
            at = guess if low < guess < high else (low + high) // 2
    return sizes[low] if low >= 0 else None


def _expected(known: Sequence[tuple[int, float]], limit: float, of_a_row: float) -> float:
    """The size whose peak is the limit, by the last two that fit. After one, half of what is left is aimed at, for a
    row may take more than was expected. Where a row took less than it is expected to take at least, the rest may not:
    what is aimed at is no further than by that least, or than twice the last distance where this is more."""
    size, peak = known[-1]
    if len(known) == 1:
        return size + (limit - peak) / (2 * of_a_row) if of_a_row else 2.0 * size
    before, lower = known[-2]
    slope = (peak - lower) / (size - before)
    further = (limit - peak) / slope if slope > 0 else float("inf")
    if of_a_row:
        further = min(further, max((limit - peak) / (LEAST_OF_A_ROW * of_a_row), 2.0 * (size - before)))
    return size + further
