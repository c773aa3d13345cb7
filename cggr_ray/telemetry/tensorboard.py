"""TensorBoard event files in `<run>/tensorboard`."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from cggr_ray.schema import STEP
from cggr_ray.telemetry.tracker import Row, scalars


class TensorBoardTracker:
    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, row: Row) -> None:
        for name, value in scalars(row).items():
            if isinstance(value, int | float) and name != STEP:
                self._writer.add_scalar(name, value, row[STEP])

    def finish(self, summary: Row) -> None:
        self._writer.close()
