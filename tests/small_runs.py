"""What tests of whole runs share: data that are prepared once, a process that ends in its midst, the rows it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cggr_ray.data.dataset import DataSpec, prepare
from cggr_ray.schema import STEP_LOSSES


def prepared(spec: DataSpec, folders: pytest.TempPathFactory) -> Path:
    """A folder of its own that holds these data."""
    folder = folders.mktemp("data")
    prepare(spec, folder)
    return folder


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
