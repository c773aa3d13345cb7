"""metrics.jsonl: one object a line, append-only. Values that are not finite are written as null."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cggr_ray.schema import METRICS_FILE
from cggr_ray.telemetry.tracker import Row


def plain(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


class JsonlTracker:
    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS_FILE
        self._end_torn_line()

    def log(self, row: Row) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(row), allow_nan=False) + "\n")

    def finish(self, summary: Row) -> None:
        """Rows are on disk already."""

    def _end_torn_line(self) -> None:
        """Cuts the unfinished last line that a killed writer left, so that appending does not corrupt a row."""
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
