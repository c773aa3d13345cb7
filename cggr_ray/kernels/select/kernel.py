"""Order statistics of rows by radix select, in Triton. See `reference` for the definition.

Every position has a code, an integer whose ascending order is the order of the ranks and which no two share:

    code = group << (32 + index_bits) | descending bits of the key << index_bits | index

The position of rank r is found digit by digit from the top: a histogram of the next digit over the codes that begin
with the digits so far, then the first bin whose running count passes r. Its code is a threshold, so that the classes
are plain comparisons: no sort, no carrying of ties, nothing that depends on the order of execution.
One program searches one rank of one row, in tiles, so a row may have any length.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DIGIT_BITS = 5
CODE_BITS = 63
# Positions in a tile: of the search, of the comparisons, of the compaction.
SEARCH_TILE, CLASS_TILE, COMPACT_TILE = 4096, 1024, 4096


@triton.jit
def _codes(keys_ptr, groups_ptr, row, positions, width, index_bits):
    at = row.to(tl.int64) * width + positions
    keys = tl.load(keys_ptr + at, mask=positions < width, other=0.0)
    keys = tl.where(keys != keys, float("-inf"), keys)
    bits = keys.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    # Among positive floats the bits ascend with the value, among negative ones (the sign bit set) they descend.
    code = tl.where(bits >= 0, 0x7FFFFFFF - bits, bits).to(tl.int64) & 0xFFFFFFFF
    if groups_ptr is not None:
        groups = tl.load(groups_ptr + at, mask=positions < width, other=0)
        code |= groups.to(tl.int64) << 32
    return (code << index_bits) | positions


@triton.jit(do_not_specialize=["num_ranks", "index_bits", "passes"])
def select_thresholds_kernel(
    keys_ptr,
    groups_ptr,
    ranks_ptr,
    thresholds_ptr,
    width,
    num_ranks,
    index_bits,
    passes,
    DIGIT: tl.constexpr,
    TILE: tl.constexpr,
):
    row, j = tl.program_id(0), tl.program_id(1)
    wanted = tl.load(ranks_ptr + row * num_ranks + j)
    left = tl.minimum(wanted, width).to(tl.int32)
    prefix = tl.full((), 0, tl.int64)
    bins = tl.arange(0, 1 << DIGIT)
    for done in range(passes):
        shift = (passes - 1 - done) * DIGIT
        counts = tl.zeros((1 << DIGIT,), tl.int32)
        for start in range(0, width, TILE):
            positions = start + tl.arange(0, TILE)
            code = _codes(keys_ptr, groups_ptr, row, positions, width, index_bits) >> shift
            alike = (code >> DIGIT == prefix) & (positions < width)
            counts += tl.histogram((code & ((1 << DIGIT) - 1)).to(tl.int32), 1 << DIGIT, mask=alike)
        digit = tl.sum((tl.cumsum(counts, 0) <= left).to(tl.int32), 0)
        left -= tl.sum(tl.where(bins < digit, counts, 0), 0)
        prefix = (prefix << DIGIT) | digit
    # A rank past the row has no position: no code reaches its threshold.
    threshold = tl.where(wanted < width, prefix, 0x7FFFFFFFFFFFFFFF)
    tl.store(thresholds_ptr + row * num_ranks + j, threshold)


@triton.jit(do_not_specialize=["num_ranks", "index_bits"])
def select_classes_kernel(
    keys_ptr, groups_ptr, thresholds_ptr, classes_ptr, width, num_ranks, index_bits, TILE: tl.constexpr
):
    row = tl.program_id(0)
    positions = tl.program_id(1) * TILE + tl.arange(0, TILE)
    code = _codes(keys_ptr, groups_ptr, row, positions, width, index_bits)
    classes = tl.zeros((TILE,), tl.int32)
    for j in range(num_ranks):
        classes += (code >= tl.load(thresholds_ptr + row * num_ranks + j)).to(tl.int32)
    tl.store(classes_ptr + row.to(tl.int64) * width + positions, classes, mask=positions < width)


@triton.jit(do_not_specialize=["slots", "fill"])
def select_compact_kernel(mask_ptr, index_ptr, width, slots, fill, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    found = tl.full((), 0, tl.int32)
    for start in range(0, width, TILE):
        positions = start + tl.arange(0, TILE)
        true = tl.load(mask_ptr + row * width + positions, mask=positions < width, other=0).to(tl.int32)
        places = found + tl.cumsum(true, 0) - true
        tl.store(index_ptr + row * slots + places, positions, mask=(true != 0) & (places < slots))
        found += tl.sum(true, 0)
    for start in range(0, slots, TILE):
        places = start + tl.arange(0, TILE)
        tl.store(index_ptr + row * slots + places, fill, mask=(places >= found) & (places < slots))


def rank_classes(keys_BT: Tensor, ranks_BJ: Tensor, groups_BT: Tensor | None, num_groups: int) -> Tensor:
    """The class of every position, int32."""
    (rows, width), num_ranks = keys_BT.shape, ranks_BJ.shape[1]
    index_bits = (width - 1).bit_length()
    bits = (num_groups - 1).bit_length() + 32 + index_bits
    assert bits <= CODE_BITS, f"{num_groups} groups of {width} positions"
    keys, ranks = keys_BT.contiguous(), ranks_BJ.contiguous()
    groups = None if groups_BT is None else groups_BT.contiguous()
    thresholds = torch.empty(ranks.shape, dtype=torch.int64, device=keys.device)
    classes = torch.empty(keys.shape, dtype=torch.int32, device=keys.device)
    tile = _tile(width, SEARCH_TILE)
    select_thresholds_kernel[(rows, num_ranks)](
        keys,
        groups,
        ranks,
        thresholds,
        width,
        num_ranks,
        index_bits,
        triton.cdiv(bits, DIGIT_BITS),
        DIGIT=DIGIT_BITS,
        TILE=tile,
        num_warps=tile // 256 if tile > 1024 else 4,
    )
    tile = _tile(width, CLASS_TILE)
    select_classes_kernel[(rows, triton.cdiv(width, tile))](
        keys, groups, thresholds, classes, width, num_ranks, index_bits, TILE=tile
    )
    return classes


def compact(mask_BT: Tensor, slots: int, fill: int) -> Tensor:
    """Positions of the first `slots` true entries of each row, ascending, int64; slots left over hold `fill`."""
    rows, width = mask_BT.shape
    index_BK = torch.empty((rows, slots), dtype=torch.int64, device=mask_BT.device)
    select_compact_kernel[(rows,)](
        mask_BT.contiguous(), index_BK, width, slots, fill, TILE=_tile(width, COMPACT_TILE), num_warps=8
    )
    return index_BK


def _tile(width: int, largest: int) -> int:
    return min(largest, max(128, triton.next_power_of_2(width)))
