"""Benchmark rows: typed, appended to results/bench/NAME.csv."""

from __future__ import annotations

import csv
import importlib.util
import platform
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch

from cggr_ray.benchmarks.timing import Timing
from cggr_ray.environment import commit, version
from cggr_ray.schema import BENCH_COLUMNS


@dataclass(frozen=True)
class BenchRow:
    """One provider on one shape. `value` in `unit` is what the benchmark is about; times are of one call.

    A time or a peak of 0 was not measured: memory on a CPU, times where values are counted.
    """

    bench: str
    shape: str
    provider: str
    dtype: str
    gpu: str
    torch: str
    triton: str
    commit: str
    ms_p20: float
    ms_p50: float
    ms_p80: float
    peak_mib: float
    value: float
    unit: str


assert tuple(f.name for f in fields(BenchRow)) == BENCH_COLUMNS


@dataclass(frozen=True)
class Shape:
    """`llama-1.5b/4x2048`: a model, rows, positions a row."""

    model: str
    rows: int
    positions: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        model, _, batch = text.partition("/")
        rows, _, positions = batch.partition("x")
        if not (model and all(part.isdigit() and int(part) > 0 for part in (rows, positions))):
            raise ValueError(f"shape {text!r}; accepted: model/ROWSxPOSITIONS, such as smollm-135m/32x1024")
        return cls(model, int(rows), int(positions))

    def __str__(self) -> str:
        return f"{self.model}/{self.rows}x{self.positions}"


def bench_row(
    bench: str,
    shape: Shape,
    provider: str,
    dtype: torch.dtype,
    device: torch.device,
    timing: Timing,
    value: float,
    unit: str,
) -> BenchRow:
    """A row with the machine filled in."""
    cuda = device.type == "cuda"
    return BenchRow(
        bench=bench,
        shape=str(shape),
        provider=provider,
        dtype=str(dtype).removeprefix("torch."),
        gpu=torch.cuda.get_device_name(device) if cuda else f"none ({platform.machine()})",
        torch=version("torch"),
        triton=version("triton"),
        commit=commit(),
        ms_p20=round(timing.p20, 4),
        ms_p50=round(timing.p50, 4),
        ms_p80=round(timing.p80, 4),
        peak_mib=round(timing.peak_mib, 1),
        value=round(value, 5),
        unit=unit,
    )


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def not_installed(
    bench: str, shape: Shape, providers: Iterable[str], dtype: torch.dtype, device: torch.device
) -> list[BenchRow]:
    """A row for each provider whose package is missing."""
    nothing = Timing(0.0, 0.0, 0.0, 0.0)
    return [bench_row(bench, shape, name, dtype, device, nothing, 0.0, "not_installed") for name in providers]


def append(folder: Path, rows: Sequence[BenchRow]) -> Path:
    """Appends rows to the benchmark's CSV; returns its path."""
    path = folder / f"{rows[0].bench}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(BENCH_COLUMNS)
        writer.writerows(astuple(row) for row in rows)
    return path
