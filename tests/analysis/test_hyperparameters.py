"""The importance of hyperparameters against sweeps whose loss is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sweep_folders import drawn, ended, planted, write_sweep

from analysis import importance, read_sweep
from analysis.coordinates import axes_of, best_last
from analysis.hyperparameters import is_choice, is_logarithmic


def swept(folder: Path, loss: Callable[[dict[str, Any]], float], trials: int = 60) -> Path:
    draw, events = np.random.default_rng(1), []
    for number in range(trials):
        values: dict[str, Any] = {"x": float(draw.uniform(0, 1)), "rate": float(10 ** draw.uniform(-4, -1))}
        values["part"] = {"kind": "deep", "depth": float(draw.uniform(1, 9))} if number % 2 else {"kind": "flat"}
        values |= {"name": str(draw.choice(["one", "two", "three"])), "fixed": 1.0}
        events += [drawn(number, **values), ended(number, "finished", loss(values), 20.0)]
    return write_sweep(folder, events)


def noise(values: dict[str, Any]) -> float:
    """Small, and of no hyperparameter."""
    return 0.1 * float(np.random.default_rng(int(1e9 * values["x"])).normal())


@pytest.mark.parametrize(
    ("cause", "loss"),
    [
        ("x", lambda values: (values["x"] - 0.3) ** 2),
        ("rate", lambda values: abs(np.log10(values["rate"]) + 3)),
        ("name", lambda values: (values["name"] != "one") + noise(values)),
        ("part.kind", lambda values: (values["part"]["kind"] == "deep") + noise(values)),
    ],
)
def test_what_decides_the_loss_comes_first(tmp_path: Path, cause: str, loss: Callable[..., float]) -> None:
    table = importance(read_sweep(swept(tmp_path / "sweep", loss, trials=100))).set_index("hyperparameter")
    assert table.index[0] == cause and table["importance"].iloc[0] > table["chance"].iloc[0]
    assert table["importance"].sum() == pytest.approx(1) and table["importance"].is_monotonic_decreasing
    assert set(table.index) == {"x", "rate", "name", "part.kind", "part.depth"}  # not what never differed


def test_a_caller_s_table_is_its_own(tmp_path: Path) -> None:
    sweep = read_sweep(swept(tmp_path / "sweep", lambda values: float(values["x"]), trials=20))
    table = importance(sweep)
    first = table.copy()
    table.insert(0, "sweep", "mine")
    table["importance"] = 0.0
    pd.testing.assert_frame_equal(importance(sweep), first)


def test_a_field_of_one_choice_alone_can_matter(tmp_path: Path) -> None:
    def loss(values: dict[str, Any]) -> float:
        return abs(values["part"]["depth"] - 4) if values["part"]["kind"] == "deep" else 3.0

    table = importance(read_sweep(swept(tmp_path / "sweep", loss, trials=120))).set_index("hyperparameter")
    assert table["importance"]["part.depth"] > table["chance"]["part.depth"]
    assert set(table.index[:2]) == {"part.depth", "part.kind"}


def test_a_loss_of_chance_seldom_passes_chance(tmp_path: Path) -> None:
    passed = 0
    for number in range(3):
        noise = np.random.default_rng(number)
        table = importance(read_sweep(swept(tmp_path / str(number), lambda values: float(noise.normal()), trials=40)))  # noqa: B023
        passed += int((table["importance"] > table["chance"]).sum())
    assert passed <= 3  # of 15


def test_the_direction_and_the_best_values_are_said(tmp_path: Path) -> None:
    table = importance(read_sweep(planted(tmp_path / "sweep", trials=80))).set_index("hyperparameter")
    assert (
        table.index[0] == "lr" and table["correlation"]["tokens.keep"] < 0 and np.isnan(table["correlation"]["strata"])
    )
    low, high = map(float, table["best_values"]["lr"].split(" to "))
    assert 0.003 < low < 0.01 < high < 0.03
    assert table["best_values"]["tokens.score"].count("x)") == 2


def test_few_trials_or_equal_values_say_nothing(tmp_path: Path) -> None:
    assert len(importance(read_sweep(swept(tmp_path / "few", lambda values: values["x"], trials=9)))) == 0
    same = [event for n in range(12) for event in (drawn(n, x=1.0), ended(n, "finished", float(n), 20.0))]
    assert len(importance(read_sweep(write_sweep(tmp_path / "same", same)))) == 0


def test_scales_are_told_by_the_values(tmp_path: Path) -> None:
    trials = read_sweep(swept(tmp_path / "sweep", lambda values: values["x"])).trials
    assert is_logarithmic(trials["values/rate"]) and not is_logarithmic(trials["values/x"])
    assert is_choice(trials["values/name"]) and is_choice(trials["values/fixed"]) and not is_choice(trials["values/x"])


def test_coordinates_put_every_trial_where_its_values_are(tmp_path: Path) -> None:
    sweep = read_sweep(swept(tmp_path / "sweep", lambda values: (values["x"] - 0.3) ** 2))
    trials, axes = best_last(sweep), {axis.title: axis for axis in axes_of(sweep)}
    assert trials["val/loss"].is_monotonic_decreasing and next(iter(axes)) == "x" and list(axes)[-1] == "val/loss"
    x, rate = trials["values/x"], np.log(trials["values/rate"])
    assert axes["x"].heights(trials) == pytest.approx(((x - x.min()) / (x.max() - x.min())).to_numpy())
    assert axes["rate"].heights(trials) == pytest.approx(((rate - rate.min()) / (rate.max() - rate.min())).to_numpy())
    assert axes["name"].ticks() == [("one", 1 / 6), ("three", 3 / 6), ("two", 5 / 6)]
    flat = (trials["values/part.kind"] == "flat").to_numpy()
    assert np.isnan(axes["part.depth"].heights(trials)[flat]).all()
