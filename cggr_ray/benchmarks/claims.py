"""The memory table that the E3 suite publishes for "a 3B model", beside what the tensors of such a model hold.

`COUNTED` has the shapes of a Llama of 3.2B parameters. Its weights, masters, gradients and optimizer state are made on
torch's meta device, as training makes them, and their bytes are added up: only their values are missing. The suite says
neither of which shape its activations are nor of how many rows, so that those are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from rich.table import Table

from cggr_ray.benchmarks.accounting import Training
from cggr_ray.benchmarks.optimizers import OPTIMIZERS
from cggr_ray.benchmarks.rows import BenchRow, Shape
from cggr_ray.benchmarks.workload import NOW

COUNTED = Shape("llama-3.2-3b", 1, 16)
GB = 1e9
# The suite's columns by our provider, and its figures in GB. What it leaves out is not in them.
COLUMNS = {"muon_fp32": "Baseline", "muon_int8": "8-bit Muon", "galore": "GaLore 2", "e3_full": "E3 Full"}
CLAIMED = {
    "weights_bytes": ("6", "6", "6", "6"),
    "optimizer_bytes": ("12", "1.7", "4-6", "0.6"),
    "activation_bytes": ("8", "8", "8", "6"),
    "all of these": ("26", "15.7", "18-20", "12.6"),
}
PARTS = ("weights_bytes", "master_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes")
NOTHING = "-"


def counted(name: str, shape: Shape = COUNTED) -> dict[str, int]:
    """Bytes that training by one of `OPTIMIZERS` holds in bf16 between backward and update, apart from activations."""
    training = Training(shape, OPTIMIZERS[name], torch.device("meta"), torch.bfloat16)
    # Of a step that refreshes no projection, which would read values.
    training.optimizer.begin(NOW)
    torch.stack([p.sum() for p in training.parameters]).sum().backward()
    return training.held()


def table(shape: Shape, rows: Iterable[BenchRow]) -> Table:
    """claimed / counted / measured in GB of every part, `rows` being those of `accounting` for `shape`. The last line
    adds up what is there of each."""
    measured = {(row.provider, row.unit): row.value for row in rows}
    counts = {name: counted(name) for name in COLUMNS}
    title = f"GB: claimed for 3B / counted of {COUNTED.model} / measured of {shape.model}, a row of {shape.positions}"
    found = Table("", *COLUMNS.values(), title=title)
    for label, parts in {**{part: (part,) for part in PARTS}, "all of these": PARTS}.items():
        cells = []
        for name, claimed in zip(COLUMNS, CLAIMED.get(label, [NOTHING] * len(COLUMNS)), strict=True):
            own = [counts[name].get(part) for part in parts]
            cells.append(f"{claimed} / {_gb(own)} / {_gb(measured.get((name, part)) for part in parts)}")
        found.add_row(label.removesuffix("_bytes"), *cells)
    return found


def _gb(values: Iterable[float | None]) -> str:
    there = [value for value in values if value is not None]
    return f"{sum(there) / GB:.2f}" if there else NOTHING
