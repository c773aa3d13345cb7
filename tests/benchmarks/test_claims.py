"""The suite's memory table beside what is counted."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cggr_ray import benchmarks
from cggr_ray.benchmarks import claims, memory
from cggr_ray.benchmarks.accounting import FIRST, Training
from cggr_ray.benchmarks.optimizers import OPTIMIZERS
from cggr_ray.benchmarks.rows import Shape, bench_row
from cggr_ray.benchmarks.timing import Timing

TINY = Shape("tiny", 1, 16)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_values_the_same_bytes_are_counted(name: str) -> None:
    training = Training(TINY, OPTIMIZERS[name], CPU, torch.bfloat16)
    training.backward(FIRST)
    assert claims.counted(name, TINY) == training.held()


def test_the_table_says_what_is_claimed_counted_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    # Llama of 28 layers, width 3072, key-value width 1024, inner width 8192, 128256 tokens, tied.
    matrices = 28 * (2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192)
    rest = 128256 * 3072 + (2 * 28 + 1) * 3072
    held = {name: claims.counted(name) for name in ("muon_fp32", "muon_int8")}
    assert held["muon_fp32"]["weights_bytes"] == 2 * (matrices + rest)
    assert held["muon_fp32"]["master_bytes"] == 4 * (matrices + rest)
    assert held["muon_fp32"]["optimizer_bytes"] == pytest.approx(4 * matrices + 8 * rest, rel=1e-6)
    assert held["muon_int8"]["optimizer_bytes"] == pytest.approx((1 + 2 / 128) * (matrices + 2 * rest), rel=1e-3)
    monkeypatch.setattr(claims, "counted", lambda name: held["muon_fp32"])
    nothing, measured = Timing(0.0, 0.0, 0.0, 0.0), {"weights_bytes": 1.5e9, "activation_bytes": 0.25e9}
    rows = [bench_row("memory", TINY, "muon_fp32", torch.bfloat16, CPU, nothing, v, u) for u, v in measured.items()]
    console = Console(width=140, record=True, file=StringIO())
    console.print(claims.table(TINY, rows))
    lines = [line.split("│")[1:-1] for line in console.export_text().splitlines() if line.startswith("│")]
    cells = {label.strip(): [cell.strip() for cell in rest] for label, *rest in lines}
    assert cells["weights"][:2] == ["6 / 6.43 / 1.50", "6 / 6.43 / -"]
    assert cells["master"][0] == "- / 12.85 / -"
    assert cells["optimizer"] == [f"{said} / 14.43 / -" for said in ("12", "1.7", "4-6", "0.6")]
    assert cells["activation"][0] == "8 / - / 0.25" and cells["activation"][3] == "6 / - / -"
    assert cells["all of these"][0] == "26 / 40.13 / 1.75"


def test_the_benchmark_prints_it_behind_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = bench_row("memory", TINY, "e3_full", torch.bfloat16, CPU, Timing(0, 0, 0, 0), 7.25e9, "weights_bytes")
    monkeypatch.setattr(memory, "bench_memory", lambda *_: [row])
    monkeypatch.setattr(benchmarks, "check_tests", lambda _: None)
    monkeypatch.setattr(claims, "counted", lambda name: {})
    benchmarks.run_bench("memory", ["tiny/1x16"], tmp_path, 1, "cpu")
    assert "6 / - / 7.25" in capsys.readouterr().out
