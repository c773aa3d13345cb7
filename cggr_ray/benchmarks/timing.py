"""Interleaved timing: every provider once a round, so that a machine that drifts favours nobody; warm-up left out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cggr_ray.studies.timing import fill, on_gpu
from cggr_ray.telemetry.gpu import MIB

log = logging.getLogger(__name__)
WARM_UP_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one provider, and MiB that a call allocates at its peak above what was there before it."""

    p20: float
    p50: float
    p80: float
    peak_mib: float


def interleaved(
    providers: Mapping[str, Callable[[], None]], rounds: int, device: torch.device, kernels: bool = False
) -> dict[str, Timing]:
    """Times each provider `rounds` times, in turn. Each call is bounded by device synchronisation on both sides.

    Args:
        kernels: the providers are a kernel or two, of whose time what the host takes to launch them would be a part:
            timed by the GPU's events instead, behind a memory fill (`studies.timing`).
    """
    flush = fill(device) if kernels and device.type == "cuda" else None
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    peaks = dict.fromkeys(providers, 0.0)
    for number in range(WARM_UP_ROUNDS + rounds):
        for name, call in providers.items():
            used, peak = _once(call, device, flush)
            if number == 0:
                log.info("%s: first call %.1f s", name, used)
            if number >= WARM_UP_ROUNDS:
                seconds[name].append(used)
                peaks[name] = max(peaks[name], peak)
    quantiles = {name: [float(q) * 1e3 for q in np.quantile(taken, (0.2, 0.5, 0.8))] for name, taken in seconds.items()}
    return {name: Timing(q[0], q[1], q[2], peaks[name]) for name, q in quantiles.items()}


def _once(call: Callable[[], None], device: torch.device, flush: Tensor | None) -> tuple[float, float]:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, 0.0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    if flush is None:
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        used = time.perf_counter() - start
    else:
        used = on_gpu(call, flush) / 1e3
    return used, (torch.cuda.max_memory_allocated(device) - before) / MIB
