"""A sweep through real Ray Tune, on the CPU, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_races import cggr_ray, write_race

pytestmark = pytest.mark.slow


def test_a_sweep_stops_the_worse_half_and_writes_its_rows(tmp_path: Path) -> None:
    spec = write_race(tmp_path, budget=3)
    done = cggr_ray("sweep", "baseline", "--race", spec, "--out", tmp_path / "sweep", "--trials", 4)
    rows = [json.loads(line) for line in (tmp_path / "sweep" / "sweep.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and {row["status"] for row in rows} <= {"finished", "stopped"}
    assert any(row["status"] == "finished" for row in rows)
    assert all(row["train_seconds"] <= 3.5 and row["val/loss"] > 0 for row in rows)
    assert len({row["values"]["optimizer.matrix.lr"] for row in rows}) == 4
    assert "best trials" in done.stdout
