"""AdamW (arXiv:1711.05101): the rule for embeddings, heads, norms and biases, and for matrices where asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from cggr_ray.optim.rule import LARGEST_RATE, Rule
from cggr_ray.optim.state_formats import BFloat16, Float32, Int8Blockwise, State, turn_rows
from cggr_ray.workers import ALONE, Workers

SMALLEST_EPS = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class AdamW(Rule):
    """m <- b1 m + (1-b1) g, v <- b2 v + (1-b2) g^2, D = (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps), in float32.

    `state`: how m and v are kept between steps, in bf16 m alone; a step uses its fresh values. `cautious`: weight decay
    only where it has the sign of the update (arXiv:2510.12402).
    """

    IS_PART: ClassVar[bool] = True
    KIND: ClassVar[str] = "adamw"
    ELEMENTWISE: ClassVar[bool] = True

    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    cautious: bool = False
    state: Float32 | BFloat16 | Int8Blockwise = field(default_factory=Float32)

    def __post_init__(self) -> None:
        # Without eps, or one that float32 has not, a weight that never had a gradient would become 0 / 0.
        rates = 0 <= self.lr <= LARGEST_RATE and 0 <= self.weight_decay <= LARGEST_RATE
        if not (rates and 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and SMALLEST_EPS <= self.eps < inf):
            raise ValueError(f"{self}; accepted: lr and weight_decay from 0 to {LARGEST_RATE:.2g}, betas in [0, 1), "
                             f"finite eps >= {SMALLEST_EPS:.3g}")  # fmt: skip
        longest = self.state.longest("geometric"), self.state.longest("squares")
        if self.beta1 > longest[0] or self.beta2 > longest[1]:
            raise ValueError(f"beta1 = {self.beta1}, beta2 = {self.beta2} with {self.state.NAME} state; accepted: at "
                             f"most {longest[0]} and {longest[1]}, longer averages would stand still")  # fmt: skip

    def init_state(self, weights: Tensor) -> State:
        count = torch.zeros(len(weights), *[1] * (weights.ndim - 1), dtype=torch.float32, device=weights.device)
        moments = self.state.zeros("first", weights, "geometric") | self.state.zeros("second", weights, "squares")
        return moments | {"count": count}

    def direction(self, grad: Tensor, state: State, finite: Tensor, workers: Workers = ALONE) -> Tensor:
        """Updates both moments in place and returns D, float32. A step that is not finite changes nothing."""
        count = state["count"]
        count.add_(finite)
        first = self.state.read(state, "first", "geometric").lerp(grad, 1 - self.beta1)
        second = self.state.read(state, "second", "squares").lerp(grad.square(), 1 - self.beta2)
        self.state.write(state, "first", first, "geometric", finite)
        self.state.write(state, "second", second, "squares", finite)
        # A count of zero (nothing finite yet) would divide 0 by 0.
        steps = count.clamp_min(1)
        denominator = (second / (1 - self.beta2**steps)).sqrt_().add_(self.eps)
        return (first / (1 - self.beta1**steps)).div_(denominator)

    def without_momentum(self, grad: Tensor, state: State) -> Tensor:
        second, steps = self.state.read(state, "second", "squares"), state["count"].clamp_min(1)
        return grad / ((second / (1 - self.beta2**steps)).sqrt() + self.eps)

    def wake(self, state: State, steps: int) -> None:
        """The first moment decays as if the gradients had been zero; the second, a scale, stays."""
        first = self.state.read(state, "first", "geometric") * self.beta1**steps
        self.state.write(state, "first", first, "geometric", first.new_ones(()))

    def rotate(self, state: State, which: slice, turn_nRR: Tensor, keep_n11: Tensor) -> None:
        """Writes the moments of some matrices in another basis of their rows, the second as if rows did not covary;
        where `keep_n11` is 0 no bit changes."""
        turn_rows(self.state, state, "first", "geometric", which, turn_nRR, keep_n11)
        turn_rows(self.state, state, "second", "squares", which, turn_nRR.square(), keep_n11)

    def low_rank_scale(self, smaller: int, rank: int) -> float:
        """GaLore's alpha (arXiv:2403.03507, algorithm 1)."""
        return 0.25
