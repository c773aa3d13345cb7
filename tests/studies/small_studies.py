"""What the tests of studies share: the folders of a small model and its data, and options small enough for a core."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cggr_ray.data.dataset import PreparedData


class Folders(NamedTuple):
    model: Path
    data: Path
    prepared: PreparedData

    def options(self) -> list[str]:
        """Of the command line, small enough for a core."""
        rows = ["--calibration-rows", "4", "--heldout-rows", "4", "--micro-rows", "2"]
        return ["--model", str(self.model), "--data", str(self.data), *rows, "--tokens", "32", "--rounds", "2"]
