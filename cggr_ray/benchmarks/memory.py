"""`bench memory`: what every optimizer holds (`accounting`), and the largest micro-batch that fits beside weights,
gradients and optimizer state, found by trying.

Forward and backward of rows of the shape's length, one document each, more rows every time until the device has no
memory left. The shape's row count is where the search starts. The chunked head serves all providers. The value is the
largest number of rows over that of full training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from cggr_ray.benchmarks.accounting import accounting, release
from cggr_ray.benchmarks.rows import BenchRow, Shape, bench_row
from cggr_ray.benchmarks.step import random_micro, random_model
from cggr_ray.benchmarks.timing import Timing
from cggr_ray.benchmarks.workload import NOW
from cggr_ray.device import pick_device
from cggr_ray.learner import Pass
from cggr_ray.models.adapter import Adapter
from cggr_ray.recipe import Recipe
from cggr_ray.routing.tokens import AllTokens, RandomTokens, SelectedTokens
from cggr_ray.telemetry.gpu import MIB

SHAPES = ("llama-1.5b/8x2048", "gemma-3-4b/4x2048")
# The search stops when the rows that fit and the rows that do not are this close, relatively.
CLOSE = 0.03
RATIO = 0.25
PARTS: dict[str, AllTokens | SelectedTokens | RandomTokens] = {
    "full": AllTokens(),
    "kept_0.25_before_const": RandomTokens(RATIO, "before", "const"),
    "kept_0.25_before_live": RandomTokens(RATIO, "before", "live"),
    "kept_0.25_two_pass_const": SelectedTokens(RATIO, "loss", plan="two_pass", detach="const"),
}


def bench_memory(shape: Shape, device: str, rounds: int, folder: Path) -> Iterator[BenchRow]:
    """`rounds` bounds the number of tries of a provider. Without a GPU, whose memory has an end, nothing is tried."""
    found = pick_device(device)
    yield from accounting(replace(shape, rows=1), found)
    if found.type == "cuda":
        yield from largest_rows(shape, found, rounds)


def largest_rows(shape: Shape, found: torch.device, rounds: int) -> list[BenchRow]:
    """The largest micro-batch of every plan, beside that of full training."""
    release()
    model = random_model(shape.model, found, torch.bfloat16)
    adapter = Adapter(model)
    optimizer = Recipe("bench").optimizer.build(adapter.named_parameters(), adapter.hidden_names(), found)
    resident = torch.cuda.memory_allocated(found) / MIB
    fits = rows_that_fit(adapter, shape, rounds)
    del optimizer
    rows = []
    for name, (most, peak) in fits.items():
        timing = Timing(0.0, 0.0, 0.0, peak)
        for value, unit in ((most / fits["full"][0], "times_full"), (float(most), "rows"), (resident, "resident_mib")):
            rows.append(bench_row("memory", shape, name, torch.bfloat16, found, timing, value, unit))
    return rows


def rows_that_fit(adapter: Adapter, shape: Shape, tries: int) -> dict[str, tuple[int, float]]:
    """(rows that fit, MiB at the peak with them) of every provider.

    Raises:
        ValueError: not one row of full training fits, so there is nothing to compare with.
    """
    found: dict[str, tuple[int, float]] = {}
    for name, part in PARTS.items():
        found[name] = most_rows(part, adapter, shape, tries)
        if found["full"][0] == 0:
            raise ValueError(f"shape {str(shape)!r}: not one row of full training fits in this device's memory; "
                             "accepted: a smaller model or shorter rows")  # fmt: skip
    return found


def most_rows(
    part: AllTokens | SelectedTokens | RandomTokens, adapter: Adapter, shape: Shape, tries: int
) -> tuple[int, float]:
    """(rows that fit, MiB at the peak with them). The next larger number that was tried did not fit."""
    fitting, peak, failing = 0, 0.0, None
    total = torch.cuda.get_device_properties(adapter.device).total_memory / MIB
    resident = torch.cuda.memory_allocated(adapter.device) / MIB
    rows = shape.rows
    for _ in range(tries):
        used = peak_of(part, adapter, replace(shape, rows=rows))
        if used is None:
            failing = rows
        else:
            fitting, peak = rows, used
        if failing is not None and failing - fitting <= max(1, round(CLOSE * fitting)):
            return fitting, peak
        if failing is None:
            # Memory grows with the rows: a little more than would fit by that, to see it fail.
            room = (total - resident) / (peak - resident)
            rows = max(fitting + 1, math.ceil(fitting * room * (1 + CLOSE / 2)))
        else:
            rows = (fitting + failing) // 2
    raise ValueError(f"{tries} rounds were too few to find where memory ends; accepted: more")


def peak_of(part: AllTokens | SelectedTokens | RandomTokens, adapter: Adapter, shape: Shape) -> float | None:
    """MiB at the peak of a forward and backward, or None where it ran out of memory."""
    device = adapter.device
    micro = random_micro(shape, adapter.head_VD.shape[0], device)
    run_pass = Pass(Recipe("bench", tokens=part), adapter, 0, micro.tokens_BT.numel())
    run_pass.router.begin(micro, NOW)
    ratio = 1.0 if isinstance(part, AllTokens) else RATIO
    scale = torch.tensor(1 / micro.labelled, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        for _ in range(2):
            run_pass(micro, scale, ratio)
            for _, parameter in adapter.named_parameters():
                parameter.grad = None
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / MIB
    except torch.OutOfMemoryError:
        return None
    finally:
        for _, parameter in adapter.named_parameters():
            parameter.grad = None
        release()
