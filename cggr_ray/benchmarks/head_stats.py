"""`bench head_stats`: statistics of every position from hidden states, against the GPU's own rate of products.

value = 2 N D V / time, over the rate of a large product in the same dtype timed in the same run. `ours` is the op as it
runs. `eager` and `compiled` form logits a chunk of rows at a time and take the same statistics of them. `liger` and
`cce` are the forwards of two fused losses, which give the NLL alone; they are measured where they are installed. Rows
in micronats hold the largest absolute error of some rows against float64.

A shape is `vVOCABULARY/ROWSxWIDTH`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from math import nan
from pathlib import Path

import torch
from torch import Tensor

from cggr_ray.benchmarks.rows import BenchRow, Shape, bench_row
from cggr_ray.benchmarks.timing import Timing, interleaved
from cggr_ray.compiling import compiled_on
from cggr_ray.device import pick_device
from cggr_ray.kernels.head_stats.op import head_stats
from cggr_ray.kernels.head_stats.reference import HeadStats, chunk_stats
from cggr_ray.kernels.selected_ce.op import chunks

SHAPES = ("v32000/16384x2048", "v49152/16384x576", "v128256/16384x2048", "v262144/16384x2560")
PEERS = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}
# Rows that are compared with float64, and the edge of the product that sets the rate.
CHECKED_ROWS = 256
EDGE = {"cuda": 8192, "cpu": 512}
# Of the logits: large enough that some tokens are certain and others are not.
LOGIT_SPREAD = 3.0
UNLABELLED_FRACTION = 0.1
NOT_MEASURED = Timing(nan, nan, nan, nan)


@dataclass(frozen=True)
class Operands:
    hidden_ND: Tensor
    head_VD: Tensor
    labels_N: Tensor

    @classmethod
    def random(cls, shape: Shape, device: torch.device, dtype: torch.dtype) -> Operands:
        vocabulary, width = parsed_vocabulary(shape), shape.positions
        g = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(shape.rows, width, generator=g, device=device, dtype=dtype)
        head = torch.randn(vocabulary, width, generator=g, device=device, dtype=dtype) * (LOGIT_SPREAD / width**0.5)
        labels = torch.randint(vocabulary, (shape.rows,), generator=g, device=device)
        unlabelled = torch.rand(shape.rows, generator=g, device=device) < UNLABELLED_FRACTION
        return cls(hidden, head, labels.masked_fill(unlabelled, -100))

    def part(self, rows: slice) -> Operands:
        return Operands(self.hidden_ND[rows], self.head_VD, self.labels_N[rows])


def parsed_vocabulary(shape: Shape) -> int:
    """Raises ValueError for a shape that does not start with vVOCABULARY."""
    if not (shape.model.startswith("v") and shape.model[1:].isdigit()):
        raise ValueError(f"shape {str(shape)!r}; accepted: vVOCABULARY/ROWSxWIDTH, such as {SHAPES[0]}")
    return int(shape.model[1:])


@torch.no_grad()
def bench_head_stats(shape: Shape, device: str, rounds: int, folder: Path) -> list[BenchRow]:
    where = pick_device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    operands = Operands.random(shape, where, dtype)
    edge = EDGE[where.type]
    compiled = compiled_on(where, chunk_stats)
    product = f"matmul_{edge}"
    providers: dict[str, Callable[[], object]] = {
        "ours": lambda: ours(operands),
        "eager": lambda: by_chunks(chunk_stats, operands),
        "compiled": lambda: by_chunks(compiled, operands),
        **peers(operands),
        product: square_product(edge, where, dtype),
    }
    times = interleaved({name: _called(call) for name, call in providers.items()}, rounds, where)
    rate = 2 * edge**3 / times[product].p50
    flops = 2 * operands.hidden_ND.numel() * len(operands.head_VD)

    def row(name: str, timing: Timing, value: float, unit: str) -> BenchRow:
        return bench_row("head_stats", shape, name, dtype, where, timing, value, unit)

    rows = [row(name, t, flops / t.p50 / rate, "of_matmul") for name, t in times.items() if name != product]
    rows.append(row(product, times[product], rate / 1e9, "TFLOP/s"))
    rows += [row(name, NOT_MEASURED, nan, "not_installed") for name in PEERS if name not in providers]
    for name, call in {"ours": ours, "eager": lambda part: by_chunks(chunk_stats, part)}.items():
        nll, entropy = errors(operands, call)
        rows.append(row(name, times[name], nll * 1e6, "nll_error_micronats"))
        rows.append(row(name, times[name], entropy * 1e6, "entropy_error_micronats"))
    return rows


def ours(operands: Operands) -> HeadStats:
    return head_stats(operands.hidden_ND, operands.head_VD, operands.labels_N)


def by_chunks(statistics: Callable[[Tensor, Tensor], HeadStats], operands: Operands) -> HeadStats:
    """Statistics of logits that are formed a chunk of rows at a time."""
    found = [
        statistics(operands.hidden_ND[part] @ operands.head_VD.mT, operands.labels_N[part])
        for part in chunks(operands.hidden_ND, operands.head_VD)
    ]
    return HeadStats(*(torch.cat(values) for values in zip(*found, strict=True)))


def errors(operands: Operands, statistics: Callable[[Operands], HeadStats]) -> tuple[float, float]:
    """(NLL, entropy): the largest absolute error of the first rows against float64."""
    part = operands.part(slice(0, CHECKED_ROWS))
    exact = chunk_stats(part.hidden_ND.double() @ part.head_VD.double().mT, part.labels_N)
    found = statistics(part)
    return (
        (found.nll - exact.nll).abs().nan_to_num().max().item(),
        (found.entropy - exact.entropy).abs().nan_to_num().max().item(),
    )


def peers(operands: Operands) -> dict[str, Callable[[], object]]:
    """The forwards of other fused losses, of those that are installed; no unlabelled row is dropped for ours alone."""
    hidden, head, labels = operands.hidden_ND, operands.head_VD, operands.labels_N
    calls: dict[str, Callable[[], object]] = {}
    if not hidden.is_cuda:
        return calls
    if find_spec(PEERS["liger"]):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        calls["liger"] = lambda: liger_fused_linear_cross_entropy(hidden, head, labels, reduction="none")
    if find_spec(PEERS["cce"]):
        from cut_cross_entropy import linear_cross_entropy

        calls["cce"] = lambda: linear_cross_entropy(hidden, head, labels, reduction="none")
    return calls


def square_product(edge: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    left, right = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


def _called(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        call()

    return run
