"""What the terminal says of a trial is what its newest step was."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from cggr_ray.telemetry.console import RaceConsole


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ("train/loss", "train/loss_kept_positions", "kept"),
        ("train/loss_kept_positions", "train/loss", "loss"),
        ("train/loss", "train/loss_thinned_forward", "thinned"),
        ("train/loss_thinned_forward", "train/loss", "loss"),
    ],
)
def test_the_loss_is_that_of_the_newest_step(before: str, after: str, word: str) -> None:
    text = StringIO()
    with RaceConsole(8.0, console=Console(file=text, width=120)) as shown:
        shown.show({"trial": "t", "fraction": 0.25, before: 7.5})
        shown.show({"trial": "t", "fraction": 0.5, "val/loss": 6.25})
        shown.show({"trial": "t", "fraction": 0.75, after: 5.125})
    first, milestone, last = text.getvalue().splitlines()
    assert "7.500" in first and "7.500" in milestone and "val 6.2500" in milestone
    assert f"{word} 5.125" in last and "7.500" not in last and "val 6.2500" in last and "2 s left" in last


def test_a_step_without_a_finite_loss_shows_none() -> None:
    text = StringIO()
    with RaceConsole(8.0, console=Console(file=text, width=120)) as shown:
        shown.show({"trial": "t", "fraction": 0.25, "train/loss": 7.5})
        shown.show({"trial": "t", "fraction": 0.5, "train/loss": None})
    assert "7.500" not in text.getvalue().splitlines()[-1]
