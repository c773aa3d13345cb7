"""What enters the first layer that learns, kept from one epoch to the next while the layers below it rest.

Hidden states behind layers that rest depend on a position's own document, or the piece of it that fits in a row, and on
nothing else in the batch: they are kept by the position's stable id, and read back once all of a micro-batch are there.
The first ids are kept on the device, the rest in a file. What is read equals what would be computed but for rounding,
as a product may round by the place of a row in it. An embedding that goes on learning as a head would change all of it:
a tied one is refused.
Shapes: B rows of T positions, N = B T, D width, P positions of the data set.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from cggr_ray.data.batch import MicroBatch
from cggr_ray.transfer import to_device

GIB = 1 << 30


@dataclass(frozen=True)
class ActivationCache:
    """How much of what enters the first layer that learns is kept: GiB on the device, then GiB in a file."""

    IS_PART: ClassVar[bool] = True

    memory_gib: float = 8.0
    disk_gib: float = 0.0

    def __post_init__(self) -> None:
        if self.memory_gib < 0 or self.disk_gib < 0 or self.memory_gib + self.disk_gib == 0:
            raise ValueError(f"{self}; accepted: 0 or more GiB of each, and some of one")

    def shares(self, positions: int, row: int) -> tuple[int, int]:
        """How many positions of `row` bytes the device holds, and how many the file.

        Raises:
            ValueError: together they do not hold all, without which hardly a micro-batch would be there whole.
        """
        here = min(positions, int(self.memory_gib * GIB) // row)
        if positions - here > int(self.disk_gib * GIB) // row:
            # Rounded up, and a row more, as each of the two may hold a part of one that is of no use.
            enough = math.ceil((positions + 1) * row / GIB * 1000) / 1000
            raise ValueError(
                f"{self} for {positions} positions of {row} bytes; accepted: together at least {enough:g} GiB"
            )
        return here, positions - here


class PrefixCache:
    """The running cache of one model.

    Args:
        positions: P. file: where what the device does not hold is kept; its owner removes it.
    Raises:
        ValueError: it does not hold all positions.
        OSError: the disk has no room for the file.
    """

    def __init__(
        self, config: ActivationCache, positions: int, width: int, dtype: torch.dtype, device: torch.device, file: Path
    ) -> None:
        row = width * dtype.itemsize
        here, there = config.shares(positions, row)
        self._memory = torch.zeros(here, width, dtype=dtype, device=device)
        # Bytes, as files know nothing of bf16.
        self._file: np.memmap | None = None
        if there:
            reserve(file, there * row)
            self._file = np.memmap(file, np.uint8, "r+", shape=(there, row))
        self._here = here
        self._filled = np.zeros(positions, bool)
        self._writing: list[tuple[np.ndarray, Tensor, torch.cuda.Event | None]] = []
        self.hits = self.misses = 0

    def clear(self) -> None:
        """Forgets everything: a layer below has learned, or another layer is now the first that does."""
        self._filled[:] = False
        self._writing = []

    def fetch(self, micro: MicroBatch, compute: Callable[[], Tensor]) -> Tensor:
        """(B, T, D) of a micro-batch, read where all of it is kept, else computed and kept. Padding reads as zeros."""
        self._flush()
        assert micro.ids_BT is not None, "rows that the loader did not read"
        ids = micro.ids_BT.ravel()
        real = ids >= 0
        if self._filled[ids[real]].all():
            self.hits += 1
            return self._read(ids).unflatten(0, micro.tokens_BT.shape)
        self.misses += 1
        hidden = compute()
        self._write(ids, hidden.flatten(0, 1))
        return hidden

    def _read(self, ids_N: np.ndarray) -> Tensor:
        device = self._memory.device
        here = (ids_N >= 0) & (ids_N < self._here)
        out = self._memory.new_zeros(len(ids_N), self._memory.shape[1])
        out.index_copy_(0, moved(here.nonzero()[0], device), self._memory.index_select(0, moved(ids_N[here], device)))
        if self._file is not None and (there := ids_N >= self._here).any():
            rows = torch.from_numpy(self._file[ids_N[there] - self._here]).view(self._memory.dtype)
            out.index_copy_(0, moved(there.nonzero()[0], device), to_device(rows, device))
        return out

    def _write(self, ids_N: np.ndarray, hidden_ND: Tensor) -> None:
        device = self._memory.device
        new = (ids_N >= 0) & ~self._filled[ids_N]
        here = new & (ids_N < self._here)
        self._memory.index_copy_(
            0, moved(ids_N[here], device), hidden_ND.index_select(0, moved(here.nonzero()[0], device))
        )
        self._filled[ids_N[here]] = True
        if self._file is not None and (there := new & (ids_N >= self._here)).any():
            rows = hidden_ND.index_select(0, moved(there.nonzero()[0], device)).to("cpu", non_blocking=True)
            event = None
            if device.type == "cuda":
                event = torch.cuda.Event()
                event.record()
            self._writing.append((ids_N[there], rows, event))

    def _flush(self) -> None:
        """Writes what has arrived on the host, and waits for nothing."""
        waiting: list[tuple[np.ndarray, Tensor, torch.cuda.Event | None]] = []
        for ids, rows, event in self._writing:
            if event is not None and not event.query():
                waiting.append((ids, rows, event))
                continue
            assert self._file is not None
            self._file[ids - self._here] = rows.view(torch.uint8).numpy()
            self._filled[ids] = True
        self._writing = waiting


def reserve(path: Path, size: int) -> None:
    """Makes a file of so many bytes, all of which the disk has: a mapped file that meets a full one is a SIGBUS."""
    with path.open("wb") as file:
        file.truncate(size)
        # macOS has none.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


def moved(index: np.ndarray, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(index.astype(np.int64)), device)
