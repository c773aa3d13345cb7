"""What tests of whole runs share: data that are prepared once, a process that ends in its midst, the rows it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cggr_ray.data.dataset import DataSpec, prepare
from cggr_ray.data.sources import Problems
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import RaceSpec, Trial, plan_trials
from cggr_ray.schema import STEP_LOSSES

STEP_SECONDS = 0.5
TWELVE_STEPS = RaceSpec(
    budget_seconds=12 * STEP_SECONDS,
    step_seconds=STEP_SECONDS,
    global_rows=4,
    micro_rows=4,
    milestones=(0.5,),
    model=ModelSpec(preset="tiny"),
    data=DataSpec(sources=(Problems(count=600),), row_tokens=64, val_documents=8),
    values={"optimizer.schedule.warmup_tokens": 1000},
    device="cpu",
)
TWO_ARMS = RaceSpec(
    name="small",
    recipes=("baseline", "random_tokens"),
    global_rows=16,
    micro_rows=4,
    budget_seconds=8.0,
    step_seconds=1.0,
    milestones=(),
    model=ModelSpec(preset="tiny"),
    data=DataSpec(sources=(Problems(count=100),), row_tokens=128, val_documents=8),
    values={"optimizer.schedule.warmup_tokens": 3000},
    device="cpu",
)


def prepared(spec: DataSpec, folders: pytest.TempPathFactory) -> Path:
    """A folder of its own that holds these data."""
    folder = folders.mktemp("data")
    prepare(spec, folder)
    return folder


def trial_of(spec: RaceSpec, recipe: str, folder: Path, data_folder: Path, **values: object) -> Trial:
    """The run of a recipe, with some of its values, in a folder of its own."""
    arm = replace(spec, recipes=(recipe,), arms={recipe: values} if values else {})
    return plan_trials(arm, folder)[0].placed(folder, data_folder)


class KilledError(Exception):
    """What ends a run here in place of a signal."""


def killed_after(train_seconds: float) -> Callable[[dict[str, Any]], None]:
    """A report that ends the run at the first row beyond so many train seconds."""

    def report(row: dict[str, Any]) -> None:
        if row["train_seconds"] > train_seconds:
            raise KilledError

    return report


def rows_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind, in the order in which the run wrote them."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def step_losses(folder: Path) -> dict[int, float]:
    """What every step lost, by its number; of a step that was done again, the last time."""
    by_step = {row["step"]: row for row in rows_of(folder, "step")}
    return {step: next(row[name] for name in STEP_LOSSES if name in row) for step, row in sorted(by_step.items())}
