"""Milestones of a run: the points of its budget where the clock stops, the model is asked, and its weights are kept."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from cggr_ray import checkpoint
from cggr_ray.data.dataset import PreparedData
from cggr_ray.data.packing import RowOrder
from cggr_ray.evaluation.heldout import HeldOut
from cggr_ray.evaluation.suite import Suite, milestone_name
from cggr_ray.models.adapter import Adapter
from cggr_ray.out_of_memory import with_fewer
from cggr_ray.race import RaceSpec
from cggr_ray.saying import Say
from cggr_ray.schema import FRACTION, MILESTONE_FILE, MILESTONES_FOLDER, VAL_LOSS
from cggr_ray.telemetry.gpu import peak_bytes
from cggr_ray.telemetry.tracker import Row


class Milestones:
    """What is asked of one run's model: held-out documents, and the race's tasks.

    `left` are the fractions of the budget to come, the last of them its end; `best` is the smallest validation loss,
    `last_good` what was measured last with a finite one, None before. Where memory runs out, in validation or in
    generation, fewer rows are asked at once; `say` is told.
    """

    def __init__(
        self,
        spec: RaceSpec,
        data: PreparedData,
        order: RowOrder,
        adapter: Adapter,
        folder: Path,
        say: Say,
    ) -> None:
        self._adapter, self._data, self._order, self._folder, self._say = adapter, data, order, folder, say
        self.resize(spec.micro_rows)
        asked = spec.evaluation
        self.suite = Suite(asked, data.tokenizer, adapter.model.config, folder, say) if asked else None
        self.left, self.best = sorted({*spec.milestones, 1.0}), math.inf
        self.last_good: Row | None = None
        self._keeps = asked is not None and asked.keep_models
        self._peak_bytes = 0

    def resize(self, micro_rows: int) -> None:
        """From here on, held-out documents come in micro-batches of so many rows."""
        self._micro_rows = micro_rows
        self.heldout = HeldOut(self._data, self._order, micro_rows, self._adapter.device)

    def due(self, fraction: float) -> bool:
        return fraction >= self.left[0]

    def reach(self, fraction: float) -> str:
        """The name of the milestone that is due, which is then no longer to come."""
        name = milestone_name(max(m for m in self.left if m <= fraction))
        self.left = [m for m in self.left if m > fraction]
        return name

    def ask(self, name: str, fraction: float) -> Row:
        """What is measured at a milestone. Synchronises."""
        _, found = with_fewer(self._micro_rows, self._validate, self._say)
        values: Row = dict(found)
        self.best = min(self.best, values[VAL_LOSS])
        if self.suite is not None:
            # What generation allocates is no part of training's peak.
            self._peak_bytes = self.peak_bytes()
            values |= self.suite.run(self._adapter.model, name)
            if self._adapter.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._adapter.device)
        if math.isfinite(values[VAL_LOSS]):
            self.last_good = {FRACTION: fraction, **values}
        return values

    def _validate(self, micro_rows: int) -> dict[str, float]:
        if micro_rows != self._micro_rows:
            self.resize(micro_rows)
        return self.heldout.evaluate(self._adapter)

    def keep(self, name: str, where: Row) -> None:
        """Writes the weights, with the row that says where they were taken, if the race keeps them."""
        if self._keeps:
            self.save_model(self._folder / MILESTONES_FOLDER / name, {MILESTONE_FILE: where})

    def save_model(self, folder: Path, notes: dict[str, Row]) -> None:
        checkpoint.save_model(folder, self._adapter.model, self._data.tokenizer, notes)

    def peak_bytes(self) -> int:
        """Of training and validation, on the device, in earlier processes of the run too."""
        return max(self._peak_bytes, peak_bytes(self._adapter.device))

    def state_dict(self) -> Row:
        return {
            "left": self.left,
            "best": None if math.isinf(self.best) else self.best,
            "last_good": self.last_good,
            "peak_bytes": self.peak_bytes(),
        }

    def load_state_dict(self, state: Row) -> None:
        self.left, self.best = state["left"], math.inf if state["best"] is None else state["best"]
        self.last_good, self._peak_bytes = state["last_good"], state["peak_bytes"]
