"""Muon against the polar factor of a float64 singular value decomposition, and against torch.optim.Muon."""

import math

import pytest
import torch
from published import published
from torch import nn

from cggr_ray.optim import muon
from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.muon import NEWTON_SCHULZ, Muon, orthogonalise, polynomials
from cggr_ray.optim.optimizer import Optimizer
from cggr_ray.optim.schedules import Linear
from cggr_ray.optim.state_formats import Int8Blockwise
from cggr_ray.progress import Progress

METHODS = ["newton_schulz", "polar_express"]
SHAPES = [(1, 1), (1, 17), (17, 1), (7, 7), (33, 65), (65, 33), (16, 128), (128, 16), (64, 64)]
# Smallest singular value over the Frobenius norm from which on the bounds hold, lowest and highest singular value of
# the result. Newton-Schulz grows a value of 0.001 by 3.4445^5 only, to 0.47; it needs a little more to start with.
BOUNDS = {"newton_schulz": (5e-3, 0.68, 1.2), "polar_express": (1e-3, 0.8, 1.2)}
LEAST_COSINE = {"newton_schulz": 0.98, "polar_express": 0.99}
STEADY = Linear(warmup_tokens=0, floor=1.0)
START = Progress(step=0, train_seconds=0.0, budget_seconds=1.0, tokens_seen=1)


def orthonormal_columns(rows, columns, generator):
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def with_spectrum(rows, columns, spectrum, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = (orthonormal_columns(n, len(spectrum), generator) for n in (rows, columns))
    return left * spectrum @ right.T, left @ right.T


def spread(count, smallest):
    """`count` singular values from 1 down, evenly in logarithms, the least `smallest` times the Frobenius norm."""
    low, high = math.log(smallest) - 3, 0.0
    for _ in range(100):
        middle = (low + high) / 2
        values = torch.logspace(0, middle / math.log(10), count, dtype=torch.float64)
        low, high = (middle, high) if values[-1] / values.norm() < smallest else (low, middle)
    return values


def cosine(a, b):
    return (a.double() * b.double()).sum() / (a.double().norm() * b.double().norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_singular_values_land_near_one(rows, columns, method):
    smallest, low, high = BOUNDS[method]
    count = min(rows, columns)
    spectrum = spread(count, min(smallest, 0.9 / math.sqrt(count)))
    matrix, _ = with_spectrum(rows, columns, spectrum, seed=rows + columns)
    found = torch.linalg.svdvals(orthogonalise(matrix[None].float(), method)[0].double())
    assert low <= found.min() and found.max() <= high, found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_direction_is_the_polar_factor(rows, columns, method):
    # A spectrum as wide as that of a random rectangular matrix.
    spectrum = torch.linspace(1, 0.1, min(rows, columns), dtype=torch.float64)
    matrix, polar = with_spectrum(rows, columns, spectrum, seed=3 * rows + columns)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(left @ right, polar, atol=1e-10, rtol=0)
    result = orthogonalise(matrix[None].float(), method)
    assert result.shape == (1, rows, columns) and result.dtype == torch.float32
    assert cosine(result[0], polar) > LEAST_COSINE[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_all_of_a_direction_is_that_of_the_published_polynomials(rows, columns, method):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    expected = published(matrix, method)
    assert (orthogonalise(matrix[None], method)[0] - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize("at_once", [1, 2, 3, 5])
def test_a_stack_is_worked_through_some_matrices_at_a_time(monkeypatch, at_once):
    monkeypatch.setattr(muon, "LARGEST_PRODUCT", 7 * 11 * at_once)
    stack = torch.randn(5, 11, 7, generator=torch.Generator().manual_seed(at_once))
    for matrix, found in zip(stack, orthogonalise(stack, "polar_express"), strict=True):
        torch.testing.assert_close(found.double(), published(matrix, "polar_express"), atol=1e-4, rtol=0)


def test_what_a_compiler_is_told_of_the_polynomials_is_true():
    start = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    for z in (start, start.mT.contiguous().mT):
        torch.library.opcheck(polynomials, (z, NEWTON_SCHULZ[1]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows, columns, rank", [(20, 20, 3), (31, 12, 5), (12, 31, 1)])
def test_rank_deficient_matrices_gain_no_direction(rows, columns, rank, method):
    matrix, polar = with_spectrum(rows, columns, torch.linspace(1, 0.3, rank, dtype=torch.float64), seed=rank)
    result = orthogonalise(matrix[None].float(), method)[0]
    values = torch.linalg.svdvals(result.double())
    # With three singular values the cosine is at worst that of (0.68, 1.2) with ones.
    assert result.isfinite().all() and cosine(result, polar) > 0.96
    assert values[rank - 1] > 0.68 and values[rank:].max() < 2e-3, values


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stays_zero_and_leaves_its_neighbours_alone(method, dtype):
    stack = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    stack[1] = 0
    result = orthogonalise(stack, method)
    assert result.isfinite().all() and (result[1] == 0).all()
    for i in (0, 2):
        torch.testing.assert_close(result[i], orthogonalise(stack[i : i + 1], method)[0], atol=2e-2, rtol=0)
        assert result[i].norm() > 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1e-4, 1e6])
def test_length_of_the_gradient_does_not_matter(method, factor):
    matrix = torch.randn(2, 12, 30, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalise(matrix * factor, method), orthogonalise(matrix, method), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_input_gives_nearly_the_same_direction(method):
    matrix = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(2))
    assert cosine(orthogonalise(matrix.bfloat16(), method), orthogonalise(matrix, method)) > 0.999


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


@pytest.mark.parametrize("scale", ["keller", "moonlight", "spectral"])
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


def final_loss(muon, seed, steps=300):
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


@pytest.mark.parametrize("seed", range(3))
def test_a_regression_ends_as_well_with_8_bits(seed):
    full, eight = final_loss(Muon(lr=0.01), seed), final_loss(Muon(lr=0.01, state=Int8Blockwise()), seed)
    assert full < 0.4 * final_loss(Muon(lr=0.01), seed, steps=10)
    assert full != eight and eight == pytest.approx(full, rel=0.01)


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
