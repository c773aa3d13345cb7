"""The search for the largest size that fits: what it finds, and how few it tries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from cggr_ray.largest import CLOSE, largest

ROWS = range(1, 4097)
# Peaks in MiB of so many rows, of which `most` are the last that fit in 1000.
PEAKS: dict[str, Callable[[int, int], float]] = {
    "in proportion": lambda size, most: 1000 * size / (most + 0.5),
    "above what is always there": lambda size, most: 700 + 300 * size / (most + 0.5),
    "with a jump": lambda size, most: 1000 * size / (most + 0.5) - (200 if size < most / 2 else 0),
    "an allocator that takes what there is": lambda size, most: min(990.0, 3000 * size / (most + 0.5)),
    "of no use": lambda size, most: 500.0,
    "even at first": lambda size, most: max(800.0, 1000 * size / (most + 0.5)),
}


def searched(
    sizes: Sequence[int], peak: Callable[[int], float | None], limit: float, of_a_row: float = 0.0, first: int = 1
) -> tuple[int | None, list[int]]:
    """What is found, and what was tried for it."""
    tried: list[int] = []

    def noted(size: int) -> float | None:
        tried.append(size)
        return peak(size)

    return largest(sizes, noted, limit, of_a_row, first), tried


@pytest.mark.parametrize("most", [0, 1, 2, 3, 5, 8, 13, 31, 60, 64, 99])
@pytest.mark.parametrize("sizes", [range(1, 65), (1, 2, 4, 8, 16, 32, 64), (4, 8, 12, 24, 60), (3,)])
@pytest.mark.parametrize("peaks", PEAKS)
def test_the_largest_size_is_found_by_trying_few(peaks: str, sizes: range | tuple[int, ...], most: int) -> None:
    found, tried = searched(sizes, lambda size: PEAKS[peaks](size, most) if size <= most else None, 1000.0)
    best = max((size for size in sizes if size <= most), default=None)
    assert found == best or (found is not None and best is not None and 0 <= best - found <= CLOSE * best)
    assert len(tried) == len(set(tried)) <= 2 * len(sizes).bit_length() + 1 and set(tried) <= set(sizes)
    assert sum(size > most for size in tried) <= len(sizes).bit_length()


@pytest.mark.parametrize("most", [4, 22, 57, 300])
@pytest.mark.parametrize("peaks", ["in proportion", "above what is always there"])
def test_peaks_that_grow_evenly_are_met_at_once(peaks: str, most: int) -> None:
    found, tried = searched(ROWS, lambda size: PEAKS[peaks](size, most) if size <= most else None, 1000.0)
    assert found == most
    assert tried == [1, 2, most, most + 1]


@pytest.mark.parametrize("most", [1, 4, 22, 57, 300])
@pytest.mark.parametrize("part", [0.3, 1.0, 2.0], ids="a row takes {} of what was expected".format)
@pytest.mark.parametrize("always", [0.0, 700.0])
def test_what_a_row_is_expected_to_take_saves_tries(always: float, part: float, most: int) -> None:
    of_a_row = (1000 - always) / (most + 0.5)
    expected = of_a_row / part
    found, tried = searched(ROWS, lambda size: always + of_a_row * size if size <= most else None, 1000.0, expected)
    assert found is not None and 0 <= most - found <= CLOSE * most
    # The first, half of what is expected to fit, what fits by these two, and the next.
    assert len(tried) <= 4


@pytest.mark.parametrize("part", [0.0, 0.02, 0.06, 0.2], ids="a row takes {} of what was expected".format)
@pytest.mark.parametrize("most", [57, 300, 4096])
def test_rows_that_take_less_than_was_expected_cost_few_tries(part: float, most: int) -> None:
    """As where activations are computed again, or where memory sets no limit."""
    limit = 500.5 + part * most
    found, tried = searched(ROWS, lambda size: 500.0 + part * size if size <= most else None, limit, 1.0)
    assert found is not None and 0 <= most - found <= CLOSE * most and len(tried) <= 18


@pytest.mark.parametrize("most", [13, 57, 300])
@pytest.mark.parametrize("lost", [0.01, 0.02, 0.04])
def test_what_an_allocator_loses_costs_few_tries(lost: float, most: int) -> None:
    """A batch takes less than there is, and does not fit all the same: the largest that fits is just below."""
    of_a_row = 400.0 / most

    def peak(size: int) -> float | None:
        taken = 600 + of_a_row * size
        return taken if taken * (1 + lost) <= 1000 else None

    best = max(size for size in range(1, 400) if peak(size) is not None)
    found, tried = searched(ROWS, peak, 1000.0, of_a_row)
    assert found is not None and 0 <= best - found <= CLOSE * best and len(tried) <= 8


@pytest.mark.parametrize("first", [1, 2, 15, 31, 40, 5000])
@pytest.mark.parametrize("most", [0, 1, 3, 15, 31, 60])
@pytest.mark.parametrize("sizes", [range(1, 65), (4, 8, 12, 24, 60), (3,)])
def test_a_search_may_begin_anywhere(sizes: range | tuple[int, ...], most: int, first: int) -> None:
    for peak in PEAKS.values():
        found, tried = searched(sizes, lambda n, peak=peak: peak(n, most) if n <= most else None, 1000.0, 0.0, first)
        best = max((size for size in sizes if size <= most), default=None)
        assert found == best or (found is not None and best is not None and 0 <= best - found <= CLOSE * best)
        assert tried[0] == max((size for size in sizes if size <= first), default=sizes[0])
        assert len(tried) == len(set(tried)) <= 2 * len(sizes).bit_length() + 2


def test_what_fits_as_many_as_another_arm_is_told_by_two_tries() -> None:
    found, tried = searched(ROWS, lambda n: 48_000 + 1_600.0 * n if n <= 15 else None, 73_000.0, 1_600.0, 15)
    assert (found, tried) == (15, [15, 16])
