"""Weights & Biases, real client. A run never waits for it longer than ten seconds and never stops because of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import wandb

from cggr_ray.schema import KIND, ROUTER_SCORES, STEP, TRAIN_SECONDS
from cggr_ray.telemetry.tracker import Row

INIT_SECONDS = 10
log = logging.getLogger(__name__)


class WandbTracker:
    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric("*", step_metric=TRAIN_SECONDS)

    def log(self, row: Row) -> None:
        values = {k: v for k, v in row.items() if k not in (KIND, STEP) and v is not None and not isinstance(v, str)}
        if ROUTER_SCORES in values:
            histogram = values[ROUTER_SCORES]
            values[ROUTER_SCORES] = wandb.Histogram(np_histogram=(histogram["counts"], histogram["edges"]))
        self._run.log(values | {STEP: row[STEP]})

    def finish(self, summary: Row) -> None:
        self._run.summary.update({k: v for k, v in summary.items() if isinstance(v, int | float | str)})
        self._run.finish()


def open_wandb(folder: Path, run: Row, mode: str, project: str) -> WandbTracker | None:
    """A W&B run in `<folder>/wandb`, or None with a warning when W&B cannot be reached in time."""
    settings = wandb.Settings(init_timeout=INIT_SECONDS, login_timeout=INIT_SECONDS, silent=True, console="off")
    try:
        opened = wandb.init(
            project=project,
            id=f"{run['race']}-{run['trial_id']}".replace("/", "-"),
            name=run["trial_id"],
            group=run["race"],
            config=run,
            dir=str(folder),
            mode="online" if mode == "online" else "offline",
            resume="allow" if mode == "online" else None,
            settings=settings,
        )
    except (wandb.errors.Error, TimeoutError, OSError) as error:
        log.warning("W&B does not answer, the run goes on without it: %s", error)
        return None
    return WandbTracker(opened)
