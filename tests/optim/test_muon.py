"""Muon against the polar factor of a float64 singular value decomposition, and against torch.optim.Muon."""

import math

import pytest
import torch
from polar_oracle import cosine, with_spectrum
from torch import nn

from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.optimizer import Optimizer
from cggr_ray.optim.schedules import Linear
from cggr_ray.optim.state_formats import Int8Blockwise
from cggr_ray.progress import Progress

STEADY = Linear(warmup_tokens=0, floor=1.0)
START = Progress(step=0, train_seconds=0.0, budget_seconds=1.0, tokens_seen=1)


@pytest.mark.parametrize(
    "scale, rows, columns, expected",
    [
        ("keller", 8, 2, 2.0),
        ("keller", 2, 8, 1.0),
        ("keller", 5, 5, 1.0),
        ("moonlight", 100, 25, 2.0),
        ("moonlight", 25, 100, 2.0),
        ("moonlight", 16, 16, 0.8),
        ("spectral", 8, 2, 2.0),
        ("spectral", 2, 8, 0.5),
        ("spectral", 9, 1, 3.0),
        ("none", 8, 2, 1.0),
        ("none", 2, 8, 1.0),
    ],
)
def test_shape_scales(scale, rows, columns, expected):
    assert Muon(scale=scale).shape_scale(rows, columns) == pytest.approx(expected, rel=1e-12)


def optimizer_of(parameters, muon, schedule=STEADY):
    names = [f"p{i}" for i in range(len(parameters))]
    config = Optimizer(matrix=muon, rest=AdamW(), schedule=schedule, clip_norm=math.inf)
    return config.build(zip(names, parameters, strict=True), names, torch.device("cpu"))


@pytest.mark.parametrize("scale, adjust", [("keller", "original"), ("moonlight", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_ten_steps_follow_torch_muon(scale, adjust, nesterov, weight_decay):
    generator = torch.Generator().manual_seed(4)
    start = [torch.randn(shape, generator=generator) for shape in [(48, 24), (24, 48), (32, 32), (24, 48)]]
    mine, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    optimizer = optimizer_of(mine, Muon(orthogonalise="newton_schulz", scale=scale, **options))
    oracle = torch.optim.Muon(theirs, adjust_lr_fn=adjust, **options)
    for _ in range(10):
        before = [(a.detach().clone(), b.detach().clone()) for a, b in zip(mine, theirs, strict=True)]
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator) * 0.1 + 0.05 * start[0].mean()
            b.grad = a.grad.clone()
        optimizer.step(START)
        oracle.step()
        for (a0, b0), a, b in zip(before, mine, theirs, strict=True):
            # The oracle works in bf16: directions agree to a few thousandths, and so do lengths.
            assert cosine(a - a0, b - b0) > 0.999
            assert ((a - a0).norm() / (b - b0).norm()).item() == pytest.approx(1, abs=0.01)
    for w, a, b in zip(start, mine, theirs, strict=True):
        assert cosine(a - w, b - w) > 0.999


@pytest.mark.parametrize("scale", ["keller", "moonlight", "spectral", "none"])
@pytest.mark.parametrize("rows, columns", [(40, 10), (10, 40)])
def test_step_moves_by_lr_times_scale_times_polar_factor(scale, rows, columns):
    spectrum = torch.linspace(1, 0.2, 10, dtype=torch.float64)
    gradient, polar = with_spectrum(rows, columns, spectrum, seed=9)
    parameter = nn.Parameter(torch.zeros(rows, columns))
    optimizer = optimizer_of([parameter], Muon(lr=0.5, scale=scale))
    parameter.grad = gradient.float()
    optimizer.step(START)
    factor = {
        "keller": 2.0 if rows > columns else 1.0,
        "moonlight": 0.2 * 40**0.5,
        "spectral": 2.0 if rows > columns else 0.5,
        "none": 1.0,
    }[scale]
    assert -(parameter.detach().double() * polar).sum() / 10 == pytest.approx(0.5 * factor, rel=0.1)


def test_weight_decay_alone_shrinks_geometrically():
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    parameter = nn.Parameter(start.clone())
    optimizer = optimizer_of([parameter], Muon(lr=0.1, weight_decay=0.5, scale="moonlight"))
    for _ in range(3):
        parameter.grad = torch.zeros(6, 4)
        optimizer.step(START)
    torch.testing.assert_close(parameter.detach(), start * (1 - 0.1 * 0.5) ** 3, atol=1e-6, rtol=0)


@pytest.mark.parametrize("values", [{"momentum": 1.0}, {"momentum": -0.1}, {"lr": -1e-3}, {"weight_decay": -0.1},
                                    {"lr": math.nan}, {"lr": math.inf}, {"weight_decay": math.nan}])  # fmt: skip
def test_impossible_values_are_refused(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))}={next(iter(values.values()))}"):
        Muon(**values)


def test_a_scale_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"scale = 'kellr'; did you mean 'keller'\? accepted: .*none"):
        Muon(scale="kellr")


@pytest.mark.parametrize("row_beta", [1.0, 1.5, -0.1, math.nan])
def test_row_average_must_forget(row_beta):
    with pytest.raises(ValueError, match=f"row_beta = {row_beta}"):
        Muon(row_beta=row_beta)


# Momentum in 8 bits


@pytest.mark.parametrize("momentum, nesterov", [(0.95, True), (0.98, False)])
def test_direction_with_8_bits_stays_close_to_that_of_float32(momentum, nesterov):
    generator = torch.Generator().manual_seed(6)
    full, eight = (Muon(momentum=momentum, nesterov=nesterov, **s) for s in ({}, {"state": Int8Blockwise()}))
    states = [rule.init_state(torch.zeros(2, 256, 384)) for rule in (full, eight)]
    # Columns of very different sizes, so that a block holds large values and small ones.
    signal = torch.randn(2, 256, 384, generator=generator) * torch.logspace(0.3, -1.7, 384)
    for _ in range(60):
        gradient = signal + torch.randn(2, 256, 384, generator=generator)
        found = [rule.direction(gradient, s, torch.ones(())) for rule, s in zip((full, eight), states, strict=True)]
        assert min(cosine(a, b) for a, b in zip(*found, strict=True)) > 0.997
    assert states[1]["momentum.codes"].dtype == torch.int8 and not torch.equal(*found)


def final_loss(muon, seed, steps=500):
    """Of a small regression, noise in the labels, rate falling to 0."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(512, 64, generator=generator), 0.3 * torch.randn(512, 64, generator=generator)
    first, second = (torch.randn(64, 64, generator=generator) / 8 for _ in range(2))
    y = (x @ first).tanh() @ second + noise
    a, b = (nn.Parameter(torch.randn(shape, generator=generator) / 8) for shape in [(64, 96), (96, 64)])
    optimizer = optimizer_of([a, b], muon, Linear(warmup_tokens=0, floor=0.0))
    for step in range(steps):
        batch = torch.randint(0, 512, (64,), generator=generator)
        ((x[batch] @ a).tanh() @ b - y[batch]).square().mean().backward()
        optimizer.step(Progress(step, float(step), float(steps), step))
    return ((x @ a).tanh() @ b - y).square().mean().item()


def test_regressions_end_as_well_with_8_bits():
    gaps = []
    for seed in range(4):
        full, eight = final_loss(Muon(lr=0.01), seed), final_loss(Muon(lr=0.01, state=Int8Blockwise()), seed)
        assert full < 0.4 * final_loss(Muon(lr=0.01), seed, steps=10) and full != eight
        gaps.append(eight / full - 1)
    assert max(map(abs, gaps)) < 0.01 and abs(sum(gaps)) / len(gaps) < 0.005, gaps


def test_a_momentum_too_long_for_8_bits_is_refused():
    with pytest.raises(ValueError, match=r"momentum = 0.99 with 8-bit state; accepted: at most 0.98"):
        Muon(momentum=0.99, state=Int8Blockwise())
    Muon(momentum=0.99)


# NorMuon


@pytest.mark.parametrize("row_beta", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("rows, columns", [(24, 40), (40, 24)])
def test_rows_are_evened_as_by_hand(rows, columns, row_beta):
    generator = torch.Generator().manual_seed(7)
    muon, plain = Muon(row_beta=row_beta), Muon()
    state, of_plain = (rule.init_state(torch.zeros(2, rows, columns)) for rule in (muon, plain))
    mean_squares = [[0.0] * rows for _ in range(2)]
    uneven = torch.logspace(0, -2, rows)[:, None]
    for _ in range(6):
        gradient = torch.randn(2, rows, columns, generator=generator) * uneven
        found = muon.direction(gradient, state, torch.ones(())).double()
        orthogonal = plain.direction(gradient, of_plain, torch.ones(())).double()
        for matrix in range(2):
            expected = orthogonal[matrix].clone()
            for i in range(rows):
                square = sum(v * v for v in orthogonal[matrix, i].tolist()) / columns
                mean_squares[matrix][i] = row_beta * mean_squares[matrix][i] + (1 - row_beta) * square
                expected[i] /= math.sqrt(mean_squares[matrix][i])
            expected *= orthogonal[matrix].norm() / expected.norm()
            torch.testing.assert_close(found[matrix], expected, atol=1e-5, rtol=1e-4)
            assert found[matrix].norm() == pytest.approx(orthogonal[matrix].norm().item(), rel=1e-5)
    if row_beta == 0:
        norms = found.norm(dim=-1)
        torch.testing.assert_close(norms, norms.mean(-1, keepdim=True).expand_as(norms), rtol=1e-4, atol=0)


def test_rows_that_are_zero_stay_zero_when_rows_are_evened():
    muon = Muon(row_beta=0.9)
    state = muon.init_state(torch.zeros(2, 12, 20))
    for step in range(4):
        gradient = torch.randn(2, 12, 20, generator=torch.Generator().manual_seed(step))
        gradient[0, 3:] *= 0
        gradient[1] *= 0
        found = muon.direction(gradient, state, torch.ones(()))
        assert found.isfinite().all() and (found[0, 3:] == 0).all() and (found[1] == 0).all()
        assert (found[0, :3].norm(dim=-1) > 0.5).all()
