"""Relevance of layers against plain loops in float64, and against what a linear loss falls by."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cggr_ray.updates.relevance import RELEVANCES, Probe, RelevanceName

LAYERS = 4
# Stacks as the optimizer holds them, and the layer of each parameter; None is a parameter of no layer.
STACKS: list[tuple[tuple[int, ...], list[int | None]]] = [
    ((3, 5), [2, None, 0, 1, 3]),
    ((7,), [1, 0, None, None]),
    ((5, 3), [3]),
    ((5,), [2, 3, 1]),
    ((1, 4), [None]),
]


def random_stacks(generator: torch.Generator) -> list[Tensor]:
    """One tensor a stack, of very unlike sizes."""
    shapes = ((len(owners), *shape) for shape, owners in STACKS)
    return [torch.randn(shape, generator=generator) * 10 ** (i - 2) for i, shape in enumerate(shapes)]


def probe_of(name: RelevanceName, stacks: list[Tensor]) -> Probe:
    order = [nn.Parameter(weights) for stack in stacks for weights in stack]
    owners = [owner for _, some in STACKS for owner in some]
    layers = [[p for p, owner in zip(order, owners, strict=True) if owner == i] for i in range(LAYERS)]
    # In which order a layer names its own parameters is of no account.
    return Probe(name, order, [list(reversed(layer)) for layer in layers])


def measured(name: RelevanceName, gradients: list[Tensor], weights: list[Tensor], updates: list[Tensor]) -> Tensor:
    probe = probe_of(name, weights)
    return step_of(probe, gradients, weights, updates)


def step_of(probe: Probe, gradients: list[Tensor], weights: list[Tensor], updates: list[Tensor]) -> Tensor:
    for gradient, weight, update in zip(gradients, weights, updates, strict=True):
        probe.add(probe.measure(gradient, weight, lambda update=update: update))
    return probe.of_layers()


def plain_loop(name: str, layer: int, gradients: list[Tensor], weights: list[Tensor], updates: list[Tensor]) -> float:
    """Element by element, in float64."""
    squared_gradient = squared_weights = products = falls = 0.0
    for stack, (_, owners) in enumerate(STACKS):
        for i, owner in enumerate(owners):
            if owner != layer:
                continue
            numbers = (t[stack][i].double().flatten().tolist() for t in (gradients, weights, updates))
            for g, w, u in zip(*numbers, strict=True):
                squared_gradient += g * g
                squared_weights += w * w
                products += abs(g * w)
                falls += g * u
    ratio = math.sqrt(squared_gradient) / (math.sqrt(squared_weights) + 1e-12)
    return {"gradient_norm": ratio, "saliency": products, "fisher": squared_gradient, "decrease": falls}[name]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", RELEVANCES)
def test_relevance_against_plain_loops(name: RelevanceName, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients, weights, updates = (random_stacks(generator) for _ in range(3))
    found = measured(name, gradients, weights, updates)
    expected = [plain_loop(name, layer, gradients, weights, updates) for layer in range(LAYERS)]
    # Products of either sign may cancel: the bound is for the sum of their sizes.
    sizes = [t.abs() for t in gradients], [t.abs() for t in updates]
    bound = max(plain_loop("decrease", layer, sizes[0], weights, sizes[1]) for layer in range(LAYERS))
    assert found.shape == (LAYERS,) and not found.requires_grad
    torch.testing.assert_close(
        found.double(), torch.tensor(expected).double(), rtol=2e-6, atol=1e-6 * bound * (name == "decrease")
    )


def test_what_belongs_to_no_layer_counts_nowhere() -> None:
    generator = torch.Generator().manual_seed(5)
    gradients, weights, updates = (random_stacks(generator) for _ in range(3))
    before = {name: measured(name, gradients, weights, updates) for name in RELEVANCES}
    for stacks in (gradients, weights, updates):
        for tensor, (_, owners) in zip(stacks, STACKS, strict=True):
            tensor[[i for i, owner in enumerate(owners) if owner is None]] = 1e9
    for name, expected in before.items():
        assert torch.equal(measured(name, gradients, weights, updates), expected)


def test_decrease_is_what_a_linear_loss_falls_by() -> None:
    generator = torch.Generator().manual_seed(7)
    slopes, weights, updates = (random_stacks(generator) for _ in range(3))
    leaves = [w.clone().requires_grad_() for w in weights]
    torch.stack([(s * w).sum() for s, w in zip(slopes, leaves, strict=True)]).sum().backward()
    found = measured("decrease", [w.grad for w in leaves if w.grad is not None], weights, updates)

    def loss(layer: int, step: float) -> float:
        total = 0.0
        for s, w, u, (_, owners) in zip(slopes, weights, updates, STACKS, strict=True):
            moves = torch.tensor([float(owner == layer) for owner in owners]).double().view(-1, *[1] * (w.dim() - 1))
            total += float((s.double() * (w.double() - step * moves * u.double())).sum())
        return total

    for layer in range(LAYERS):
        assert found[layer].item() == pytest.approx(loss(layer, 0.0) - loss(layer, 1.0), rel=1e-4, abs=1e-3)


def test_a_probe_starts_anew_in_every_step() -> None:
    generator = torch.Generator().manual_seed(9)
    weights, *steps = (random_stacks(generator) for _ in range(5))
    for name in RELEVANCES:
        probe = probe_of(name, weights)
        for gradients, updates in (steps[:2], steps[2:]):
            expected = measured(name, gradients, weights, updates)
            assert torch.equal(step_of(probe, gradients, weights, updates), expected)


def test_layers_of_nothing_but_zeros_are_of_no_relevance() -> None:
    zeros = [torch.zeros(len(owners), *shape) for shape, owners in STACKS]
    for name in RELEVANCES:
        assert torch.equal(measured(name, zeros, zeros, zeros), torch.zeros(LAYERS))
