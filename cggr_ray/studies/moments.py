"""Moments of what a matrix reads, and errors of what stands in for it.

Of a matrix's inputs x only the Gram matrix C = sum x x^T and the mean |x_i| are kept, in float64. Since
|X M^T|_F^2 = tr(M C M^T), the error of any approximation on any set of activations is exact without keeping them.
Shapes: a weight is (O, I), out by in; N positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over the positions that a matrix read."""

    gram_II: Tensor
    absolute_I: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> Moments:
        gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        return cls(gram, torch.zeros_like(gram[0]))

    def add(self, x_NI: Tensor) -> None:
        wide = x_NI.double()
        self.gram_II += wide.mT @ wide
        self.absolute_I += wide.abs().sum(0)
        self.count += len(wide)

    @property
    def mean_absolute_I(self) -> Tensor:
        return self.absolute_I / self.count


MomentsOf = Mapping[tuple[int, str], Moments]


def output_energy(weight_OI: Tensor, gram_II: Tensor) -> float:
    """|X W^T|_F^2 = tr(W C W^T)."""
    wide = weight_OI.double()
    return float(((wide @ gram_II) * wide).sum())


def relative_errors(pairs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float]:
    """(weight error, output error) of (W, W', C) triples, pooled: roots of summed squares over summed squares."""
    weight = sum(float((w.double() - other.double()).square().sum()) for w, other, _ in pairs)
    output = sum(output_energy(w.double() - other.double(), gram) for w, other, gram in pairs)
    weights = sum(float(w.double().square().sum()) for w, _, _ in pairs)
    outputs = sum(output_energy(w, gram) for w, _, gram in pairs)
    return (weight / weights) ** 0.5, (max(output, 0.0) / outputs) ** 0.5
