"""Conclusions from rows that were written by hand, so that everybody can see what follows from them."""

from __future__ import annotations

import pytest

from cggr_ray.studies import attention_backends
from cggr_ray.studies.conclusions import conclusions
from cggr_ray.studies.trained import Replaced

FULL_LOSS = 4.0
HOLDS, FAILS = "the published negative result holds here", "the published negative result does not hold here"


def row(method: str, kind: str, fraction: float, loss_change: float, ms: float | None) -> Replaced:
    full = None if ms is None else 6.0
    return Replaced(method, kind, fraction, 0.5, 0.5, FULL_LOSS + loss_change, loss_change, 1.0, ms_full=full, ms=ms)


def test_the_fastest_that_the_loss_allows_and_the_nearest_where_it_allows_none() -> None:
    rows = [row("svd", "q", 0.125, 0.010, 2.0), row("svd", "q", 0.25, 0.004, 3.0), row("svd", "q", 0.5, -0.001, 6.5)]
    rows += [
        row("svd", "up", 0.125, 0.9, 1.0),
        row("data_aware", "up", 0.25, 0.1, 5.0),
        row("svd", "up", 0.5, 0.0, 7.0),
    ]
    rows += [row("svd", "all", 0.5, 0.0, 6.0), row("two_four", "down", 0.5, 0.0, None)]
    assert conclusions(rows, FULL_LOSS, "all") == [
        "q: the fastest within 0.5% of the loss is svd at 0.125, 3.00x as fast, +0.25% loss",
        "up: nothing faster is within 0.5% of the loss; the nearest is data_aware at 0.25, 1.20x as fast, +2.50% loss",
        "all: nothing is faster than what it replaces",
        f"1.25x within 0.5% of the loss, all replaced: not reached: {HOLDS}",
    ]


@pytest.mark.parametrize(
    ("loss_change", "ms", "said"),
    [(0.02, 4.8, FAILS), (0.021, 1.0, HOLDS), (0.0, 4.9, HOLDS), (-0.5, 3.0, FAILS), (float("nan"), 1.0, HOLDS)],
)
def test_the_bar_is_a_quarter_faster_for_half_a_percent(loss_change: float, ms: float, said: str) -> None:
    # What is replaced elsewhere is not held to it.
    rows = [row("drop", "mlp", 0.5, loss_change, ms), row("drop", "q", 0.5, 0.0, 1.0)]
    assert conclusions(rows, FULL_LOSS, "mlp")[-1].endswith(f": {said}")


def test_backends_of_a_cell_in_the_order_of_forward_and_backward_together() -> None:
    def timed(backend: str, mask: str, forward: float | None, backward: float | None) -> attention_backends.Row:
        return attention_backends.Row("1x2", mask, backend, forward_ms=forward, backward_ms=backward)

    rows = [timed("math", "causal", 3.0, 5.0), timed("flash", "causal", 1.5, 2.5), timed("cudnn", "causal", 1.0, 4.0)]
    rows += [
        timed("flex", "causal", 0.1, None),
        timed("math", "window", 1.0, 1.0),
        timed("flash", "window", None, None),
    ]
    rows += [timed("flex", "documents", 0.1, None)]
    assert attention_backends.conclusions(rows) == [
        "1x2 causal, forward and backward: flash is fastest, 4 ms, cudnn 1.25x, math 2.00x",
        "1x2 window, forward and backward: math is fastest, 2 ms",
        "1x2 documents, forward and backward: no backend runs both ways",
    ]
