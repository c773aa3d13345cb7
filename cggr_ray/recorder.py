"""What a run says about itself while it runs: step rows, milestones and reports, at a bounded rate.

Step rows are kept in memory on the step path and handed to the trackers only while the budget's clock stands.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

import torch

from cggr_ray.flight import Finished
from cggr_ray.progress import Budget, ProgressFile
from cggr_ray.schema import (
    DATA_WAIT_SECONDS,
    FRACTION,
    KIND,
    MICRO_ROWS,
    ORDER_HASH,
    ORDER_ROWS,
    RELEVANCE,
    ROUTER_KEPT_FRACTION,
    ROUTER_SPEARMAN,
    SAMPLES_PER_SEC,
    STEP,
    STEP_SECONDS,
    TOKENS_PER_SEC,
    TOKENS_SEEN,
    TRAIN_SECONDS,
    WALL_SECONDS,
)
from cggr_ray.telemetry.gpu import device_row
from cggr_ray.telemetry.jsonl import plain
from cggr_ray.telemetry.tracker import Row, Tracker

# What some steps measure, and most do not.
MEASURED = frozenset((RELEVANCE, ROUTER_SPEARMAN))
# Rows over the budget; reports over the budget, and the fewest and most seconds between two of them.
ROWS, REPORTS, SHORTEST, LONGEST = 1000, 40, 0.5, 10.0

Report = Callable[[Row], None]


class Position(NamedTuple):
    """Where a run stands."""

    step: int
    tokens_seen: int
    train_seconds: float
    wall_seconds: float
    data_wait_seconds: float


class Recorder:
    """Rows on their way to the trackers.

    Args:
        report: told of the newest row a few dozen times a run, and of every milestone.
        rows_per_step: of all workers, from here on.
        start: where the run stands when it begins or goes on.
        progress: keeps when every step began, with a row or without; None where another worker does. every_step: all of
            them have a row.
    """

    def __init__(
        self,
        trial_id: str,
        trackers: list[Tracker],
        report: Report,
        budget: Budget,
        device: torch.device,
        rows_per_step: int,
        start: Position,
        progress: ProgressFile | None,
        every_step: bool = False,
    ) -> None:
        self._trial_id, self._trackers, self._report = trial_id, trackers, report
        self._budget, self._device, self._progress = budget, device, progress
        self._rows_per_step = rows_per_step
        self._between = 0.0 if every_step else budget.seconds / ROWS
        self._rows: list[Row] = []
        # Of all steps since the last row: full ones take longer, so that a row falls on them more often than they come.
        self._kept: list[float] = []
        self._newest: Row = {}
        self._last_row, self._reported_at = start, start.train_seconds

    def step(self, finished: Finished, at: Position, marks: dict[str, str]) -> None:
        """Keeps a finished step's row where one is due. `at` is now, up to two steps after the finished one, and counts
        those that are only queued; of it a row has the wall clock and the wait for data.

        A row of a step that measured more than others do is always due: few steps do, it takes time, and decisions may
        follow from it.
        """
        if self._progress is not None:
            self._progress.add(finished.progress.train_seconds)
        steps = finished.progress.step + 1
        at = at._replace(step=steps, tokens_seen=finished.progress.tokens_seen, train_seconds=finished.train_seconds)
        last = self._last_row
        if ROUTER_KEPT_FRACTION in finished.values:
            self._kept.append(finished.values[ROUTER_KEPT_FRACTION])
        elapsed, first = at.train_seconds - last.train_seconds, finished.progress.step == 0
        if elapsed < self._between and not first and MEASURED.isdisjoint(finished.values):
            return
        mark = max(marks, key=int, default=None)
        self._last_row = at
        self._newest = {
            KIND: "step",
            **_where(at, steps, finished.progress.fraction),
            **(_rates(last, at, self._rows_per_step) if elapsed > 0 else {}),
            DATA_WAIT_SECONDS: at.data_wait_seconds,
            **finished.values,
            **({ROUTER_KEPT_FRACTION: fmean(self._kept)} if self._kept else {}),
            **({ORDER_ROWS: int(mark), ORDER_HASH: marks[mark]} if mark else {}),
        }
        self._kept = []
        self._rows.append(self._newest)

    def out_of_memory(self, at: Position, micro_rows: int, reason: str) -> None:
        """Keeps the event: the step after `at` found no memory, and is repeated with micro-batches of so many rows."""
        where = self._where_now(at, at.step + 1)
        self._rows.append({KIND: "out_of_memory", **where, MICRO_ROWS: micro_rows, "message": reason})

    def milestone_out_of_memory(self, at: Position, message: str) -> None:
        """Keeps the event: the milestone at `at` found no memory, and goes on with fewer rows at once."""
        self._rows.append({KIND: "out_of_memory", **self._where_now(at, at.step), "message": message})

    def _where_now(self, at: Position, step: int) -> Row:
        return _where(at, step, min(1.0, at.train_seconds / self._budget.seconds))

    def report_due(self, train_seconds: float) -> bool:
        every = min(max(self._budget.seconds / REPORTS, SHORTEST), LONGEST)
        return train_seconds - self._reported_at >= every

    def report(self, train_seconds: float) -> None:
        """Hands on all rows, the newest with what the device says, and tells the report about it."""
        self._reported_at = train_seconds
        self._newest |= device_row(self._device)
        self.flush()
        self._report({"trial": self._trial_id, **plain(self._newest)})

    def milestone(self, at: Position, fraction: float, values: Row) -> Row:
        """Writes a milestone row and reports it; returns the part of it that says where it was taken."""
        self.flush()
        where = _where(at, at.step, fraction)
        row = {KIND: "milestone", **where, **values}
        self._track(row)
        self._report({"trial": self._trial_id, **plain(self._newest | row)})
        return where

    def resumed(self, at: Position, message: str) -> None:
        """Marks that rows after this step, if there are any, were lost with the process that wrote them; `message` is
        why not from the last checkpoint, if so."""
        self._track({KIND: "resumed", STEP: at.step, **({"message": message} if message else {})})

    def flush(self) -> None:
        if self._progress is not None:
            self._progress.flush()
        for row in self._rows:
            self._track(row)
        self._rows = []

    def finish(self, summary: Row) -> None:
        for tracker in self._trackers:
            tracker.finish(summary)

    def _track(self, row: Row) -> None:
        for tracker in self._trackers:
            tracker.log(row)


def _where(at: Position, step: int, fraction: float) -> Row:
    return {
        STEP: step,
        FRACTION: fraction,
        TRAIN_SECONDS: at.train_seconds,
        WALL_SECONDS: at.wall_seconds,
        TOKENS_SEEN: at.tokens_seen,
    }


def _rates(last: Position, at: Position, rows_per_step: int) -> Row:
    elapsed, steps = at.train_seconds - last.train_seconds, at.step - last.step
    return {
        TOKENS_PER_SEC: (at.tokens_seen - last.tokens_seen) / elapsed,
        SAMPLES_PER_SEC: steps * rows_per_step / elapsed,
        STEP_SECONDS: elapsed / steps,
    }
