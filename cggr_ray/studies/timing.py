"""Milliseconds of calls in interleaved rounds: medians and quartiles, by CUDA events on a GPU.

A memory fill goes before every call: it leaves the L2 cache cold for everybody, and takes long enough for the host to
queue the call behind it, so that what launching costs the host is no part of a kernel's time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

WARM_UP_ROUNDS = {"cuda": 20, "cpu": 2}
FLUSH_BYTES = 1 << 30
MIB = 1 << 20

Key = TypeVar("Key")
# Does what is not timed, and returns what is.
Prepare = Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class Quartiles:
    """Milliseconds of a call."""

    low: float
    median: float
    high: float


def interleaved(prepared: Mapping[Key, Prepare], rounds: int, device: torch.device) -> dict[Key, Quartiles]:
    """Times each call once a round, so that a machine that drifts favours nobody; warm-up rounds are left out."""
    flush = fill(device) if device.type == "cuda" else None
    taken: dict[Key, list[float]] = {key: [] for key in prepared}
    warm_up = WARM_UP_ROUNDS[device.type]
    for number in range(warm_up + rounds):
        for key, prepare in prepared.items():
            call = prepare()
            milliseconds = _on_host(call) if flush is None else on_gpu(call, flush)
            if number >= warm_up:
                taken[key].append(milliseconds)
    return {key: Quartiles(*(float(q) for q in np.quantile(ms, (0.25, 0.5, 0.75)))) for key, ms in taken.items()}


def settled(device: torch.device) -> float:
    """Seconds on the host's clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB that a call allocates at its peak above what was there before; None where there is no GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def _on_host(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def fill(device: torch.device) -> Tensor:
    """What `on_gpu` writes to before a call."""
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)


def on_gpu(call: Callable[[], object], flush: Tensor) -> float:
    """Milliseconds that the device is busy with a call, or waits for its parts."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
