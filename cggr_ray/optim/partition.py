"""Which rule updates which parameter: hidden matrices to `matrix`, everything else to `rest`, nothing forgotten."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

Named = tuple[str, nn.Parameter]


def partition(named: Iterable[Named], hidden: Iterable[str]) -> tuple[list[Named], list[Named]]:
    """(matrix, rest) of a model's named parameters.

    Args:
        named: all parameters that learn, a shared one once.
        hidden: names of parameters inside decoder layers; of these the two-dimensional ones are hidden matrices.
            Embeddings, heads, norms and biases are never among them, whatever their shape.
    """
    everything, inside = list(named), set(hidden)
    matrix = [(name, p) for name, p in everything if name in inside and p.ndim == 2]
    rest = [(name, p) for name, p in everything if not (name in inside and p.ndim == 2)]
    ids = [id(p) for _, p in matrix + rest]
    assert len(ids) == len(set(ids)) == len(everything), "a parameter is in two groups, or in none"
    assert inside <= {name for name, _ in everything}, f"unknown names {inside - {n for n, _ in everything}}"
    return matrix, rest


def by_shape(named: Iterable[Named]) -> dict[tuple[int, ...], list[Named]]:
    """Parameters of one shape together, in the model's order: each list is updated as one stacked tensor."""
    groups: dict[tuple[int, ...], list[Named]] = {}
    for name, p in named:
        groups.setdefault(tuple(p.shape), []).append((name, p))
    return groups
