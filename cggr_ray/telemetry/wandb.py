"""Weights & Biases, real client. A run never waits for it longer than ten seconds and never stops because of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wandb
from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

from cggr_ray.schema import HISTOGRAMS, KIND, STEP, TRAIN_SECONDS
from cggr_ray.telemetry.tracker import Row, scalars

# The longest wait for the server, at the start and again at the end.
WAIT_SECONDS = 10
# What the client raises when its server or its background process is gone; these have no common ancestor.
FAILURES = (wandb.errors.Error, OSError, HandleAbandonedError, MailboxClosedError)
log = logging.getLogger(__name__)


class WandbTracker:
    """A W&B run, until it fails: from then on rows are dropped, with one warning."""

    def __init__(self, run: Any) -> None:
        self._run, self._failed = run, False
        run.define_metric("*", step_metric=TRAIN_SECONDS)

    def log(self, row: Row) -> None:
        kept = ((k, v) for k, v in scalars(row).items() if k not in (KIND, STEP))
        values = {k: v for k, v in kept if v is not None and not isinstance(v, str)}
        for name in values.keys() & set(HISTOGRAMS):
            histogram = values[name]
            values[name] = wandb.Histogram(np_histogram=(histogram["counts"], histogram["edges"]))
        self._attempt(lambda: self._run.log(values | {STEP: row[STEP]}))

    def finish(self, summary: Row) -> None:
        values = {k: v for k, v in summary.items() if isinstance(v, int | float | str)}
        self._attempt(lambda: self._run.summary.update(values))
        self._attempt(lambda: self._run.finish())

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except FAILURES as error:
            self._failed = True
            log.warning("W&B has stopped, the run goes on without it: %r", error)


def open_wandb(folder: Path, run: Row, mode: str, project: str) -> WandbTracker | None:
    """A W&B run in `<folder>/wandb`, or None with a warning when W&B cannot be reached in time."""
    try:
        settings = wandb.Settings(
            init_timeout=WAIT_SECONDS,
            login_timeout=WAIT_SECONDS,
            finish_timeout=WAIT_SECONDS,
            silent=True,
            console="off",
        )
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
        return WandbTracker(opened)
    except (*FAILURES, ValueError) as error:
        log.warning("W&B does not answer, the run goes on without it: %s", error)
        return None
