"""`bench logit_stats`: the same statistics from logits that exist already, against the GPU's own copy bandwidth.

value = bytes of the logits / time, over the bytes a second (read plus written) of a copy of them timed in the same run,
both by the GPU's own clock.
`eager` and `compiled` take chunks of rows, as they would not fit whole.

A shape is `DTYPE/ROWSxVOCABULARY`, with bf16 or fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cggr_ray.benchmarks.rows import BenchRow, Shape, bench_row
from cggr_ray.benchmarks.timing import interleaved
from cggr_ray.compiling import compiled_on
from cggr_ray.device import pick_device
from cggr_ray.kernels.head_stats.reference import HeadStats, chunk_stats
from cggr_ray.kernels.logit_stats.op import logit_stats

SHAPES = ("bf16/16384x49152", "bf16/8192x128256", "bf16/8192x262144", "fp32/8192x128256")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Rows of a chunk of `eager` and `compiled`, by the bytes of their logits.
CHUNK_BYTES = 1 << 29


def parsed_dtype(shape: Shape) -> torch.dtype:
    """Raises ValueError for a shape that does not start with a dtype."""
    if shape.model not in DTYPES:
        raise ValueError(f"shape {str(shape)!r}; accepted: DTYPE/ROWSxVOCABULARY, DTYPE one of {', '.join(DTYPES)}")
    return DTYPES[shape.model]


@torch.no_grad()
def bench_logit_stats(shape: Shape, device: str, rounds: int, folder: Path) -> list[BenchRow]:
    where, dtype = pick_device(device), parsed_dtype(shape)
    g = torch.Generator(where).manual_seed(0)
    logits = torch.randn(shape.rows, shape.positions, generator=g, device=where, dtype=dtype) * 3
    labels = torch.randint(shape.positions, (shape.rows,), generator=g, device=where)
    target = torch.empty_like(logits)
    compiled = compiled_on(where, chunk_stats)

    def ours() -> None:
        logit_stats(logits, labels)

    def copy() -> None:
        target.copy_(logits)

    providers: dict[str, Callable[[], None]] = {
        "ours": ours,
        "eager": lambda: by_chunks(chunk_stats, logits, labels),
        "compiled": lambda: by_chunks(compiled, logits, labels),
        "copy": copy,
    }
    times = interleaved(providers, rounds, where, kernels=True)
    size = logits.numel() * logits.element_size()
    bandwidth = 2 * size / times["copy"].p50
    rows = []
    for name, timing in times.items():
        value, unit = (bandwidth / 1e6, "GB/s") if name == "copy" else (size / timing.p50 / bandwidth, "of_copy")
        rows.append(bench_row("logit_stats", shape, name, dtype, where, timing, value, unit))
    return rows


def by_chunks(statistics: Callable[[Tensor, Tensor], HeadStats], logits_NV: Tensor, labels_N: Tensor) -> None:
    size = max(1, CHUNK_BYTES // (logits_NV.shape[1] * logits_NV.element_size()))
    for logits, labels in zip(logits_NV.split(size), labels_N.split(size), strict=True):
        statistics(logits, labels)
