"""How `head_stats` is cut into tiles and programs on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

# Numbers that a partial holds: m, s0, s1, s2, t2, z_y, b.
NUM_PARTS = 7
# What the partials of all splits may take.
PARTS_BYTES = 48 << 20
# Fewer tiles than this a program are not worth its start, which takes about as long as START_TILES.
FEWEST_TILES, START_TILES = 4, 0.5


@dataclass(frozen=True)
class Tiling:
    """Tiles of rows x columns logits, their product summed over depth at a time.

    resident: programs that a multiprocessor holds at once. tma: loads by the copy engine. flatten: one loop over tiles
    and depths, so that a tile's loads begin during the statistics of the one before. group_bytes: of L2, for the hidden
    states that go through the vocabulary together; what is left is for the tiles of the head.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    resident: int = 1
    tma: bool = False
    flatten: bool = False
    group_bytes: int = 3 << 20

    def shared_bytes(self, itemsize: int) -> int:
        return (self.rows + self.columns) * self.depth * itemsize * self.stages


# Preferred first; the first that fits in the shared memory of a multiprocessor is taken. Below NARROW the statistics of
# a tile weigh as much as its product, and two smaller programs hide them better than one.
NARROW = 1024
NARROW_TILING = Tiling(128, 128, 64, 4, 3, resident=2)
HALF_TILINGS = (
    Tiling(128, 256, 64, 8, 4),
    Tiling(128, 128, 64, 8, 3),
    Tiling(128, 128, 32, 8, 3),
)
FLOAT_TILINGS = (Tiling(64, 128, 16, 8, 3), Tiling(32, 64, 32, 4, 2))


def pick_tiling(dtype: torch.dtype, width: int, capability: tuple[int, int], shared_bytes: int) -> Tiling:
    """The tiling of a device, by what it can hold."""
    narrow = (NARROW_TILING,) if width < NARROW else ()
    tilings = FLOAT_TILINGS if dtype == torch.float32 else narrow + HALF_TILINGS
    room = shared_bytes - (1 << 10)
    fitting = [tiling for tiling in tilings if tiling.shared_bytes(dtype.itemsize) * tiling.resident <= room]
    assert fitting, f"{shared_bytes} bytes of shared memory hold no tile of {dtype}"
    return replace(fitting[0], tma=capability >= (9, 0))


@cache
def pick_splits(rows: int, row_blocks: int, tiles: int, slots: int) -> int:
    """How many programs share the vocabulary, so that whole waves of programs take the least time."""
    most = max(1, min(tiles // FEWEST_TILES, PARTS_BYTES // (NUM_PARTS * 4 * rows)))

    def cost(splits: int) -> float:
        return -(-row_blocks * splits // slots) * (tiles / splits + START_TILES)

    return min(range(1, most + 1), key=cost)
