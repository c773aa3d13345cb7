"""TensorBoard event files in `<run>/tensorboard`."""

from __future__ import annotations

from itertools import pairwise
from operator import mul
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from cggr_ray.schema import HISTOGRAMS, KIND, STEP
from cggr_ray.telemetry.tracker import Row, scalars


class TensorBoardTracker:
    def __init__(self, folder: Path) -> None:
        self._folder = str(folder / "tensorboard")
        self._writer = SummaryWriter(self._folder)

    def log(self, row: Row) -> None:
        if row[KIND] == "resumed":
            # What an earlier process wrote of later steps is taken back: they come again.
            self._writer.close()
            self._writer = SummaryWriter(self._folder, purge_step=row[STEP] + 1)
        for name, value in scalars(row).items():
            if isinstance(value, int | float) and name != STEP:
                self._writer.add_scalar(name, value, row[STEP])
            elif name in HISTOGRAMS and value is not None:
                self._add_histogram(name, value["edges"], value["counts"], row[STEP])

    def _add_histogram(self, name: str, edges: list[float], counts: list[float], step: int) -> None:
        """Sums are of the middles of the bins."""
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        self._writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(map(mul, counts, middles)),
            sum_squares=sum(n * x**2 for n, x in zip(counts, middles, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )

    def finish(self, summary: Row) -> None:
        self._writer.close()
