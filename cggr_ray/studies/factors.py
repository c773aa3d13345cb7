"""Low-rank stand-ins for a matrix, in closed form from the weight and the Gram matrix of what it reads.

    W (O, I), y = x W^T, C = X^T X + eps I = L L^T;  W' = left right (+ diag), left (O, r), right (r, I)
    svd          min |W - W'|_F       W' = [W]_r, the best r terms of the singular value decomposition
    data_aware   min |X (W - W')^T|_F = min |(W - W') L|_F   W' = [W L]_r L^-1 = U_r U_r^T W, U the left vectors of W L
    plus_diag    the same with a diagonal beside W', found in turn with it; for matrices that are not square a factor
                 for every output channel, which is folded into `left`

A product with W costs 2 O I a position, one with its factors 2 r (O + I): equal at the break-even rank O I / (O + I).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# eps of C, as a share of its mean diagonal: inputs that calibration never saw keep some weight.
DAMPING = 1e-6
DIAGONAL_ROUNDS = 8


@dataclass(frozen=True)
class Factors:
    """left right + diag(diagonal); the diagonal only for square matrices."""

    left_OR: Tensor
    right_RI: Tensor
    diagonal_I: Tensor | None = None

    def dense_OI(self) -> Tensor:
        product = self.left_OR @ self.right_RI
        return product if self.diagonal_I is None else product + self.diagonal_I.diag()


# Weight, Gram matrix, ranks -> factors of each rank.
ClosedForm = Callable[[Tensor, Tensor, Sequence[int]], list[Factors]]


def svd(weight_OI: Tensor, gram_II: Tensor, ranks: Sequence[int]) -> list[Factors]:
    """Truncated singular value decomposition, the singular values shared out evenly; blind to the data."""
    u = left_vectors(weight_OI)
    right = u.mT @ weight_OI
    root = right.norm(dim=1).sqrt().clamp_min(torch.finfo(u.dtype).tiny)
    return [Factors(u[:, :r] * root[:r], right[:r] / root[:r, None]) for r in ranks]


def data_aware(weight_OI: Tensor, gram_II: Tensor, ranks: Sequence[int]) -> list[Factors]:
    """The exact optimum of the output error for damped `gram_II`."""
    u = left_vectors(weight_OI @ torch.linalg.cholesky(damped(gram_II)))
    return [Factors(u[:, :r], u[:, :r].mT @ weight_OI) for r in ranks]


def left_vectors(matrix_OI: Tensor) -> Tensor:
    """(O, min(O, I)), left singular vectors, the largest first; zero columns where the matrix has no more rank.

    By the eigenvectors of the smaller Gram matrix, an order of magnitude faster on a GPU than an SVD. That halves the
    digits of the smallest singular values, of which float64 leaves enough. Of a tall matrix, what is below them is
    rounding: scaled up it would be directions that are not orthogonal to the others.
    """
    rows, columns = matrix_OI.shape
    if rows <= columns:
        return torch.linalg.eigh(matrix_OI @ matrix_OI.mT).eigenvectors.flip(1)
    scaled = matrix_OI @ torch.linalg.eigh(matrix_OI.mT @ matrix_OI).eigenvectors.flip(1)
    values = scaled.norm(dim=0)
    smallest = (rows * torch.finfo(values.dtype).eps) ** 0.5 * values.max()
    return torch.where(values > smallest, scaled / values, 0.0)


def plus_diag(weight_OI: Tensor, gram_II: Tensor, ranks: Sequence[int]) -> list[Factors]:
    """Low rank and a diagonal in turn, each the best for the other: the output error never rises.

    A factor for every output channel cannot improve `data_aware`, whose residual is orthogonal to every channel's
    output: it comes out as 1 and only says so.
    """
    if weight_OI.shape[0] == weight_OI.shape[1]:
        return [_with_diagonal(weight_OI, gram_II, rank) for rank in ranks]
    found = data_aware(weight_OI, gram_II, ranks)
    return [
        Factors(f.left_OR * channel_scale(weight_OI, f.dense_OI(), damped(gram_II))[:, None], f.right_RI) for f in found
    ]


def _with_diagonal(weight_OI: Tensor, gram_II: Tensor, rank: int) -> Factors:
    gram = damped(gram_II)
    diagonal = torch.zeros_like(weight_OI[0])
    for _ in range(DIAGONAL_ROUNDS):
        low = data_aware(weight_OI - diagonal.diag(), gram_II, [rank])[0]
        diagonal = channel_diagonal(weight_OI - low.dense_OI(), gram)
    return Factors(low.left_OR, low.right_RI, diagonal)


def channel_diagonal(residual_II: Tensor, gram_II: Tensor) -> Tensor:
    """d of the least |X (R - diag(d))^T|_F: output channel j of the residual, explained by input j alone."""
    return (residual_II * gram_II).sum(1) / gram_II.diagonal()


def channel_scale(weight_OI: Tensor, other_OI: Tensor, gram_II: Tensor) -> Tensor:
    """s of the least |X (W - diag(s) W')^T|_F: one number an output channel; 1 where W' gives nothing."""
    through = other_OI @ gram_II
    energy = (through * other_OI).sum(1)
    return torch.where(energy > 0, (through * weight_OI).sum(1) / energy.clamp_min(torch.finfo(energy.dtype).tiny), 1.0)


def damped(gram_II: Tensor) -> Tensor:
    """C + eps I, which has a Cholesky factor whatever the data."""
    eps = DAMPING * gram_II.diagonal().mean().clamp_min(torch.finfo(gram_II.dtype).tiny)
    return gram_II + eps * torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)


def rank_of(fraction: float, rows: int, columns: int) -> int:
    """The rank that is a fraction of the full one, at least 1."""
    return max(1, round(fraction * min(rows, columns)))


def break_even_rank(rows: int, columns: int) -> float:
    """Below this rank the two products of the factors cost less than the one of the matrix."""
    return rows * columns / (rows + columns)
