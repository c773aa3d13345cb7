"""cggr-ray doctor: what is installed, what the device is, and what would go wrong."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from cggr_ray.environment import PACKAGES, version
from cggr_ray.telemetry.console import terminal

# Oldest versions without known holes in what is read from disk.
FLOORS = {"torch": (2, 10), "transformers": (5, 3)}


def doctor() -> None:
    """Versions, device and disk; exit code 1 where something would go wrong."""
    console = terminal()
    problems = []
    for name in PACKAGES:
        found, floor = version(name), FLOORS.get(name)
        console.print(f"{name:14} {found or 'missing'}", highlight=False)
        if not found and (name != "triton" or sys.platform == "linux"):
            problems.append(f"{name} is missing: pip install -c constraints.txt -e .")
        elif floor and tuple(int(part) for part in found.split(".")[:2]) < floor:
            problems.append(f"{name} {found} is older than {'.'.join(map(str, floor))}: known security holes")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        console.print(f"{torch.cuda.device_count()} GPU, {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        console.print("no GPU: races run small, on the CPU, and nothing is compiled")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    console.print(f"{free:.0f} GiB free here")
    if free < 5:
        problems.append(f"{free:.1f} GiB free: a race of a 100M model writes a few GiB")
    for problem in problems:
        console.print(f"problem: {problem}")
    sys.exit(1 if problems else 0)
