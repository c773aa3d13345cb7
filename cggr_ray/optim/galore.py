"""GaLore: a hidden matrix learns in a few directions of its own, which change now and then (arXiv:2403.03507).

With G the gradient, its shorter side first (m x k), and P (m x r) an orthonormal basis of its strongest directions:

    R = P^T G,   D_R = the inner rule's direction for R,   D = P D_R

so that the inner rule keeps state of r x k values instead of m x k. Every `refresh_every` steps the basis follows the
gradient by subspace iteration from where it is, P' = orth(G G^T P), as GaLore 2 replaces the decomposition by a
randomised one (arXiv:2504.20437); averages move along, R' = P'^T P R. The matrices of a stack take turns, so that
no step pays for all of them. Orthogonalising R is orthogonalising P R: P orth(R) = orth(P R).

Differs from both: no SVD, so nothing that fails on a matrix of low rank; no oversampling, a basis that was good a
refresh ago needs none; averages are rotated; the update is scaled by the inner rule (`low_rank_scale`).
Shapes: N matrices of one shape (M, K), n of them at a time, m = min(M, K), k = max(M, K), r the rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.rule import Rule
from cggr_ray.optim.state_formats import Float32, Int8Blockwise, State, average_of

# Subspace iterations of a refresh, and of the first, which begins with a random basis.
ITERATIONS, FIRST_ITERATIONS = 1, 2
BASIS_SEED = 20403


@dataclass(frozen=True)
class GaLore(Rule):
    """Low-rank projection around an inner rule, for hidden matrices.

    `rank` is cut to `largest_fraction` of a matrix' shorter side, beyond which the basis costs more than it saves; a
    side shorter than `smallest` is not projected at all. `alpha`: factor on the update. `basis`: how P is kept.
    """

    IS_PART: ClassVar[bool] = True
    KIND: ClassVar[str] = "galore"

    rule: Muon | AdamW = field(default_factory=Muon)
    rank: int = 256
    refresh_every: int = 200
    alpha: float = 1.0
    largest_fraction: float = 0.25
    smallest: int = 64
    basis: Float32 | Int8Blockwise = field(default_factory=Float32)

    def __post_init__(self) -> None:
        if self.rank < 1 or self.refresh_every < 1 or self.smallest < 1:
            raise ValueError(f"rank = {self.rank}, refresh_every = {self.refresh_every}, smallest = {self.smallest}; "
                             "accepted: at least 1")  # fmt: skip
        if not (0 < self.largest_fraction <= 1 and self.alpha > 0):
            raise ValueError(f"largest_fraction = {self.largest_fraction}, alpha = {self.alpha}; "
                             "accepted: a part in (0, 1], a positive factor")  # fmt: skip

    @property
    def lr(self) -> float:  # type: ignore[override]
        return self.rule.lr

    @property
    def weight_decay(self) -> float:  # type: ignore[override]
        return self.rule.weight_decay

    @property
    def cautious(self) -> bool:  # type: ignore[override]
        return self.rule.cautious

    def rank_of(self, rows: int, columns: int) -> int | None:
        """The rank of a matrix' projection, None where it is not projected."""
        smaller = min(rows, columns)
        return None if smaller < self.smallest else max(1, min(self.rank, int(self.largest_fraction * smaller)))

    def shape_scale(self, rows: int, columns: int) -> float:
        rank, scale = self.rank_of(rows, columns), self.rule.shape_scale(rows, columns)
        return scale if rank is None else scale * self.alpha * self.rule.low_rank_scale(min(rows, columns), rank)

    def init_state(self, weights: Tensor) -> State:
        number, rows, columns = weights.shape
        rank, smaller = self.rank_of(rows, columns), min(rows, columns)
        if rank is None:
            return self.rule.init_state(weights)
        state = self.rule.init_state(weights.new_zeros(1).expand(number, rank, max(rows, columns)))
        generator = torch.Generator().manual_seed(BASIS_SEED)
        start = torch.linalg.qr(torch.randn(smaller, rank, generator=generator)).Q.mT.to(weights.device)
        every, side = start.expand(number, -1, -1), "left" if rows <= columns else "right"
        basis = self.basis.zeros(side, every, "linear")
        self.basis.write(basis, side, every, "linear", start.new_ones(()))
        return state | basis

    def projects(self, state: State) -> bool:
        return side_of(state) is not None

    def due(self, number: int, step: int) -> range:
        """All at the first step; then each once in `refresh_every` steps, evenly spread."""
        if step == 0:
            return range(number)
        now = step % self.refresh_every
        return range(*(-(-at * number // self.refresh_every) for at in (now, now + 1)))

    def refresh(self, grad_n: Tensor, state: State, which: slice, first: bool) -> None:
        """Also in a step that is not finite for the gradient of another matrix, which says nothing against this one."""
        side = side_of(state)
        assert side is not None, "a gradient that is not projected"
        some = average_of(state, side, which)
        old = self.basis.read(some, side, "linear").clone()
        grad_nmk = shorter_first(grad_n, side).float()
        peak_n11 = grad_nmk.abs().amax((-2, -1), keepdim=True)
        # Neither zero nor anywhere not finite: else it says nothing of directions.
        usable_n11 = (peak_n11 > 0) & peak_n11.isfinite()
        unit_nmk = torch.where(usable_n11, grad_nmk / peak_n11, 0.0)
        new = follow(old, unit_nmk, FIRST_ITERATIONS if first else ITERATIONS)
        self.basis.write(some, side, new, "linear", usable_n11)
        # Turned by nothing is still rounded, so that a gradient that is not used must be told.
        self.rule.rotate(state, which, self.basis.read(some, side, "linear") @ old.mT, usable_n11)

    def project(self, grad_n: Tensor, state: State, which: slice = slice(None)) -> Tensor:
        """R (n, r, k) in the gradient's dtype; the gradient itself where it is not projected."""
        side = side_of(state)
        if side is None:
            return grad_n
        some = average_of(state, side, which)
        return torch.bmm(self.basis.read(some, side, "linear").to(grad_n.dtype), shorter_first(grad_n, side))

    def direction(self, grad: Tensor, state: State, finite: Tensor) -> Tensor:
        """D in full size, float32, of projected gradients R. The last product is in bf16 on a GPU."""
        side, found = side_of(state), self.rule.direction(grad, state, finite)
        if side is None:
            return found
        work = torch.bfloat16 if found.is_cuda else torch.float32
        whole = torch.bmm(self.basis.read(state, side, "linear").mT.to(work), found.to(work))
        return shorter_first(whole, side).float()


def follow(basis_nRm: Tensor, grad_nmk: Tensor, iterations: int) -> Tensor:
    """An orthonormal basis (n, r, m) of the strongest left directions of each gradient, from one that is near.

    A gradient of low rank gets directions to fill up. Products are in float32: the directions of small singular values
    would drown in the rounding of bf16.
    """
    found = basis_nRm.mT
    for _ in range(iterations):
        found = torch.linalg.qr(grad_nmk @ (grad_nmk.mT @ found)).Q
    return found.mT


def shorter_first(x_nMK: Tensor, side: str) -> Tensor:
    """Matrices that are projected from the right, transposed; and back."""
    return x_nMK if side == "left" else x_nMK.mT


def side_of(state: State) -> str | None:
    """The side from which a stack is projected; None where it is not."""
    return next((side for side in ("left", "right") if average_of(state, side)), None)
