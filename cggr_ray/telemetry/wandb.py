"""Weights & Biases, real client. A run never waits for it longer than ten seconds."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

from cggr_ray.files import write_whole
from cggr_ray.schema import HISTOGRAMS, KIND, ROUTER_USAGE, STEP, TRAIN_SECONDS
from cggr_ray.telemetry.tracker import Row, scalars

# The longest wait for the server, at the start and again at the end.
WAIT_SECONDS = 10
# Of its own, when its server or its background process is gone; these have no common ancestor.
FAILURES = (wandb.errors.Error, HandleAbandonedError, MailboxClosedError)


@contextmanager
def runtime_errors() -> Iterator[None]:
    """Inside, or in a function under it, what the client raises of its own is a RuntimeError."""
    try:
        yield
    except FAILURES as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


class WandbTracker:
    """A W&B run."""

    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric("*", step_metric=TRAIN_SECONDS)

    @runtime_errors()
    def log(self, row: Row) -> None:
        usage = row.get(ROUTER_USAGE)
        kept = ((k, v) for k, v in scalars({**row, ROUTER_USAGE: None}).items() if k not in (KIND, STEP))
        values = {k: v for k, v in kept if v is not None and not isinstance(v, str)}
        for name in values.keys() & set(HISTOGRAMS):
            histogram = values[name]
            values[name] = wandb.Histogram(np_histogram=(histogram["counts"], histogram["edges"]))
        if usage is not None:
            # One bar a bin, over the bin's number.
            around: Any = [number - 0.5 for number in range(len(usage) + 1)]
            values[ROUTER_USAGE] = wandb.Histogram(np_histogram=(usage, around))
        self._run.log(values | {STEP: row[STEP]})

    @runtime_errors()
    def finish(self, summary: Row) -> None:
        self._run.summary.update({k: v for k, v in summary.items() if isinstance(v, int | float | str)})
        self._run.finish()


def own_word(folder: Path) -> str:
    """Tells the run of a folder from one of the same name in another race; the same whenever the run is resumed."""
    file = folder / "wandb" / "id"
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        write_whole(file, secrets.token_hex(4))
    return file.read_text()


@runtime_errors()
def open_wandb(folder: Path, run: Row, mode: str, project: str) -> WandbTracker:
    """A W&B run in `<folder>/wandb`; raises what the client does when W&B cannot be reached in time."""
    settings = wandb.Settings(
        init_timeout=WAIT_SECONDS,
        login_timeout=WAIT_SECONDS,
        finish_timeout=WAIT_SECONDS,
        silent=True,
        console="off",
    )
    opened = wandb.init(
        project=project,
        id=f"{run['race']}-{run['trial_id']}-{own_word(folder)}".replace("/", "-"),
        name=run["trial_id"],
        group=run["race"],
        config=run,
        dir=str(folder),
        mode="online" if mode == "online" else "offline",
        resume="allow" if mode == "online" else None,
        settings=settings,
    )
    return WandbTracker(opened)
