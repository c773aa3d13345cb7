"""The device that a word stands for."""

from __future__ import annotations

import torch


def pick_device(wanted: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda', and no GPU is visible; accepted: cpu, auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
