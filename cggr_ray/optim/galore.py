"""GaLore: a hidden matrix learns in a few directions of its own, which change now and then (arXiv:2403.03507).

With G the gradient, its shorter side first (m x k), and P (m x r) an orthonormal basis of its strongest directions:

    R = P^T G,   D_R = the inner rule's direction for R,   D = P D_R

so that the inner rule keeps state of r x k values instead of m x k. Every `refresh_every` steps the basis follows the
gradient by subspace iteration from where it is, P' = orth(G G^T P), as GaLore 2 replaces the decomposition by a
randomised one (arXiv:2504.20437); averages move along, R' = P'^T P R. The matrices of a stack take turns, so that
no step pays for all of them. Orthogonalising R is orthogonalising P R: P orth(R) = orth(P R).

Differs from both: no SVD, so nothing that fails on a matrix of low rank; no oversampling, a basis that was good a
refresh ago needs none; averages are rotated; the update is scaled by the inner rule (`low_rank_scale`).

P R lacks what lies outside the basis. With `full_rank` = q > 0 this bias is corrected (GUM, arXiv:2510.17802). At the
start of each period of `refresh_every` steps F of the N matrices of a stack are drawn, and all averages begin at zero.
Until the next, with q' = F / N,

    drawn:    C = (G - P P^T G) / q',   D = (1 - P P^T) D_C, D_C Muon's direction for C, scaled as Muon's
    others:   R = P^T G / (1 - q'),     D = P D_R

so that the mean over draws of what enters, C or P R, is G for any P. The mean direction is still not that of Muon:
`orth` knows no scale, so that within a period it does not see the weights either.
Differs from GUM: just F are drawn, and not each by itself with probability q; bases are refreshed in their turns, also
within a period; Nesterov's momentum; the scales of updates; D is taken out of the basis once more. C has nothing there
but rounding, which `orth` in 16 bits makes up to a tenth of D_C.
Shapes: N matrices of one shape (M, K), n of them at a time, F of them drawn, m = min(M, K), k = max(M, K), r the rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import ClassVar

import torch
from torch import Tensor

from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.polar import work_dtype
from cggr_ray.optim.rule import Around
from cggr_ray.optim.state_formats import Float32, Int8Blockwise, State, average_of
from cggr_ray.transfer import to_device
from cggr_ray.workers import ALONE, Workers

# Subspace iterations of a refresh, and of the first, which begins with a random basis.
ITERATIONS, FIRST_ITERATIONS = 1, 2
BASIS_SEED, DRAW_SEED = 20403, 251017802
# Before the inner rule's names of what it keeps for the matrices that are drawn.
FULL = "full_"


@dataclass(frozen=True)
class GaLore(Around):
    """Low-rank projection around an inner rule, for hidden matrices.

    `rank` is cut to `largest_fraction` of a matrix' shorter side, beyond which the basis costs more than it saves; a
    side shorter than `smallest` is not projected at all. `alpha`: factor on the update. `basis`: how P is kept.
    `full_rank`: the part of a stack, rounded, that learns at full rank at a time, around Muon; 0 corrects nothing. One
    matrix at least does and one does not; a stack of one is not corrected. It costs F m k values of momentum, and
    gradients (sums of those of micro-batches) that stay whole until the update; clipping is then by their norm.
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
    full_rank: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.refresh_every < 1 or self.smallest < 1:
            raise ValueError(f"rank = {self.rank}, refresh_every = {self.refresh_every}, smallest = {self.smallest}; "
                             "accepted: at least 1")  # fmt: skip
        if not (0 < self.largest_fraction <= 1 and 0 < self.alpha < inf):
            raise ValueError(f"largest_fraction = {self.largest_fraction}, alpha = {self.alpha}; "
                             "accepted: a part in (0, 1], a positive, finite factor")  # fmt: skip
        if not 0 <= self.full_rank < 1:
            raise ValueError(f"full_rank = {self.full_rank}; accepted: a part in [0, 1)")
        if self.full_rank and not isinstance(self.rule, Muon):
            raise ValueError(f"full_rank = {self.full_rank} around {type(self.rule).__name__}; accepted: around Muon")

    def rank_of(self, rows: int, columns: int) -> int | None:
        """The rank of a matrix' projection, None where it is not projected."""
        smaller = min(rows, columns)
        return None if smaller < self.smallest else max(1, min(self.rank, int(self.largest_fraction * smaller)))

    def shape_scale(self, rows: int, columns: int) -> float:
        rank, scale = self.rank_of(rows, columns), self.rule.shape_scale(rows, columns)
        return scale if rank is None else scale * self.alpha * self.rule.low_rank_scale(min(rows, columns), rank)

    def num_drawn(self, number: int) -> int:
        """F, of so many matrices of a stack."""
        return min(max(1, round(self.full_rank * number)), number - 1) if self.full_rank else 0

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
        if num_drawn := self.num_drawn(number):
            full = self.rule.init_state(weights[:num_drawn])
            state |= {f"{FULL}{key}": value for key, value in full.items()}
            state["drawn"] = torch.arange(num_drawn, device=weights.device)
        return state | basis

    def of_matrices(self, key: str) -> bool:
        return key != "drawn" and not key.startswith(FULL)

    def begin(self, state: State, number: int, step: int, name: str) -> None:
        """At the start of a period: all averages to zero, and a draw that depends on period and stack alone."""
        if "drawn" not in state or step % self.refresh_every:
            return
        bases = average_of(state, "left") | average_of(state, "right")
        for key in state.keys() - bases.keys():
            state[key].zero_()
        random = Random(f"{DRAW_SEED} {name} {step // self.refresh_every}")
        drawn = torch.tensor(random.sample(range(number), len(state["drawn"])))
        state["drawn"].copy_(to_device(drawn, state["drawn"].device))

    def wake(self, state: State, steps: int) -> None:
        self.rule.wake(state, steps)

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
        """R (n, r, k) in the gradient's dtype; the gradient itself where it is not projected, or not yet."""
        side = side_of(state)
        if side is None or "drawn" in state:
            return grad_n
        some = average_of(state, side, which)
        return torch.bmm(self.basis.read(some, side, "linear").to(grad_n.dtype), shorter_first(grad_n, side))

    def direction(self, grad: Tensor, state: State, finite: Tensor, workers: Workers = ALONE) -> Tensor:
        """D in full size, float32, of what `project` gave."""
        corrected = "drawn" in state
        found = self._corrected if corrected else self._low_rank
        return found(grad, state, finite, workers)

    def _corrected(self, grad_NMK: Tensor, state: State, finite: Tensor, workers: Workers) -> Tensor:
        """D of whole gradients: what lies outside of their bases for those that are drawn, inside for the others."""
        side, drawn_F = side_of(state), state["drawn"]
        assert side is not None, "a gradient that is not projected"
        part = len(drawn_F) / len(grad_NMK)
        basis_Nrm, grad_Nmk = self.basis.read(state, side, "linear"), shorter_first(grad_NMK, side)
        work = work_dtype(grad_NMK)
        inside_Nrk = torch.bmm(basis_Nrm.to(work), grad_Nmk.to(work)).float()
        # Of all, as few are drawn; what is found of those is overwritten.
        found = self._low_rank(inside_Nrk / (1 - part), state, finite, workers)
        # In float32, as it may be small beside what is taken away.
        basis_Frm, grad_Fmk = basis_Nrm[drawn_F], grad_Nmk[drawn_F]
        outside_Fmk = without(grad_Fmk, basis_Frm)
        inner = {key.removeprefix(FULL): value for key, value in state.items() if key.startswith(FULL)}
        outside_FMK = shorter_first(outside_Fmk, side)
        full_Fmk = shorter_first(self.rule.direction(outside_FMK / part, inner, finite, workers), side)
        outside = shorter_first(without(full_Fmk, basis_Frm), side)
        # The optimizer will scale all of a stack as what learns in a basis.
        shape = grad_NMK.shape[-2:]
        return found.index_copy_(0, drawn_F, outside * (self.rule.shape_scale(*shape) / self.shape_scale(*shape)))

    def _low_rank(self, grad: Tensor, state: State, finite: Tensor, workers: Workers) -> Tensor:
        """D of projected gradients R."""
        return self.full_size(self.rule.direction(grad, state, finite, workers), state).float()

    def full_size(self, found: Tensor, state: State) -> Tensor:
        """P D_R (N, M, K) of D_R (N, r, k), in bf16 on a GPU; what was given where nothing is projected."""
        side = side_of(state)
        if side is None:
            return found
        work = work_dtype(found)
        whole = torch.bmm(self.basis.read(state, side, "linear").mT.to(work), found.to(work))
        return shorter_first(whole, side)


def follow(basis_nRm: Tensor, grad_nmk: Tensor, iterations: int) -> Tensor:
    """An orthonormal basis (n, r, m) of the strongest left directions of each gradient, from one that is near.

    A gradient of low rank gets directions to fill up. Products are in float32: the directions of small singular values
    would drown in the rounding of bf16.
    """
    found = basis_nRm.mT
    for _ in range(iterations):
        found = torch.linalg.qr(grad_nmk @ (grad_nmk.mT @ found)).Q
    return found.mT


def without(x_nmk: Tensor, basis_nrm: Tensor) -> Tensor:
    """What of each matrix lies outside of its basis."""
    return x_nmk - torch.bmm(basis_nrm.mT, torch.bmm(basis_nrm, x_nmk))


def shorter_first(x_nMK: Tensor, side: str) -> Tensor:
    """Matrices that are projected from the right, transposed; and back."""
    return x_nMK if side == "left" else x_nMK.mT


def side_of(state: State) -> str | None:
    """The side from which a stack is projected; None where it is not."""
    return next((side for side in ("left", "right") if average_of(state, side)), None)
