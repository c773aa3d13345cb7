"""The device that a word stands for, and how exactly it repeats itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def pick_device(wanted: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        ValueError: another word, or a GPU is asked for and there is none.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {wanted!r}; accepted: auto, cpu, cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda', and no GPU is visible; accepted: cpu, auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def timed_event() -> torch.cuda.Event:
    """A place in the GPU's queue, behind all that is queued so far, that says when it was passed."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def keep_threads() -> None:
    """From here on a product of matrices on the CPU is shared by as many threads as torch has. MKL takes fewer where it
    thinks that better, until somebody says how many: a process in which somebody did would get other bits."""
    torch.set_num_threads(torch.get_num_threads())


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Where wanted, torch takes its deterministic algorithms, and raises where it has none, until the block ends."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    if wanted:
        # What cuBLAS wants to be told; read when a process first multiplies on a GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
