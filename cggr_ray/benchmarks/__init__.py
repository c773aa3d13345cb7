"""Benchmarks by name. Each measures real objects of the project, after their tests have passed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cggr_ray.codec import nearest
from cggr_ray.environment import versions

# The tests of what each benchmark measures.
TESTS = {
    "optimizer": ("tests/optim",),
    "loop": ("tests/test_loop.py", "tests/optim"),
    "step": ("tests/sparse", "tests/kernels", "tests/routing"),
    "memory": ("tests/sparse", "tests/optim"),
    "head-stats": ("tests/kernels/test_head_stats.py", "tests/kernels/test_head_stats_kernel.py"),
    "logit-stats": ("tests/kernels/test_logit_stats.py",),
    "workers": ("tests/workers",),
}


def run_bench(name: str, shapes: list[str] | None, out: Path, rounds: int, device: str) -> None:
    """Runs a benchmark, appends its rows to `out`/NAME.csv as it finds them, and prints them.

    Raises:
        ValueError: unknown benchmark, a shape that is none of its own, no repetition, or tests that fail.
    """
    from rich.console import Console
    from rich.table import Table

    from cggr_ray.benchmarks import claims, head_stats, logit_stats, loop, memory, optimizer, step, workers, workload
    from cggr_ray.benchmarks.rows import BenchRow, Shape, append
    from cggr_ray.device import pick_device

    # What is measured, on which shapes, and what refuses a shape that is none of its own.
    benches = {
        "optimizer": (optimizer.bench_optimizer, optimizer.SHAPES, workload.check_model),
        "loop": (loop.bench_loop, loop.SHAPES, workload.check_model),
        "step": (step.bench_step, step.SHAPES, workload.check_model),
        "memory": (memory.bench_memory, memory.SHAPES, workload.check_model),
        "head-stats": (head_stats.bench_head_stats, head_stats.SHAPES, head_stats.parsed_vocabulary),
        "logit-stats": (logit_stats.bench_logit_stats, logit_stats.SHAPES, logit_stats.parsed_dtype),
        "workers": (workers.bench_workers, workers.SHAPES, workload.check_model),
    }
    tables = {"memory": claims.table}
    if name not in benches:
        raise ValueError(f"benchmark {name!r}; {nearest(name, benches)}")
    if rounds < 1:
        raise ValueError(f"--repeats {rounds}; accepted: at least 1")
    pick_device(device)
    measure, default_shapes, check_shape = benches[name]
    parsed = [Shape.parse(text) for text in shapes or default_shapes]
    for shape in parsed:
        check_shape(shape)
    check_tests(name)
    # Compiling takes minutes, which should not pass in silence.
    logging.getLogger(__name__).setLevel(logging.INFO)
    for shape in parsed:
        rows: list[BenchRow] = []
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(shape, device, rounds, Path(folder)):
                path = append(out, [row])
                rows.append(row)
        table = Table("provider", "ms p20", "ms p50", "ms p80", "peak MiB", "value", "unit", title=f"{name} {shape}")
        for row in rows:
            numbers = map(measured, (row.ms_p20, row.ms_p50, row.ms_p80, row.peak_mib))
            table.add_row(row.provider, *numbers, f"{row.value:.4f}", row.unit)
        console = Console(width=120)
        console.print(table)
        if (more := tables.get(name)) is not None:
            console.print(more(shape, rows))
        print(f"rows: {path}")


def measured(figure: float) -> str:
    """A time or a peak of memory, or that there is none."""
    return f"{figure:.2f}" if figure else "–"


def check_tests(name: str) -> None:
    """Runs the tests of what a benchmark measures, unless the same files have passed them here with these versions. A
    figure for something broken is worth nothing. One thread a test, as there is a test for every core."""
    root = Path(__file__).resolve().parents[2]
    paths = [str(root / path) for path in TESTS[name]]
    if not all(Path(path).exists() for path in paths):
        raise ValueError(f"benchmark {name!r} runs its tests first; accepted: a checkout of the project with tests/")
    passed = root / ".cache" / "tested" / f"{name}-{tested_state(root)}"
    if passed.exists():
        return
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n", "auto", "-p", "no:cacheprovider", *paths],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ValueError(f"benchmark {name!r} refused, its tests fail:\n{done.stdout[-2000:]}")
    passed.parent.mkdir(parents=True, exist_ok=True)
    passed.touch()


def tested_state(root: Path) -> str:
    """A hash of the code, the tests and the versions that they run with."""
    state = hashlib.sha256(json.dumps(versions()).encode())
    for path in sorted(p for folder in ("cggr_ray", "tests") for p in (root / folder).rglob("*.py")):
        state.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()[:16]
