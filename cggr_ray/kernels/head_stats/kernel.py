# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of `head_stats`: logits live in registers, one tile at a time, and every tile is absorbed into

    m = max z,   s0 = sum e^(z-m),   s1 = sum (z-m) e^(z-m),   s2 = sum e^(2(z-m)),   t2 = second largest z,

all over the columns other than the label's, beside the label's own logit z_y and b, the largest logit to its left.
Absorbing is associative, so the vocabulary is split over programs and their partials are merged by a second kernel,
which adds column y back where a statistic wants it. Nothing is ever subtracted from a sum, so nothing cancels.

No logit is below FLOOR: masked lanes hold it, and it stands for "nothing yet" in a maximum. Being finite it needs no
guard: e^(FLOOR - m) is 0 and FLOOR * 0 is 0, where -inf would give NaN.

Shapes: N rows, D width, V vocabulary, S splits. A tile is ROWS x COLUMNS, its product summed over DEPTH at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cggr_ray.kernels.head_stats.reference import HeadStats
from cggr_ray.kernels.head_stats.tiling import NUM_PARTS, Tiling, pick_splits, pick_tiling

FLOOR = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile; both stay in the registers they are in."""
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def runner_up(values, largest, AXIS: tl.constexpr):
    """The second largest along an axis; the largest itself where it occurs twice."""
    is_largest = values == largest
    below = tl.max(tl.where(is_largest, FLOOR, values), AXIS)
    again = tl.sum(is_largest.to(tl.int32), AXIS) > 1
    return tl.where(again, tl.max(values, AXIS), below)


@triton.jit
def top_two(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The largest and the second largest of every row; equal where the largest occurs twice.

    Folding a tile onto itself keeps the larger of each pair; the second largest of the row is the second largest of
    those or the largest that lost. Two folds, then a search of what is left.
    """
    left, right = halves(tile, ROWS, COLUMNS)
    upper, lost = tl.maximum(left, right), tl.minimum(left, right)
    left, right = halves(upper, ROWS, COLUMNS // 2)
    upper, lost_now = tl.maximum(left, right), tl.minimum(left, right)
    left, right = halves(lost, ROWS, COLUMNS // 2)
    lost = tl.maximum(lost_now, tl.maximum(left, right))
    first = tl.max(upper, 1)
    return first, tl.maximum(runner_up(upper, first[:, None], 1), tl.max(lost, 1))


@triton.jit
def absorb(tile, m, s0, s1, s2, t2, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The statistics of rows after one more tile, and the tile's own maximum."""
    first, second = top_two(tile, ROWS, COLUMNS)
    t2 = tl.maximum(tl.minimum(m, first), tl.maximum(t2, second))
    top = tl.maximum(m, first)
    fall = m - top
    scale = tl.exp2(fall * LOG2E)
    s1 = scale * (s1 + fall * s0)
    s0 = scale * s0
    s2 = scale * scale * s2
    below = tile - top[:, None]
    e = tl.exp2(below * LOG2E)
    return top, s0 + tl.sum(e, 1), s1 + tl.sum(e * below, 1), s2 + tl.sum(e * e, 1), t2, first


@triton.jit
def load_tile(
    matrix,
    row,
    column,
    num_rows,
    stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """A ROWS x DEPTH tile of a row-major matrix, 0 outside it: by the copy engine, or by pointers."""
    if TMA:
        tile = matrix.load([row, column])
    else:
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, DEPTH)
        inside = rows[:, None] < num_rows
        if WIDTH % DEPTH:
            inside &= columns[None, :] < WIDTH
        tile = tl.load(matrix + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)
    return tile


@triton.jit(do_not_specialize=["num_rows", "splits", "group"])
def head_stats_fwd_kernel(
    hidden,
    head,
    labels,
    parts,
    softcap,
    hidden_stride,
    head_stride,
    num_rows,
    splits,
    group,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Partials of one block of rows over one split of the vocabulary.

    Programs are numbered so that those that run together share both operands in L2: `group` blocks of rows go through
    the splits together.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(num_rows, ROWS)
    first_block = program // (group * splits) * group
    blocks = tl.minimum(row_blocks - first_block, group)
    inside = program % (group * splits)
    row = (first_block + inside % blocks) * ROWS
    split = inside // blocks

    rows = row + tl.arange(0, ROWS)
    y = tl.load(labels + rows, mask=rows < num_rows, other=-1).to(tl.int32)
    m = tl.full((ROWS,), FLOOR, tl.float32)
    t2 = tl.full((ROWS,), FLOOR, tl.float32)
    z_y = tl.full((ROWS,), float("-inf"), tl.float32)
    b = tl.full((ROWS,), float("-inf"), tl.float32)
    s0 = tl.zeros((ROWS,), tl.float32)
    s1 = tl.zeros((ROWS,), tl.float32)
    s2 = tl.zeros((ROWS,), tl.float32)

    tiles: tl.constexpr = (VOCAB + COLUMNS - 1) // COLUMNS
    # In 64 bits: many tiles times many splits.
    first = (split.to(tl.int64) * tiles // splits).to(tl.int32)
    last = ((split + 1).to(tl.int64) * tiles // splits).to(tl.int32)
    for number in tl.range(first, last, flatten=FLATTEN):
        column = number * COLUMNS
        logits = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in tl.range(0, WIDTH, DEPTH):
            h = load_tile(hidden, row, depth, num_rows, hidden_stride, WIDTH, ROWS, DEPTH, TMA)
            w = load_tile(head, column, depth, VOCAB, head_stride, WIDTH, COLUMNS, DEPTH, TMA)
            logits = tl.dot(h, w.T, logits, input_precision=PRECISION)
        if CAPPED:
            # tanh(x) = (1 - t) / (1 + t) with t = e^(-2x), for x >= 0.
            t = tl.exp2(tl.abs(logits) * (-2 * LOG2E / softcap))
            logits = tl.where(logits < 0, -softcap, softcap) * ((1 - t) / (1 + t))
        # Column y leaves the tile, and so do lanes past the vocabulary. Few tiles hold a label of these rows.
        left = tl.full((ROWS,), float("-inf"), tl.float32)
        labelled = tl.max(((y >= column) & (y < column + COLUMNS)).to(tl.int32), 0) > 0
        if labelled | (column + COLUMNS > VOCAB):
            columns = column + tl.arange(0, COLUMNS)[None, :]
            is_y = columns == y[:, None]
            z_y = tl.maximum(z_y, tl.max(tl.where(is_y, logits, float("-inf")), 1))
            logits = tl.where(is_y | (columns >= VOCAB), FLOOR, logits)
            left = tl.max(tl.where(columns < y[:, None], logits, float("-inf")), 1)
        m, s0, s1, s2, t2, largest = absorb(logits, m, s0, s1, s2, t2, ROWS, COLUMNS)
        b = tl.maximum(b, tl.where(y >= column + COLUMNS, largest, left))

    step = splits.to(tl.int64) * num_rows
    out = parts + split.to(tl.int64) * num_rows + rows
    live = rows < num_rows
    tl.store(out, m, mask=live)
    tl.store(out + step, s0, mask=live)
    tl.store(out + 2 * step, s1, mask=live)
    tl.store(out + 3 * step, s2, mask=live)
    tl.store(out + 4 * step, t2, mask=live)
    tl.store(out + 5 * step, z_y, mask=live)
    tl.store(out + 6 * step, b, mask=live)


@triton.jit
def join_parts(m, s0, s1, s2, t2, m_, s0_, s1_, s2_, t2_):
    """The statistics of two disjoint sets of columns taken together."""
    top = tl.maximum(m, m_)
    fall, fall_ = m - top, m_ - top
    scale, scale_ = tl.exp2(fall * LOG2E), tl.exp2(fall_ * LOG2E)
    s1 = scale * (s1 + fall * s0) + scale_ * (s1_ + fall_ * s0_)
    s2 = scale * scale * s2 + scale_ * scale_ * s2_
    s0 = scale * s0 + scale_ * s0_
    return top, s0, s1, s2, tl.maximum(tl.minimum(m, m_), tl.maximum(t2, t2_))


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], to float32's relative accuracy."""
    series = x * (1 - x * (0.5 - x * (1 / 3 - x * (0.25 - x * 0.2))))
    return tl.where(x < 0.03, series, tl.log(1 + x))


@triton.jit(do_not_specialize=["num_rows", "splits"])
def head_stats_merge_kernel(parts, labels, stats, correct, num_rows, splits, VOCAB: tl.constexpr, ROWS: tl.constexpr):
    """Statistics of a block of rows from the partials of all splits."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < num_rows
    y = tl.load(labels + rows, mask=live, other=-1)
    m = tl.full((ROWS,), FLOOR, tl.float32)
    t2 = tl.full((ROWS,), FLOOR, tl.float32)
    z_y = tl.full((ROWS,), float("-inf"), tl.float32)
    b = tl.full((ROWS,), float("-inf"), tl.float32)
    s0 = tl.zeros((ROWS,), tl.float32)
    s1 = tl.zeros((ROWS,), tl.float32)
    s2 = tl.zeros((ROWS,), tl.float32)
    step = splits.to(tl.int64) * num_rows
    at = parts + rows
    for _ in range(splits):
        m_ = tl.load(at, mask=live, other=FLOOR)
        s0_ = tl.load(at + step, mask=live, other=0.0)
        s1_ = tl.load(at + 2 * step, mask=live, other=0.0)
        s2_ = tl.load(at + 3 * step, mask=live, other=0.0)
        t2_ = tl.load(at + 4 * step, mask=live, other=FLOOR)
        m, s0, s1, s2, t2 = join_parts(m, s0, s1, s2, t2, m_, s0_, s1_, s2_, t2_)
        z_y = tl.maximum(z_y, tl.load(at + 5 * step, mask=live, other=0.0))
        b = tl.maximum(b, tl.load(at + 6 * step, mask=live, other=0.0))
        at += num_rows

    # Column y comes back: all sums relative to the largest logit of all.
    top = tl.maximum(m, z_y)
    fall, fall_y = m - top, tl.maximum(z_y - top, FLOOR)
    scale, e_y = tl.exp2(fall * LOG2E), tl.exp2(fall_y * LOG2E)
    total = scale * s0 + e_y
    second = tl.maximum(tl.minimum(m, z_y), t2)
    # The log-odds against the label; nll = log(1 + e^odds).
    odds = (m - z_y) + tl.log(s0)
    nll = tl.maximum(odds, 0.0) + log1p(tl.exp2(-tl.abs(odds) * LOG2E))
    entropy = tl.log(total) - (scale * (s1 + fall * s0) + e_y * fall_y) / total
    margin = (1 - tl.exp2((second - top) * LOG2E)) / total
    gnorm = scale * tl.sqrt(s0 * s0 + s2) / total
    labelled = (y >= 0) & (y < VOCAB)
    # No logit above the floor, or one without end: what was summed is no distribution.
    known = labelled & (top > FLOOR) & (top < float("inf"))
    nan = float("nan")
    out = stats + rows
    size = num_rows.to(tl.int64)
    tl.store(out, tl.where(known, nll, nan), mask=live)
    tl.store(out + size, tl.where(known, entropy, nan), mask=live)
    tl.store(out + 2 * size, tl.where(known, 1 / total, nan), mask=live)
    tl.store(out + 3 * size, tl.where(known, margin, nan), mask=live)
    tl.store(out + 4 * size, tl.where(known, gnorm, nan), mask=live)
    tl.store(out + 5 * size, tl.where(known, top + tl.log(total), nan), mask=live)
    tl.store(correct + rows, labelled & (z_y > b) & (z_y >= m), mask=live)


def launch_head_stats(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    softcap: float | None = None,
    tiling: Tiling | None = None,
    splits: int | None = None,
) -> HeadStats:
    """Statistics of every row; see `reference`. Nothing waits for the device, so a CUDA graph can hold it.

    A matrix whose rows are not contiguous in memory is copied first; `tiling` and `splits` are picked where not given.
    """
    (rows, width), vocab = hidden_ND.shape, len(head_VD)
    device = hidden_ND.device
    stats = torch.empty(6, rows, dtype=torch.float32, device=device)
    correct = torch.empty(rows, dtype=torch.bool, device=device)
    if rows == 0:
        return HeadStats._make([*stats.unbind(), correct])
    hidden_ND, head_VD = (matrix if matrix.stride(1) == 1 else matrix.contiguous() for matrix in (hidden_ND, head_VD))
    labels_N = labels_N.contiguous()
    slots = 1
    if device.type == "cuda":
        machine = torch.cuda.get_device_properties(device)
        capability = (machine.major, machine.minor)
        shared: int = machine.shared_memory_per_block_optin  # type: ignore[attr-defined]
        tiling = tiling or pick_tiling(hidden_ND.dtype, hidden_ND.shape[1], capability, shared)
        slots = machine.multi_processor_count * tiling.resident
    assert tiling is not None, "a tiling is picked for CUDA devices alone"
    row_blocks, tiles = triton.cdiv(rows, tiling.rows), triton.cdiv(vocab, tiling.columns)
    splits = splits or pick_splits(rows, row_blocks, tiles, slots)
    group = max(1, min(row_blocks, tiling.group_bytes // (tiling.rows * width * hidden_ND.element_size())))
    tma = tiling.tma and _describable(hidden_ND) and _describable(head_VD)
    operands = (
        TensorDescriptor.from_tensor(hidden_ND, [tiling.rows, tiling.depth]) if tma else hidden_ND,
        TensorDescriptor.from_tensor(head_VD, [tiling.columns, tiling.depth]) if tma else head_VD,
    )
    parts = torch.empty(NUM_PARTS, splits, rows, dtype=torch.float32, device=device)
    with torch.cuda.device_of(hidden_ND):
        head_stats_fwd_kernel[(row_blocks * splits,)](
            *operands,
            labels_N,
            parts,
            softcap or 1.0,
            hidden_ND.stride(0),
            head_VD.stride(0),
            rows,
            splits,
            group,
            VOCAB=vocab,
            WIDTH=width,
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            DEPTH=tiling.depth,
            CAPPED=softcap is not None,
            PRECISION="ieee",
            TMA=tma,
            FLATTEN=tiling.flatten,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        launch_merge(parts, labels_N, vocab, stats, correct)
    return HeadStats._make([*stats.unbind(), correct])


def launch_merge(parts: Tensor, labels_N: Tensor, vocab: int, stats: Tensor, correct: Tensor) -> None:
    """Fills statistics from partials [NUM_PARTS, splits, rows]."""
    splits, rows = parts.shape[1:]
    block = 128
    head_stats_merge_kernel[(triton.cdiv(rows, block),)](
        parts, labels_N, stats, correct, rows, splits, VOCAB=vocab, ROWS=block, num_warps=4
    )


def _describable(matrix: Tensor) -> bool:
    """Whether the copy engine can read the matrix: rows and start at multiples of 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
