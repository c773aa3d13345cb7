"""Where rows go: JSONL always; W&B and TensorBoard when asked. A run does not notice when one of these two fails."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]


def scalars(row: Row) -> Row:
    """The row with `name/00`, `name/01`, ... in place of every list: some trackers draw numbers alone."""
    flat: Row = {}
    for name, value in row.items():
        flat |= {f"{name}/{i:02d}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
    return flat


class Tracker(Protocol):
    def log(self, row: Row) -> None: ...
    def finish(self, summary: Row) -> None: ...


def open_trackers(folder: Path, run: Row, wandb: str, wandb_project: str, tensorboard: bool) -> list[Tracker]:
    """The trackers of a run; `wandb` is off, offline or online."""
    from cggr_ray.telemetry.guarded import Guarded
    from cggr_ray.telemetry.jsonl import JsonlTracker

    trackers: list[Tracker] = [JsonlTracker(folder)]
    if wandb != "off":
        trackers.append(Guarded("W&B", partial(_wandb, folder, run, wandb, wandb_project)))
    if tensorboard:
        trackers.append(Guarded("TensorBoard", partial(_tensorboard, folder)))
    return trackers


def _wandb(folder: Path, run: Row, mode: str, project: str) -> Tracker:
    from cggr_ray.telemetry.wandb import open_wandb

    return open_wandb(folder, run, mode, project)


def _tensorboard(folder: Path) -> Tracker:
    from cggr_ray.telemetry.tensorboard import TensorBoardTracker

    return TensorBoardTracker(folder)
