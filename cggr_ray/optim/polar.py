"""The polar factor of a matrix up to a few percent, by five odd quintic polynomials of it.

Newton-Schulz with one set of coefficients (Jordan et al. 2024), or Polar Express (arXiv:2505.16932), which lands closer
to 1. Wide matrices meet products of the polynomials (Gram Newton-Schulz; Zhang, Amsel, Chen, Dao 2026).
Differs from the first two: in fp16 on a GPU, not bf16. Differs from all: squares are completed, so that no product has
a summand.
Shapes: N matrices (M, K), n of them at a time; m the shorter side, k the longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from cggr_ray.workers import ALONE, Workers

# Values of the matrices that are multiplied at once: more would be no faster.
LARGEST_PRODUCT = 2**26
# Longer side over shorter from which on products of the shorter sides are fewer operations: 4 w + 14 to 10 w + 5.
WIDE = 1.5


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


def orthogonalise(
    matrices_NMK: Tensor, method: Literal["newton_schulz", "polar_express"], workers: Workers = ALONE
) -> Tensor:
    """The nearest semi-orthogonal matrix of each of N matrices, approximately; zero stays zero.

    In float32, but on a GPU: there from bf16, which has the range of gradients, and in fp16, which is eight times as
    exact for values that are no longer than 1. Workers that hold the same matrices share them. Returns float32.
    """
    work = matrices_NMK.to(work_dtype(matrices_NMK))
    tall = work.shape[-2] > work.shape[-1]
    x = work.mT if tall else work
    factor, shifts = POLAR_EXPRESS if method == "polar_express" else NEWTON_SCHULZ
    length_N11 = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    start = x * (factor / length_N11.clamp_min(1e-7))
    x = workers.share(partial(polynomials, shifts=shifts), start.to(torch.float16) if x.is_cuda else start)
    return (x.mT if tall else x).float()


@torch.library.custom_op("cggr_ray::polynomials", mutates_args=())
def polynomials(z_Nmk: Tensor, shifts: Sequence[float]) -> Tensor:
    """Z <- (S^2 + d I) Z with S = Z Z^T + e I, for each e, d.

    Products alone: `baddbmm` would copy its summand, and read it again. One operator to a compiler, which would write
    all of a matrix to add to its diagonal; some matrices at a time, so that little is there beside Z and the result.
    """
    *firsts, last = parts_of(list(zip(shifts[::2], shifts[1::2], strict=True)), z_Nmk.shape[-1] / z_Nmk.shape[-2])
    at_once = max(1, LARGEST_PRODUCT // z_Nmk[0].numel())
    found_Nmk = torch.empty_like(z_Nmk, memory_format=torch.contiguous_format)
    for z, found in zip(z_Nmk.split(at_once), found_Nmk.split(at_once), strict=True):
        for first in firsts:
            z = torch.bmm(_product(z, first), z)
        torch.bmm(_product(z, last), z, out=found)
    return found_Nmk


def parts_of(shifts: list[tuple[float, float]], longer: float) -> list[list[tuple[float, float]]]:
    """Which polynomials are multiplied before they meet Z: where Z is wide, those of Gram Newton-Schulz, two and three.

    More than three lose what is small to the rounding of fp16 (Zhang, Amsel, Chen, Dao 2026).
    """
    return [shifts[:2], shifts[2:]] if longer > WIDE else [[each] for each in shifts]


def _product(z_nmk: Tensor, shifts: list[tuple[float, float]]) -> Tensor:
    """Q (n, m, m), so that Q Z is Z after these polynomials. All of them are symmetric, and commute."""
    gram, found = torch.bmm(z_nmk, z_nmk.mT), None
    for at, (e, d) in enumerate(shifts):
        last = at == len(shifts) - 1
        square = gram if last else gram.clone()
        square.diagonal(dim1=-2, dim2=-1).add_(e)
        square = torch.bmm(square, square)
        square.diagonal(dim1=-2, dim2=-1).add_(d)
        found = square if found is None else torch.bmm(square, found)
        if not last:
            gram = torch.bmm(torch.bmm(square, gram), square)
    assert found is not None
    return found


@polynomials.register_fake
def _(z_Nmk: Tensor, shifts: Sequence[float]) -> Tensor:
    return z_Nmk.new_empty(z_Nmk.shape)


def work_dtype(x: Tensor) -> torch.dtype:
    """Of large products, and of what they are made of."""
    return torch.bfloat16 if x.is_cuda else torch.float32
