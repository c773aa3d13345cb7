"""GaLore: its bases against a float64 singular value decomposition, its updates against those of the inner rule."""

import itertools
import math

import pytest
import torch
from small_optimizers import noise
from torch import nn

from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.optimizer import Optimizer
from cggr_ray.optim.schedules import Linear
from cggr_ray.optim.state_formats import Float32, Int8Blockwise
from cggr_ray.progress import Progress

SHAPES = {"wide": (64, 160), "tall": (160, 64), "square": (96, 96)}
INNER = {"muon": Muon(), "muon8": Muon(state=Int8Blockwise()), "adamw": AdamW(), "adamw8": AdamW(state=Int8Blockwise())}
ONE = torch.ones(())


def basis_of(rule, state):
    """P^T of every matrix, (N, r, m)."""
    (side,) = {key.split(".")[0] for key in state} & {"left", "right"}
    return rule.basis.read(state, side, "linear")


def after_steps(rule, shape, steps=3, number=2):
    state = rule.init_state(torch.zeros(number, *shape))
    for step in range(steps):
        gradient = noise(number, *shape, seed=step)
        if step == 0:
            rule.refresh(gradient, state, slice(0, number), True)
        rule.direction(rule.project(gradient, state), state, ONE)
    return state


def copy_of(state):
    return {key: value.clone() for key, value in state.items()}


def assert_orthonormal(basis_NRm, within=1e-4):
    eye = torch.eye(basis_NRm.shape[1], dtype=torch.float64).expand(len(basis_NRm), -1, -1)
    torch.testing.assert_close(basis_NRm.double() @ basis_NRm.double().mT, eye, atol=within, rtol=0)


def train(rule, shape, steps, number=2):
    """Weights after some steps on gradients that drift slowly, in float32."""
    parameters = [nn.Parameter(noise(*shape, seed=100 + i)) for i in range(number)]
    names = [str(i) for i in range(number)]
    config = Optimizer(matrix=rule, schedule=Linear(warmup_tokens=0, floor=1.0), clip_norm=math.inf)
    optimizer = config.build(zip(names, parameters, strict=True), names, torch.device("cpu"))
    for step in range(steps):
        for i, p in enumerate(parameters):
            p.grad = noise(*shape, seed=i) + noise(*shape, seed=1000 * i + step)
        optimizer.step(Progress(step, float(step), 1e3, step))
    return [p.detach() for p in parameters]


# Bases


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kept, within", [(Float32(), 1e-4), (Int8Blockwise(), 0.03)])
def test_basis_is_orthonormal_whatever_the_gradients(shape, kept, within):
    rule = GaLore(rank=48, largest_fraction=1.0, basis=kept)
    state = rule.init_state(torch.zeros(3, *shape))
    assert basis_of(rule, state).shape == (3, 48, min(shape))
    assert_orthonormal(basis_of(rule, state), within)
    low_rank = noise(3, shape[0], 2) @ noise(3, 2, shape[1], seed=1)
    one_entry, one_row = torch.zeros(3, *shape), torch.zeros(3, *shape)
    one_entry[:, 3, 5], one_row[:, 7] = 1.0, noise(shape[1])
    bad = noise(3, *shape)
    bad[1, 0, 0] = math.nan
    uneven = noise(3, *shape) * torch.logspace(0, -30, shape[1])
    everything = [low_rank, torch.zeros(3, *shape), noise(3, *shape), one_entry, bad, one_row, uneven,
                  low_rank * 1e-30, noise(3, *shape) * 1e-44, noise(3, *shape) * 1e30, low_rank.bfloat16()]  # fmt: skip
    for i, gradient in enumerate(everything):
        rule.refresh(gradient, state, slice(0, 3), i == 0)
        assert_orthonormal(basis_of(rule, state), within)


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("kept", [Float32(), Int8Blockwise()])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
def test_a_gradient_without_directions_changes_no_bit_of_its_matrix(inner, kept, bad):
    rule = GaLore(inner, rank=48, largest_fraction=1.0, basis=kept)
    state = after_steps(rule, (96, 128), number=3)
    before = copy_of(state)
    gradient = noise(2, 96, 128, seed=9)
    gradient[1] *= bad
    rule.refresh(gradient, state, slice(0, 2), False)
    for key, value in state.items():
        assert value.ndim == 0 or torch.equal(value[1:], before[key][1:]), key
    assert not torch.equal(basis_of(rule, state)[0], basis_of(rule, before)[0])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_basis_finds_the_strongest_left_directions(shape):
    rank, smaller = 16, min(shape)
    rule = GaLore(rank=rank)
    state = rule.init_state(torch.zeros(2, *shape))
    spectrum = torch.cat([torch.linspace(2, 1, rank), torch.linspace(0.25, 0.01, smaller - rank)]).double()
    made = []
    for i in range(2):
        left, right = (torch.linalg.qr(noise(n, smaller, seed=i).double()).Q for n in shape)
        made.append(left * spectrum @ right.T)
    angles = []
    for refresh in range(4):
        rule.refresh(torch.stack(made).float(), state, slice(0, 2), refresh == 0)
        for basis, gradient in zip(basis_of(rule, state).double(), made, strict=True):
            left, _, right = torch.linalg.svd(gradient)
            strongest = left[:, :rank] if shape[0] <= shape[1] else right[:rank].T
            # Sine of the largest angle between the two subspaces.
            angles.append(torch.linalg.matrix_norm(strongest - basis.T @ (basis @ strongest), 2).item())
    # Every iteration shrinks it by the gap squared, 1 / 16.
    assert max(angles[:2]) < 0.5 and max(angles[-2:]) < 1e-3, angles


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("inner", [Muon(), Muon(row_beta=0.9), AdamW()])
def test_averages_are_seen_in_the_new_basis_after_a_refresh(shape, inner):
    rule = GaLore(inner, rank=24, largest_fraction=1.0)
    state = after_steps(rule, shape)
    old, before = basis_of(rule, state).double().clone(), copy_of(state)
    rule.refresh(noise(1, *shape, seed=5), state, slice(1, 2), False)
    new = basis_of(rule, state).double()
    turn = new[1] @ old[1].T
    assert (turn.abs().amax() < 0.99) and torch.equal(new[0], old[0])
    name = "momentum" if isinstance(inner, Muon) else "first"
    # In full size: what was P R, seen in P'.
    expected = new[1] @ (old[1].T @ before[name][1].double())
    torch.testing.assert_close(state[name][1].double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(state[name][0], before[name][0])
    # Averages of squares as if rows did not covary.
    for key in {"second", "rows"} & state.keys():
        torch.testing.assert_close(state[key][1].double(), turn.square() @ before[key][1].double(), atol=1e-6, rtol=0)
        assert (state[key] >= 0).all() and torch.equal(state[key][0], before[key][0])
    assert ("rows" in state) == (inner == Muon(row_beta=0.9)) and ("second" in state) == isinstance(inner, AdamW)
    if isinstance(inner, AdamW):
        assert torch.equal(state["count"], before["count"])


@pytest.mark.parametrize("number, period", [(1, 7), (3, 200), (30, 200), (7, 7), (10, 4), (5, 1)])
def test_refreshes_are_spread_and_each_matrix_is_due_once_a_period(number, period):
    rule = GaLore(refresh_every=period)
    assert list(rule.due(number, 0)) == list(range(number))
    for start in (1, period, 5 * period + 3):
        due = [rule.due(number, step) for step in range(start, start + period)]
        assert sorted(itertools.chain(*due)) == list(range(number))
        assert max(map(len, due)) == math.ceil(number / period)


# Updates


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_at_full_rank_it_is_the_inner_muon(shape, nesterov):
    inner = Muon(lr=0.02, nesterov=nesterov, weight_decay=0.1)
    plain = train(inner, shape, 12)
    # Each basis moves several times, with the momentum in it.
    full = train(GaLore(inner, rank=10_000, largest_fraction=1.0, refresh_every=3), shape, 12)
    for a, b, start in zip(full, plain, train(inner, shape, 0), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        assert (a - start).abs().mean() > 0.02


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_short_sides_are_not_projected(inner):
    rule = GaLore(inner, rank=8, smallest=65, alpha=3.0)
    assert rule.rank_of(64, 160) is None and rule.rank_of(65, 160) == 8
    assert not rule.projects(rule.init_state(torch.zeros(1, 64, 160)))
    for a, b in zip(train(rule, (64, 160), 4), train(inner, (64, 160), 4), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_update_lies_in_the_basis_and_is_the_inner_rules_for_the_projection(inner, shape):
    rule = GaLore(inner, rank=48, largest_fraction=0.75)
    state = after_steps(rule, shape)
    inside = {k: v.clone() for k, v in state.items() if k.split(".")[0] not in ("left", "right")}
    gradient, basis = noise(2, *shape, seed=7), basis_of(rule, state).double()
    found = rule.direction(rule.project(gradient, state), state, ONE).double()
    short, found = (x if shape[0] <= shape[1] else x.mT for x in (gradient.double(), found))
    expected = basis.mT @ inner.direction((basis @ short).float(), inside, ONE).double()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(basis.mT @ (basis @ found), found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", ["moonlight", "none"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_scaled_update_has_the_root_mean_square_of_the_inner_muon(shape, scale):
    inner = Muon(lr=0.1, scale=scale)
    moved = {}
    for rule in (inner, GaLore(inner, rank=16), GaLore(inner, rank=16, alpha=0.5)):
        start, end = train(rule, shape, 0)[0], train(rule, shape, 1)[0]
        moved[rule] = (end - start).norm().item()
    plain, low, half = moved.values()
    assert low == pytest.approx(plain, rel=0.1) and half == pytest.approx(low / 2, rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_around_adamw_a_quarter_of_its_rate_is_taken(shape, alpha):
    """The first direction of Adam is of ones, and a basis leaves lengths as they are."""
    rule = GaLore(AdamW(lr=0.1), rank=16, alpha=alpha)
    for start, end in zip(train(rule, shape, 0), train(rule, shape, 1), strict=True):
        assert (end - start).norm().item() == pytest.approx(0.1 * 0.25 * alpha * (16 * max(shape)) ** 0.5, rel=1e-3)


def test_sum_of_projected_micro_batches_is_the_projection_of_their_sum():
    for shape in SHAPES.values():
        rule = GaLore(rank=16)
        state = after_steps(rule, shape)
        parts = [noise(2, *shape, seed=i) for i in range(5)]
        found = sum(rule.project(part, state) for part in parts)
        torch.testing.assert_close(found, rule.project(sum(parts), state), atol=1e-5, rtol=0)
        assert torch.equal(rule.project(parts[0][1:], state, slice(1, 2)), rule.project(parts[0], state)[1:])


# Sizes and refusals


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_state_is_what_the_live_tensors_hold(shape):
    short, long = min(shape), max(shape)
    for rank, fraction in ((16, 0.25), (1000, 0.5), (3, 1.0), (16, 0.001)):
        rule = GaLore(rank=rank, largest_fraction=fraction)
        r = max(1, min(rank, math.floor(fraction * short)))
        assert rule.rank_of(*shape) == r
        state = rule.init_state(torch.zeros(5, *shape))
        held = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in state.values()}.values())
        assert held == 5 * 4 * (r * long + r * short)


def test_state_in_8_bits_is_a_quarter():
    rule = GaLore(Muon(state=Int8Blockwise()), rank=128, basis=Int8Blockwise())
    state = rule.init_state(torch.zeros(2, 512, 1024))
    held = sum(t.untyped_storage().nbytes() for t in state.values())
    assert held == 2 * (128 * 1024 + 128 * 512) * (1 + 2 / 128)


@pytest.mark.parametrize(
    "values", [{"rank": 0}, {"refresh_every": 0}, {"smallest": 0}, {"largest_fraction": 0.0}, {"alpha": 0.0},
               {"largest_fraction": 1.5}, {"alpha": -1.0}, {"largest_fraction": math.nan}, {"alpha": math.nan},
               {"alpha": math.inf}]
)  # fmt: skip
def test_impossible_values_are_refused(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} = {next(iter(values.values()))}"):
        GaLore(**values)
