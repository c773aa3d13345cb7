"""Races that are really run, on the CPU: equal arms are called equal, and an arm whose steps take 5 % longer slower.

The clock is injected: a step takes half a second, give or take 1 % from run to run as on a real machine, so the outcome
is the same every time. What is trained, logged, read and judged is real.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis import claims, read_race, verdicts, write_report
from cggr_ray.commands import begin
from cggr_ray.data.dataset import DataSpec, prepare
from cggr_ray.data.sources import Problems
from cggr_ray.loop import run_race
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import RaceSpec, Trial, plan_trials

STEP_SECONDS = 0.5


def run_all(trials: Sequence[Trial], folder: Path, rng: np.random.Generator, factor: float = 1.0) -> None:
    for trial in trials:
        timed = replace(trial.race, step_seconds=STEP_SECONDS * factor * float(np.exp(rng.normal(0, 0.01))))
        run_race(replace(trial, race=timed).placed(Path(trial.folder), folder / "data"))


@pytest.fixture(scope="module")
def equal_race(tmp_path_factory: pytest.TempPathFactory) -> tuple[RaceSpec, Path]:
    """Two recipes of different names and the same settings, five seeds."""
    folder = tmp_path_factory.mktemp("equals")
    recipes = []
    for name in ("one", "same", "slow"):
        recipes.append(str(folder / f"{name}.toml"))
        Path(recipes[-1]).write_text('description = "Full training"\n')
    spec = RaceSpec(
        name="equals",
        recipes=tuple(recipes[:2]),
        seeds=(0, 1, 2, 3, 4),
        budget_seconds=8 * STEP_SECONDS,
        global_rows=2,
        micro_rows=2,
        milestones=(0.5,),
        model=ModelSpec(preset="tiny"),
        data=DataSpec(sources=(Problems(count=300),), row_tokens=64, val_documents=5),
        values={"optimizer.schedule.warmup_tokens": 200, "optimizer.matrix": {"kind": "adamw"}},
        device="cpu",
        step_seconds=STEP_SECONDS,
    )
    race = folder / "race"
    trials = plan_trials(spec, race)
    # The race says nothing of the injected clock: it is to be judged as one of a real machine.
    begin(race, replace(spec, step_seconds=None), trials)
    prepare(spec.data, race / "data")
    run_all(trials, race, np.random.default_rng(0))
    return replace(spec, recipes=(recipes[0], recipes[2])), race


def test_equal_arms_are_called_equal(equal_race: tuple[RaceSpec, Path]) -> None:
    race = read_race(equal_race[1])
    assert race.recipes[:2] == ["one", "same"] and race.baseline == "one"
    table = claims(race)
    same = table[table["recipe"] == "same"].set_index("quantity")
    assert (same["pairs"] == 5).all() and (same["side"] == 0).all() and not same["supported"].any()
    assert same["verdict"].str.startswith("no difference that 5 seeds could show").all()
    assert same.loc["tokens/s", "low"] < 1 < same.loc["tokens/s", "high"]
    assert 0 < same.loc["tokens/s", "p"] < 1 and 0 < same.loc["final loss", "p"] < 1  # noisy, not the same figures


def test_steps_that_take_five_percent_longer_are_found(equal_race: tuple[RaceSpec, Path]) -> None:
    spec, folder = equal_race
    slow = [trial for trial in plan_trials(spec, folder) if trial.recipe.name == "slow"]
    run_all(slow, folder, np.random.default_rng(1), factor=1.05)
    race = read_race(folder)
    table = claims(race).set_index(["recipe", "quantity"])
    row = table.loc[("slow", "tokens/s")]
    assert row["verdict"] == "slower" and row["supported"]
    assert row["low"] < 1 / 1.05 < row["high"] and row["difference"] == pytest.approx(1 / 1.05, abs=0.02)
    assert table.loc[("same", "tokens/s"), "side"] == 0
    assert any(line.startswith("slow: ") and "tokens/s: slower (0.9" in line for line in verdicts(race))
    assert "**slower**" in write_report(folder).read_text()
