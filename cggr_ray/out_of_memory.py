"""What memory that runs out looks like, and what can be done about it in the middle of a step.

Only what an allocator says of itself counts: torch's error on a GPU, Python's and numpy's, and the texts of those that
have no type of their own: torch's CPU allocator, and CUDA and cuBLAS where they allocate beside torch. Any other error
is somebody's mistake and is left alone.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from cggr_ray.saying import Say

T = TypeVar("T")

FAILURES = (torch.OutOfMemoryError, MemoryError, RuntimeError)
TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
# How much, as torch on a GPU, torch on a CPU and numpy say it.
SIZES = {
    "asked": re.compile(r"(?:[Tt]ried|[Uu]nable) to allocate ([\d.]+) (bytes|[KMGT]iB)"),
    "held": re.compile(r"([\d.]+) (bytes|[KMGT]iB) is allocated by PyTorch"),
}
MIB_OF = {"bytes": 2.0**-20, "KiB": 2.0**-10, "MiB": 1.0, "GiB": 2.0**10, "TiB": 2.0**20}


class LostStepError(torch.OutOfMemoryError):
    """Memory ran out where a step cannot be repeated: some weights have been updated already, or some state has."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether one of `FAILURES` says that there is no memory left."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS))


@contextmanager
def no_way_back(where: str) -> Iterator[None]:
    """Inside, memory that runs out ends the run.

    Raises:
        LostStepError: it did.
    """
    try:
        yield
    except FAILURES as error:
        if not is_out_of_memory(error):
            raise
        raise LostStepError(f"out of memory in {where}, which cannot be repeated: {first_line(error)}; the last "
                            "checkpoint stands, smaller micro_rows may help") from error  # fmt: skip


def with_fewer(rows: int, attempt: Callable[[int], T], say: Say) -> tuple[int, T]:
    """(rows, `attempt(rows)`), with half as many for as long as memory runs out; for what changes nothing.

    Raises:
        torch.OutOfMemoryError: one row is too many.
    """
    while True:
        try:
            return rows, attempt(rows)
        except FAILURES as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
            reason = first_line(error)
        release_memory()
        rows //= 2
        say(f"out of memory, {rows} rows at once from here on: {reason}")


def first_line(error: BaseException) -> str:
    """What an allocator says, without its advice; the type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def asked_mib(message: str) -> float | None:
    """MiB that were asked for when memory ran out: what could not be had, on top of what torch held by then. None
    where the message does not say."""
    asked = SIZES["asked"].search(message)
    if asked is None:
        return None
    held = SIZES["held"].search(message)
    return sum(float(found[1]) * MIB_OF[found[2]] for found in (asked, held) if found)


def release_memory() -> None:
    """Gives back what nobody holds any more. Not before the error is gone: its frames hold what was computed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
