"""Muon: the momentum of a hidden matrix, orthogonalised (Jordan et al. 2024; scale of arXiv:2502.16982, eq. 4).

    M <- beta M + (1 - beta) G,   U = (1 - beta) G + beta M (Nesterov) or M,   D = orth(U)

`orth` is the polar factor up to a few percent, by five odd quintic polynomials in bf16: Newton-Schulz with one set of
coefficients, or Polar Express (arXiv:2505.16932), which lands closer to 1. Shapes: G_NMK is a stack of N matrices of
one shape, so that every product is one batched GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# Polar Express expects singular values below 1 by this margin, against bf16 rounding.
POLAR_EXPRESS_MARGIN = 1.02


def orthogonalise(matrices_NMK: Tensor, method: Literal["newton_schulz", "polar_express"]) -> Tensor:
    """The nearest semi-orthogonal matrix of each of N matrices, approximately; zero stays zero.

    Works in bf16 on a GPU, in the input's dtype elsewhere; returns float32.
    """
    work = matrices_NMK.to(torch.bfloat16) if matrices_NMK.is_cuda else matrices_NMK
    tall = work.shape[-2] > work.shape[-1]
    x = work.mT if tall else work
    express = method == "polar_express"
    margin, coefficients = (POLAR_EXPRESS_MARGIN, POLAR_EXPRESS) if express else (1.0, NEWTON_SCHULZ)
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) * margin).clamp_min(1e-7)
    for a, b, c in coefficients:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


@dataclass(frozen=True)
class Muon:
    """Rule for hidden matrices.

    `scale` multiplies the learning rate by the matrix' shape M x K: `keller` sqrt(max(1, M/K)); `moonlight`
    0.2 sqrt(max(M, K)), whose update has the RMS of AdamW's, so AdamW learning rates carry over; `spectral` sqrt(M/K).
    """

    IS_PART: ClassVar[bool] = True

    lr: float = 3e-3
    momentum: float = 0.95
    nesterov: bool = True
    orthogonalise: Literal["newton_schulz", "polar_express"] = "polar_express"
    scale: Literal["keller", "moonlight", "spectral"] = "moonlight"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.lr < 0 or self.weight_decay < 0 or not 0 <= self.momentum < 1:
            raise ValueError(f"{self}; accepted: lr >= 0, weight_decay >= 0, momentum in [0, 1)")

    def init_state(self, weights_NMK: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(weights_NMK, dtype=torch.float32)}

    def direction(self, grad_NMK: Tensor, state: dict[str, Tensor], finite: Tensor) -> Tensor:
        """Updates the momentum in place and returns D, float32. A step that is not finite leaves the momentum as is."""
        buffer = state["momentum"]
        buffer.lerp_(grad_NMK, (1 - self.momentum) * finite)
        update = grad_NMK.lerp(buffer, self.momentum) if self.nesterov else buffer
        return orthogonalise(update, self.orthogonalise)

    def shape_scale(self, rows: int, columns: int) -> float:
        if self.scale == "keller":
            return max(1.0, rows / columns) ** 0.5
        if self.scale == "moonlight":
            return 0.2 * max(rows, columns) ** 0.5
        return (rows / columns) ** 0.5
