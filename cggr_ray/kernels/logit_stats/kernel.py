# mypy: disable-error-code="no-untyped-def"
"""Triton kernel of `logit_stats`: one program a row, or several where rows are few, each logit read once.

A thread keeps the statistics of `head_stats.kernel` for lanes of its own, each fed one vector of logits at a time, so
that threads meet once a row, at the end, and not once a tile. Shapes: N rows, V vocabulary, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cggr_ray.kernels.head_stats.kernel import FLOOR, LOG2E, absorb, launch_merge, runner_up
from cggr_ray.kernels.head_stats.reference import HeadStats
from cggr_ray.kernels.head_stats.tiling import NUM_PARTS

# Lanes of a program, threads times four, so that a thread has four vectors in flight.
LANES, WARPS = 256, 4
# Bytes of a vector: one load of a thread.
VECTOR_BYTES = 16
# Programs wanted for each multiprocessor, and tiles wanted for each program.
PROGRAMS, FEWEST_TILES = 16, 4


@triton.jit(do_not_specialize=["num_rows", "splits"])
def logit_stats_fwd_kernel(
    logits, labels, parts, stride, num_rows, splits, VOCAB: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """Partials of one row over one split of the vocabulary."""
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    SPAN: tl.constexpr = LANES * VECTOR
    tiles: tl.constexpr = (VOCAB + SPAN - 1) // SPAN
    first = (split.to(tl.int64) * tiles // splits).to(tl.int32)
    last = ((split + 1).to(tl.int64) * tiles // splits).to(tl.int32)
    base = logits + row.to(tl.int64) * stride
    y = tl.load(labels + row).to(tl.int32)
    here = (y >= first * SPAN) & (y < last * SPAN) & (y < VOCAB)
    z_y = tl.load(base + y, mask=here, other=float("-inf")).to(tl.float32)

    m = tl.full((LANES,), FLOOR, tl.float32)
    t2 = tl.full((LANES,), FLOOR, tl.float32)
    b = tl.full((LANES,), float("-inf"), tl.float32)
    s0 = tl.zeros((LANES,), tl.float32)
    s1 = tl.zeros((LANES,), tl.float32)
    s2 = tl.zeros((LANES,), tl.float32)
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    for number in range(first, last):
        column = number * SPAN
        columns = column + lanes
        if VOCAB % SPAN:
            tile = tl.load(base + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
        else:
            tile = tl.load(base + columns).to(tl.float32)
        tile = tl.maximum(tile, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        left = tl.full((LANES,), float("-inf"), tl.float32)
        if (y >= column) & (y < column + SPAN):
            tile = tl.where(columns == y, FLOOR, tile)
            left = tl.max(tl.where(columns < y, tile, float("-inf")), 1)
        m, s0, s1, s2, t2, largest = absorb(tile, m, s0, s1, s2, t2, LANES, VECTOR)
        b = tl.maximum(b, tl.where(y >= column + SPAN, largest, left))

    top = tl.max(m, 0)
    fall = m - top
    scale = tl.exp2(fall * LOG2E)
    step = splits.to(tl.int64) * num_rows
    out = parts + split.to(tl.int64) * num_rows + row
    tl.store(out, top)
    tl.store(out + step, tl.sum(scale * s0, 0))
    tl.store(out + 2 * step, tl.sum(scale * (s1 + fall * s0), 0))
    tl.store(out + 3 * step, tl.sum(scale * scale * s2, 0))
    tl.store(out + 4 * step, tl.maximum(runner_up(m, top, 0), tl.max(t2, 0)))
    tl.store(out + 5 * step, z_y)
    tl.store(out + 6 * step, tl.max(b, 0))


def launch_logit_stats(
    logits_NV: Tensor,
    labels_N: Tensor,
    lanes: int = LANES,
    warps: int = WARPS,
    splits: int | None = None,
    vector: int | None = None,
) -> HeadStats:
    """Statistics of every row. Nothing waits for the device. Logits whose rows are not contiguous are copied first."""
    rows, vocab = logits_NV.shape
    device = logits_NV.device
    stats = torch.empty(6, rows, dtype=torch.float32, device=device)
    correct = torch.empty(rows, dtype=torch.bool, device=device)
    if rows == 0:
        return HeadStats._make([*stats.unbind(), correct])
    logits_NV = logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
    labels_N = labels_N.contiguous()
    vector = vector or VECTOR_BYTES // logits_NV.element_size()
    splits = splits or pick_splits(rows, triton.cdiv(vocab, lanes * vector), device)
    parts = torch.empty(NUM_PARTS, splits, rows, dtype=torch.float32, device=device)
    with torch.cuda.device_of(logits_NV):
        logit_stats_fwd_kernel[(rows * splits,)](
            logits_NV,
            labels_N,
            parts,
            logits_NV.stride(0),
            rows,
            splits,
            VOCAB=vocab,
            LANES=lanes,
            VECTOR=vector,
            num_warps=warps,
        )
        launch_merge(parts, labels_N, vocab, stats, correct)
    return HeadStats._make([*stats.unbind(), correct])


def pick_splits(rows: int, tiles: int, device: torch.device) -> int:
    """One program a row where that fills the device, else as many as do."""
    wanted = PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(wanted // rows, tiles // FEWEST_TILES))
