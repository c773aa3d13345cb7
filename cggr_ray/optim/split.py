"""Fused projections: a matrix that holds those of queries, keys and values side by side, as the three that it is.

Whatever looks at a matrix as a whole has to see them apart: its polar factor makes the three as large as one another
and turns each by the others, and a basis of its gradient is for the largest of them.

Shapes: n matrices (M, K) at a time; 3 n of (m, k), a third of the longer side each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cggr_ray.optim.rule import Around, Rule
from cggr_ray.optim.state_formats import State
from cggr_ray.workers import ALONE, Workers

# Queries, keys and values.
PIECES = 3


def is_fused(shape: torch.Size) -> bool:
    """Whether a matrix of this shape may be three square ones, one after the other."""
    return len(shape) == 2 and max(shape) == PIECES * min(shape)


def split(rule: Rule, shape: tuple[int, ...]) -> Rule:
    """The rule for the thirds of fused matrices of a shape; itself where it looks at values one by one."""
    return rule if rule.ELEMENTWISE else Split(rule, rows=shape[0] > shape[1])


@dataclass(frozen=True)
class Split(Around):
    """A rule for the thirds of matrices, which lie along the rows or the columns.

    State is the rule's own for the thirds, those of a matrix together: (n, 3, ...) for its (3 n, ...).
    """

    rule: Rule
    rows: bool

    def init_state(self, weights: Tensor) -> State:
        shape = self._shape(*weights.shape[1:])
        state = self.rule.init_state(weights.new_zeros(1).expand(PIECES * len(weights), *shape))
        return {key: self._by_matrix(value) if self.of_matrices(key) else value for key, value in state.items()}

    def of_matrices(self, key: str) -> bool:
        return self.rule.of_matrices(key)

    def direction(self, grad: Tensor, state: State, finite: Tensor, workers: Workers = ALONE) -> Tensor:
        own = grad.flatten(0, 1) if self.projects(state) else self._apart(grad)
        return self._together(self.rule.direction(own, self._own(state), finite, workers))

    def wake(self, state: State, steps: int) -> None:
        self.rule.wake(self._own(state), steps)

    def without_momentum(self, grad: Tensor, state: State) -> Tensor:
        return self._together(self.rule.without_momentum(self._apart(grad), self._own(state)))

    def shape_scale(self, rows: int, columns: int) -> float:
        return self.rule.shape_scale(*self._shape(rows, columns))

    def begin(self, state: State, number: int, step: int, name: str) -> None:
        self.rule.begin(self._own(state), PIECES * number, step, name)

    def projects(self, state: State) -> bool:
        return self.rule.projects(self._own(state))

    def due(self, number: int, step: int) -> range:
        """The thirds of a matrix are due together."""
        return self.rule.due(number, step)

    def refresh(self, grad_n: Tensor, state: State, which: slice, first: bool) -> None:
        self.rule.refresh(self._apart(grad_n), self._own(state), self._thirds(which), first)

    def project(self, grad_n: Tensor, state: State, which: slice = slice(None)) -> Tensor:
        """(n, 3, ...) of what the rule makes of the thirds."""
        return self._by_matrix(self.rule.project(self._apart(grad_n), self._own(state), self._thirds(which)))

    def _shape(self, rows: int, columns: int) -> tuple[int, int]:
        """(m, k)."""
        return (rows // PIECES, columns) if self.rows else (rows, columns // PIECES)

    def _thirds(self, which: slice) -> slice:
        return which if which == slice(None) else slice(PIECES * which.start, PIECES * which.stop)

    def _own(self, state: State) -> State:
        """The state as the rule knows it: views, which it may write."""
        return {
            key: value.view(-1, *value.shape[2:]) if self.of_matrices(key) else value for key, value in state.items()
        }

    def _by_matrix(self, value: Tensor) -> Tensor:
        return value.unflatten(0, (-1, PIECES))

    def _apart(self, x_nMK: Tensor) -> Tensor:
        """(3 n, m, k)."""
        if self.rows:
            return x_nMK.unflatten(1, (PIECES, -1)).flatten(0, 1)
        return x_nMK.unflatten(2, (PIECES, -1)).movedim(2, 1).flatten(0, 1)

    def _together(self, thirds: Tensor) -> Tensor:
        """(n, M, K) of (3 n, m, k)."""
        found = self._by_matrix(thirds)
        return found.flatten(1, 2) if self.rows else found.movedim(1, 2).flatten(2)
