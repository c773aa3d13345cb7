"""What `cggr-ray bench` prints of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cggr_ray import benchmarks
from cggr_ray.benchmarks import loop
from cggr_ray.benchmarks.rows import BenchRow, Shape, bench_row
from cggr_ray.benchmarks.timing import Timing


@pytest.mark.parametrize(("peak", "printed"), [(0.0, "–"), (13500.6, "13500.60")])
def test_a_peak_that_was_not_measured_is_no_number(
    peak: float, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def bench(shape: Shape, device: str, rounds: int, folder: Path) -> Iterator[BenchRow]:
        timing = Timing(1.25, 2.5, 3.75, peak)
        yield bench_row("loop", shape, "ours", torch.float32, torch.device("cpu"), timing, 1.0, "ours_over_this")

    monkeypatch.setattr(loop, "bench_loop", bench)
    monkeypatch.setattr(benchmarks, "check_tests", lambda name: None)
    benchmarks.run_bench("loop", ["tiny/2x64"], tmp_path, 1, "cpu")
    row = next(line for line in capsys.readouterr().out.splitlines() if " ours " in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells == ["ours", "1.25", "2.50", "3.75", printed, "1.0000", "ours_over_this"]
