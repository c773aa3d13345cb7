"""AdamW (arXiv:1711.05101): the rule for embeddings, heads, norms and biases, and for matrices where asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdamW:
    """m <- b1 m + (1-b1) g, v <- b2 v + (1-b2) g^2, D = (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps), all float32."""

    IS_PART: ClassVar[bool] = True
    KIND: ClassVar[str] = "adamw"

    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        # Without eps a weight that never had a gradient would become 0 / 0.
        if self.lr < 0 or self.weight_decay < 0 or not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0):
            raise ValueError(f"{self}; accepted: lr >= 0, weight_decay >= 0, betas in [0, 1), eps > 0")

    def init_state(self, weights: Tensor) -> dict[str, Tensor]:
        first = torch.zeros_like(weights, dtype=torch.float32)
        count = torch.zeros((), dtype=torch.float32, device=weights.device)
        return {"first": first, "second": torch.zeros_like(first), "count": count}

    def direction(self, grad: Tensor, state: dict[str, Tensor], finite: Tensor) -> Tensor:
        """Updates both moments in place and returns D, float32. A step that is not finite changes nothing."""
        first, second, count = state["first"], state["second"], state["count"]
        count.add_(finite)
        first.lerp_(grad, (1 - self.beta1) * finite)
        second.lerp_(grad.square(), (1 - self.beta2) * finite)
        # A count of zero (nothing finite yet) would divide 0 by 0.
        steps = count.clamp_min(1)
        denominator = (second / (1 - self.beta2**steps)).sqrt_().add_(self.eps)
        return (first / (1 - self.beta1**steps)).div_(denominator)

    def shape_scale(self, rows: int, columns: int) -> float:
        return 1.0
