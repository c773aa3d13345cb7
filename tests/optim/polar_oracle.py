"""Matrices with a known polar factor, and the polynomials as published: Jordan et al. 2024, arXiv:2505.16932."""

import torch

JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
AMSEL = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def published(matrix: torch.Tensor, method: str) -> torch.Tensor:
    """In float64, of one matrix (M, K), term by term."""
    coefficients, margin = (AMSEL, 1.02) if method == "polar_express" else (JORDAN, 1.0)
    x = matrix.double().cpu()
    x = x / (x.norm() * margin)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def orthonormal_columns(rows, columns, generator):
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def with_spectrum(rows, columns, spectrum, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = (orthonormal_columns(n, len(spectrum), generator) for n in (rows, columns))
    return left * spectrum @ right.T, left @ right.T


def cosine(a, b):
    return (a.double() * b.double()).sum() / (a.double().norm() * b.double().norm())
