"""What the device says about itself: memory from the allocator, utilisation from NVML. Empty without a GPU."""

from __future__ import annotations

import platform

import torch

from cggr_ray.schema import GPU_MEMORY, GPU_MEMORY_PEAK, GPU_UTILIZATION

MIB = 1 << 20


def device_row(device: torch.device) -> dict[str, float]:
    """Memory and utilisation for a row."""
    if device.type != "cuda":
        return {}
    return {
        GPU_MEMORY: torch.cuda.memory_allocated(device) / MIB,
        GPU_MEMORY_PEAK: torch.cuda.max_memory_allocated(device) / MIB,
        GPU_UTILIZATION: float(torch.cuda.utilization(device)),
    }


def device_info(device: torch.device) -> dict[str, str | float]:
    """Name and size of the device, for run.json."""
    if device.type != "cuda":
        return {"type": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {"type": "cuda", "name": properties.name, "memory_mib": properties.total_memory / MIB}
