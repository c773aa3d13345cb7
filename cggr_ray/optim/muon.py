"""Muon: the momentum of a hidden matrix, orthogonalised (Jordan et al. 2024; scale of arXiv:2502.16982, eq. 4).

    M <- beta M + (1 - beta) G,   U = (1 - beta) G + beta M (Nesterov) or M,   D = orth(U)

`orth` is the polar factor up to a few percent, by five odd quintic polynomials: Newton-Schulz with one set of
coefficients, or Polar Express (arXiv:2505.16932), which lands closer to 1. Differs from both: in fp16 where they are in
bf16, and with completed squares. With M kept in 8 bits (arXiv:2509.23106) a step reads it, forms the new M and U in
float32, and stores M again; D is made of the fresh values.
NorMuon (arXiv:2510.05491) divides each row of D by the root of a moving average of its mean square, and restores the
norm of D. Shapes: G_NMK is a stack of N matrices of one shape, so that every product is one batched GEMM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cggr_ray.optim.rule import Rule
from cggr_ray.optim.state_formats import LONGEST, Float32, Int8Blockwise, State, turn_rows

# Steps without gradients after which a momentum says nothing of the next.
LONGEST_REST = 20
# Values of the matrices that are multiplied at once: more would be no faster.
LARGEST_PRODUCT = 2**26


def completed(coefficients: tuple[tuple[float, float, float], ...], margin: float) -> tuple[float, list[float]]:
    """What makes squares of quintic polynomials a X + b (X X^T) X + c (X X^T)^2 X, c > 0, one after another.

    With Z = f X, f > 0, and S = Z Z^T + e I, all of a polynomial but for its scale is (S^2 + d I) Z, where
    e = b f^2 / 2c and d = f^4 (a / c - b^2 / 4c^2). The f of the next is f^5 / c, and 1 at the end.

    Returns:
        f of the first, for singular values below 1 by the margin, and e and d of each.
    """
    factor, shifts = 1.0, list[float]()
    for a, b, c in reversed(coefficients):
        factor = (c * factor) ** 0.2
        shifts = [b * factor**2 / (2 * c), factor**4 * (a / c - (b / c) ** 2 / 4), *shifts]
    return factor / margin, shifts


NEWTON_SCHULZ = completed(((3.4445, -4.7750, 2.0315),) * 5, margin=1.0)
POLAR_EXPRESS = completed(
    (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    # Against rounding.
    margin=1.02,
)


def orthogonalise(matrices_NMK: Tensor, method: Literal["newton_schulz", "polar_express"]) -> Tensor:
    """The nearest semi-orthogonal matrix of each of N matrices, approximately; zero stays zero.

    In float32, but on a GPU: there from bf16, which has the range of gradients, and in fp16, which is eight times as
    exact for values that are no longer than 1. Returns float32.
    """
    work = matrices_NMK.to(torch.bfloat16 if matrices_NMK.is_cuda else torch.float32)
    tall = work.shape[-2] > work.shape[-1]
    x = work.mT if tall else work
    factor, shifts = POLAR_EXPRESS if method == "polar_express" else NEWTON_SCHULZ
    length_N11 = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    start = x * (factor / length_N11.clamp_min(1e-7))
    x = polynomials(start.to(torch.float16) if x.is_cuda else start, shifts)
    return (x.mT if tall else x).float()


@torch.library.custom_op("cggr_ray::polynomials", mutates_args=())
def polynomials(z_Nmk: Tensor, shifts: Sequence[float]) -> Tensor:
    """Z <- (S^2 + d I) Z with S = Z Z^T + e I, for each e, d.

    Products alone: `baddbmm` would copy its summand, and read it again. One operator to a compiler, which would write
    all of a matrix to add to its diagonal; some matrices at a time, so that little is there beside Z and the result.
    """
    *firsts, last = zip(shifts[::2], shifts[1::2], strict=True)
    at_once = max(1, LARGEST_PRODUCT // z_Nmk[0].numel())
    found_Nmk = torch.empty_like(z_Nmk, memory_format=torch.contiguous_format)
    for z, found in zip(z_Nmk.split(at_once), found_Nmk.split(at_once), strict=True):
        for first in firsts:
            z = torch.bmm(_of_squares(z, *first), z)
        torch.bmm(_of_squares(z, *last), z, out=found)
    return found_Nmk


def _of_squares(z_nmk: Tensor, e: float, d: float) -> Tensor:
    s = torch.bmm(z_nmk, z_nmk.mT)
    s.diagonal(dim1=-2, dim2=-1).add_(e)
    found = torch.bmm(s, s)
    found.diagonal(dim1=-2, dim2=-1).add_(d)
    return found


@polynomials.register_fake
def _(z_Nmk: Tensor, shifts: Sequence[float]) -> Tensor:
    return z_Nmk.new_empty(z_Nmk.shape)


@dataclass(frozen=True)
class Muon(Rule):
    """The momentum of every hidden matrix, orthogonalised.

    `scale` multiplies the learning rate by the matrix' shape M x K: `keller` sqrt(max(1, M/K)); `moonlight`
    0.2 sqrt(max(M, K)), whose update has the RMS of AdamW's, so AdamW learning rates carry over; `spectral` sqrt(M/K).
    The shape is that of the stored weight: GPT-2 stores inputs first, so that M and K change places there.
    `state`: how M is kept between steps. `row_beta`: the average of NorMuon, None for plain Muon. `cautious`: weight
    decay only where it has the sign of the update (arXiv:2510.12402).
    """

    IS_PART: ClassVar[bool] = True

    lr: float = 3e-3
    momentum: float = 0.95
    nesterov: bool = True
    orthogonalise: Literal["newton_schulz", "polar_express"] = "polar_express"
    scale: Literal["keller", "moonlight", "spectral"] = "moonlight"
    weight_decay: float = 0.0
    cautious: bool = False
    state: Float32 | Int8Blockwise = field(default_factory=Float32)
    row_beta: float | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.lr < inf and 0 <= self.weight_decay < inf and 0 <= self.momentum < 1):
            raise ValueError(f"{self}; accepted: finite lr >= 0 and weight_decay >= 0, momentum in [0, 1)")
        if self.row_beta is not None and not 0 <= self.row_beta < 1:
            raise ValueError(f"row_beta = {self.row_beta}; accepted: none, or in [0, 1)")
        if isinstance(self.state, Int8Blockwise) and self.momentum > LONGEST["linear"]:
            raise ValueError(f"momentum = {self.momentum} with 8-bit state; accepted: at most {LONGEST['linear']}, a "
                             "longer average would stand still between two codes")  # fmt: skip

    def init_state(self, weights: Tensor) -> State:
        state = self.state.zeros("momentum", weights, "linear")
        if self.row_beta is not None:
            state["rows"] = torch.zeros_like(weights[..., :1], dtype=torch.float32)
        return state

    def direction(self, grad: Tensor, state: State, finite: Tensor) -> Tensor:
        """Updates the momentum in place and returns D, float32. A step that is not finite leaves the momentum as is."""
        momentum = self.state.read(state, "momentum", "linear").lerp(grad, 1 - self.momentum)
        self.state.write(state, "momentum", momentum, "linear", finite)
        update = grad.lerp(momentum, self.momentum) if self.nesterov else momentum
        found = orthogonalise(update, self.orthogonalise)
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
        if self.scale == "keller":
            return max(1.0, rows / columns) ** 0.5
        if self.scale == "moonlight":
            return 0.2 * max(rows, columns) ** 0.5
        return (rows / columns) ** 0.5
