"""Muon: the momentum of a hidden matrix, orthogonalised (Jordan et al. 2024; scale of arXiv:2502.16982, eq. 4).

    M <- beta M + (1 - beta) G,   U = (1 - beta) G + beta M (Nesterov) or M,   D = orth(U)

`orth` is nearly the polar factor (`polar`). With M kept in bf16 or in 8 bits (arXiv:2509.23106) a step reads it, forms
the new M and U in float32, and stores M again; D is made of the fresh values.
NorMuon (arXiv:2510.05491) divides each row of D by the root of a moving average of its mean square, and restores the
norm of D. Shapes: G_NMK is a stack of N matrices of one shape, so that every product is one batched GEMM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cggr_ray.codec import nearest
from cggr_ray.optim.polar import orthogonalise
from cggr_ray.optim.rule import LARGEST_RATE, Rule
from cggr_ray.optim.state_formats import BFloat16, Float32, Int8Blockwise, State, turn_rows
from cggr_ray.workers import ALONE, Workers

# Steps without gradients after which a momentum says nothing of the next.
LONGEST_REST = 20
SHAPE_SCALES: dict[str, Callable[[int, int], float]] = {
    "keller": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "moonlight": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
    "spectral": lambda rows, columns: (rows / columns) ** 0.5,
    "none": lambda rows, columns: 1.0,
}


@dataclass(frozen=True)
class Muon(Rule):
    """The momentum of every hidden matrix, orthogonalised.

    `scale` multiplies the learning rate by the matrix' shape M x K: `keller` sqrt(max(1, M/K)); `moonlight`
    0.2 sqrt(max(M, K)), whose update has the RMS of AdamW's, so AdamW learning rates carry over; `spectral` sqrt(M/K);
    `none` 1: one rate for every shape, near which all singular values of an update lie. The shape is that of the stored
    weight: GPT-2 stores inputs first, so that M and K change places there.
    `state`: how M is kept between steps. `row_beta`: the average of NorMuon, None for plain Muon. `cautious`: weight
    decay only where it has the sign of the update (arXiv:2510.12402).
    """

    IS_PART: ClassVar[bool] = True

    lr: float = 3e-3
    momentum: float = 0.95
    nesterov: bool = True
    orthogonalise: Literal["newton_schulz", "polar_express"] = "polar_express"
    scale: Literal["keller", "moonlight", "spectral", "none"] = "moonlight"
    weight_decay: float = 0.0
    cautious: bool = False
    state: Float32 | BFloat16 | Int8Blockwise = field(default_factory=Float32)
    row_beta: float | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.lr <= LARGEST_RATE and 0 <= self.weight_decay <= LARGEST_RATE and 0 <= self.momentum < 1):
            raise ValueError(f"{self}; accepted: lr and weight_decay from 0 to {LARGEST_RATE:.2g}, momentum in [0, 1)")
        if self.scale not in SHAPE_SCALES:
            raise ValueError(f"scale = {self.scale!r}; {nearest(self.scale, SHAPE_SCALES)}")
        if self.row_beta is not None and not 0 <= self.row_beta < 1:
            raise ValueError(f"row_beta = {self.row_beta}; accepted: none, or in [0, 1)")
        if self.momentum > (longest := self.state.longest("linear")):
            raise ValueError(f"momentum = {self.momentum} with {self.state.NAME} state; accepted: at most {longest}, a "
                             "longer average would stand still between two values")  # fmt: skip

    def init_state(self, weights: Tensor) -> State:
        state = self.state.zeros("momentum", weights, "linear")
        if self.row_beta is not None:
            state["rows"] = torch.zeros_like(weights[..., :1], dtype=torch.float32)
        return state

    def direction(self, grad: Tensor, state: State, finite: Tensor, workers: Workers = ALONE) -> Tensor:
        """Updates the momentum in place and returns D, float32. A step that is not finite leaves the momentum as is."""
        momentum = self.state.read(state, "momentum", "linear").lerp(grad, 1 - self.momentum)
        self.state.write(state, "momentum", momentum, "linear", finite)
        update = grad.lerp(momentum, self.momentum) if self.nesterov else momentum
        found = orthogonalise(update, self.orthogonalise, workers)
        return found if self.row_beta is None else self._even_rows(found, state["rows"], self.row_beta, finite)

    def _even_rows(self, found_NMK: Tensor, rows_NM1: Tensor, beta: float, finite: Tensor) -> Tensor:
        """NorMuon: rows of equal mean square over time, and the norm that the whole had before."""
        rows_NM1.lerp_(found_NMK.square().mean(-1, keepdim=True), (1 - beta) * finite)
        even = found_NMK * torch.where(rows_NM1 > 0, rows_NM1.rsqrt(), 0.0)
        before, after = (x.square().sum((-2, -1), keepdim=True) for x in (found_NMK, even))
        return even * torch.where(after > 0, (before / after).sqrt(), 0.0)

    def without_momentum(self, grad: Tensor, state: State) -> Tensor:
        return orthogonalise(grad, self.orthogonalise)

    def wake(self, state: State, steps: int) -> None:
        """An old momentum is forgotten: orthogonalised, it would be as long as a fresh one."""
        if steps > LONGEST_REST:
            momentum = self.state.read(state, "momentum", "linear")
            self.state.write(state, "momentum", torch.zeros_like(momentum), "linear", momentum.new_ones(()))

    def rotate(self, state: State, which: slice, turn_nRR: Tensor, keep_n11: Tensor) -> None:
        """Writes the momenta of some matrices in another basis of their rows; where `keep_n11` is 0 no bit changes."""
        turn_rows(self.state, state, "momentum", "linear", which, turn_nRR, keep_n11)
        if self.row_beta is not None:
            # As if rows did not covary.
            turn_rows(Float32(), state, "rows", "squares", which, turn_nRR.square(), keep_n11)

    def low_rank_scale(self, smaller: int, rank: int) -> float:
        """Restores the RMS of a full-rank update, whose `smaller` singular values are all near 1."""
        return (smaller / rank) ** 0.5

    def shape_scale(self, rows: int, columns: int) -> float:
        return SHAPE_SCALES[self.scale](rows, columns)
