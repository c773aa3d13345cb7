"""What memory that runs out looks like, and what can be done about it in the middle of a step.

Only what an allocator says of itself counts: torch's error on a GPU, Python's and numpy's, and the texts of those that
have no type of their own: torch's CPU allocator, and CUDA and cuBLAS where they allocate beside torch. Any other error
is somebody's mistake and is left alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

FAILURES = (torch.OutOfMemoryError, MemoryError, RuntimeError)
T = TypeVar("T")
TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


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


def with_fewer(rows: int, attempt: Callable[[int], T], say: Callable[[str], None]) -> tuple[int, T]:
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


def release_memory() -> None:
    """Gives back what nobody holds any more. Not before the error is gone: its frames hold what was computed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
