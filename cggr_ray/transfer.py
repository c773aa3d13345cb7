"""Between the host and a device without waiting for either."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Through pinned memory where the device is a GPU, so that the host goes on."""
    pin = device.type == "cuda"
    return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=pin)


def to_host(tensor: Tensor) -> Tensor:
    """A copy, whose values are there once the device has done what is queued."""
    found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return found.copy_(tensor, non_blocking=tensor.is_cuda)
