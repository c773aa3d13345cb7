"""What the device says about itself: memory from the allocator, utilisation from NVML. Empty without a GPU."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from cggr_ray.schema import GPU_MEMORY, GPU_MEMORY_PEAK, GPU_UTILIZATION

MIB = 1 << 20


def device_row(device: torch.device) -> dict[str, float]:
    """Memory and utilisation for a row."""
    if device.type != "cuda":
        return {}
    return {
        GPU_MEMORY: torch.cuda.memory_allocated(device) / MIB,
        GPU_MEMORY_PEAK: peak_bytes(device) / MIB,
        GPU_UTILIZATION: float(torch.cuda.utilization(device)),
    }


def peak_bytes(device: torch.device) -> int:
    """The most that was allocated since the last reset, and the pools of CUDA graphs in full; 0 without a GPU.

    What a replay works in was allocated once, when the graph was captured, and counts as free ever since. Never more
    than the allocator has held.
    """
    if device.type != "cuda":
        return 0
    pools = (segment for segment in torch.cuda.memory_snapshot() if segment["segment_pool_id"] != (0, 0))
    index = torch.cuda.current_device() if device.index is None else device.index
    held = sum(segment["total_size"] - segment["allocated_size"] for segment in pools if segment["device"] == index)
    return min(torch.cuda.max_memory_allocated(device) + held, torch.cuda.max_memory_reserved(device))


def device_info(device: torch.device) -> dict[str, str | float]:
    """Name and size of the device, for run.json."""
    if device.type != "cuda":
        return {"type": "cpu", "name": cpu_name(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {"type": "cuda", "name": properties.name, "memory_mib": properties.total_memory / MIB}


def cpu_name(file: Path = Path("/proc/cpuinfo")) -> str:
    """The model of the processor where Linux names it, else its kind."""
    lines = file.read_text().splitlines() if file.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()
