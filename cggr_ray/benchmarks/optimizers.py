"""The optimizers that the benchmarks compare, by provider name."""

from __future__ import annotations

from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.optimizer import Optimizer
from cggr_ray.optim.state_formats import BFloat16, Int8Blockwise

EIGHT_BITS = Int8Blockwise()

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_fp32": Optimizer(AdamW(), AdamW()),
    "muon_fp32": Optimizer(Muon(), AdamW()),
    "muon_bf16": Optimizer(Muon(state=BFloat16()), AdamW(state=BFloat16())),
    "muon_int8": Optimizer(Muon(state=EIGHT_BITS), AdamW(state=EIGHT_BITS)),
    "galore": Optimizer(GaLore(Muon()), AdamW()),
    "e3_full": Optimizer(GaLore(Muon(state=EIGHT_BITS), basis=EIGHT_BITS), AdamW(state=EIGHT_BITS), project_early=True),
}
