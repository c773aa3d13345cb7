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


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_trial_is_one_whole_line_of_a_terminal(width: int) -> None:
    text, trials = StringIO(), ["baseline-s0", "random_tokens-s0", "fewer_rows-s0"]
    terminal = Console(file=text, width=width, force_terminal=True, color_system=None)
    with RaceConsole(30.0, trials, terminal) as shown:
        shown.show({"trial": trials[0], "fraction": 1.0, "train/loss": 5.069, "val/loss": 4.8197})
        last = {"train/loss_kept_positions": 10.5, "val/loss": 10.25, "train/tokens_per_sec": 435_700.0}
        shown.show({"trial": trials[1], "fraction": 0.25} | last)
    newest = text.getvalue()[text.getvalue().rindex("baseline-s0") :]
    done, running, waiting = (line.strip() for line in newest.splitlines()[:3])
    assert done.startswith("baseline-s0 ") and "| 100%" in done and done.endswith("done")
    assert running.startswith("random_tokens-s0 ") and waiting.startswith("fewer_rows-s0 ")
    assert all(word in running for word in ("|  25%", "kept 10.500", "val 10.2500", "435.7k tok/s", "22 s left"))
    bar = running.split("|")[1]
    assert bar.count("=") == round(len(bar) / 4) and (len(bar) == 24 or width == 80)
