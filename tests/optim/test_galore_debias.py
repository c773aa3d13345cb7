"""GaLore's bias corrected: against a loop written by hand, and the mean over every draw that there is."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_optimizers import CPU, EIGHT, STEADY, assert_same, at, build, noise, random_gradients, snapshot, wide
from torch import nn
from torch._dynamo.testing import CompileCounter

from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.optimizer import Optimizer, apply_rule
from cggr_ray.optim.polar import orthogonalise

SHAPES = {"wide": (64, 160), "tall": (160, 64), "square": (96, 96)}
SMALL = {"rank": 48, "largest_fraction": 0.5, "refresh_every": 3, "full_rank": 0.5}
RULES = {
    "muon": GaLore(Muon(weight_decay=0.1), **SMALL),
    "normuon": GaLore(Muon(row_beta=0.9), **SMALL),
    "muon8": GaLore(Muon(state=EIGHT), basis=EIGHT, **SMALL),
}
ONE = torch.ones(())


def stacked(rule, shape, number):
    """An optimizer of one stack that clips nothing."""
    parameters = [nn.Parameter(noise(*shape, seed=100 + i)) for i in range(number)]
    names = [str(i) for i in range(number)]
    config = Optimizer(matrix=rule, schedule=STEADY, clip_norm=math.inf)
    optimizer = config.build(zip(names, parameters, strict=True), names, CPU)
    (stack,) = optimizer.stacks.values()
    return optimizer, stack


def step(optimizer, stack, number):
    gradients = noise(*stack.weights.shape, seed=number)
    for p, gradient in zip(stack.parameters, gradients, strict=True):
        p.grad = gradient.clone()
    optimizer.step(at(number))
    return gradients


def train(model, optimizer, steps):
    for number in steps:
        random_gradients(model, number)
        optimizer.step(at(number))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_several_periods_are_those_of_a_loop_written_by_hand(shape, nesterov):
    beta, lr, decay, alpha, rank, every, number = 0.9, 0.02, 0.1, 0.5, 16, 4, 5
    inner = Muon(lr=lr, momentum=beta, nesterov=nesterov, weight_decay=decay)
    rule = GaLore(inner, rank=rank, refresh_every=every, alpha=alpha, full_rank=0.4)
    optimizer, stack = stacked(rule, shape, number)
    short = (lambda x: x) if shape[0] <= shape[1] else (lambda x: x.mT)
    weights = [short(w) for w in stack.weights.double().unbind()]
    side, draws = "left" if shape[0] <= shape[1] else "right", []
    for now in range(4 * every):
        old = stack.state[side].double()
        gradients = short(step(optimizer, stack, now).double())
        bases = stack.state[side].double()
        if now % every == 0:
            drawn, momenta = set(stack.state["drawn"].tolist()), [0.0] * number
            draws.append(drawn)
        assert set(stack.state["drawn"].tolist()) == drawn and len(drawn) == 2
        for i, (g, p) in enumerate(zip(gradients, bases, strict=True)):
            full = i in drawn
            if not full and now % every:
                momenta[i] = p @ old[i].T @ momenta[i]
            entering = (g - p.T @ (p @ g)) / 0.4 if full else p @ g / 0.6
            momenta[i] = beta * momenta[i] + (1 - beta) * entering
            update = beta * momenta[i] + (1 - beta) * entering if nesterov else momenta[i]
            found = orthogonalise(update[None], "polar_express")[0].double()
            found = found - p.T @ (p @ found) if full else found
            scale = 0.2 * max(shape) ** 0.5 * (1 if full else alpha * (min(shape) / rank) ** 0.5)
            weights[i] = (1 - lr * decay) * weights[i] - lr * scale * (found if full else p.T @ found)
        torch.testing.assert_close(short(stack.weights.double()), torch.stack(weights), atol=2e-4, rtol=0)
    assert len({*map(frozenset, draws)}) > 1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("number, full_rank", [(4, 0.5), (5, 0.2), (2, 0.9), (3, 0.01)])
def test_mean_over_all_draws_of_what_enters_is_the_gradient(shape, number, full_rank):
    # Without memory a momentum is what entered last.
    rule = GaLore(Muon(momentum=0.0), rank=24, largest_fraction=1.0, full_rank=full_rank)
    state, gradients = rule.init_state(torch.zeros(number, *shape)), noise(number, *shape)
    rule.refresh(noise(number, *shape, seed=1), state, slice(0, number), True)
    side, short = ("left", gradients) if shape[0] <= shape[1] else ("right", gradients.mT)
    draws = [torch.tensor(d) for d in itertools.combinations(range(number), rule.num_drawn(number))]
    total = torch.zeros_like(short, dtype=torch.float64)
    for drawn in draws:
        state["drawn"].copy_(drawn)
        rule.direction(rule.project(gradients, state), state, ONE)
        entered = state[side].double().mT @ state["momentum"].double()
        full = state["full_momentum"].double()
        entered[drawn] = full if side == "left" else full.mT
        total += entered
    torch.testing.assert_close(total / len(draws), short.double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_learns_at_full_rank_stays_outside_of_its_basis(shape):
    rule = GaLore(Muon(), rank=24, largest_fraction=1.0, full_rank=0.5)
    state, side = rule.init_state(torch.zeros(2, *shape)), "left" if shape[0] <= shape[1] else "right"
    for seed in range(3):
        # The basis moves, and the momentum has a part of it from before.
        rule.refresh(noise(2, *shape, seed=seed), state, slice(0, 2), True)
        found = rule.direction(rule.project(noise(2, *shape, seed=9 + seed), state), state, ONE)
        drawn = state["drawn"].item()
        short = found[drawn] if side == "left" else found[drawn].mT
        assert (state[side][drawn] @ short).norm() < 1e-5 * short.norm() and short.norm() > 1


def drawn_in(rule, number, name, period):
    state = rule.init_state(torch.zeros(number, 64, 64))
    rule.begin(state, number, period * rule.refresh_every, name)
    return tuple(state["drawn"].tolist())


def test_draws_are_uniform_and_differ_between_periods_and_stacks():
    rule, number, periods = GaLore(rank=1, refresh_every=3, full_rank=0.3), 5, 4000
    draws = {name: [drawn_in(rule, number, name, p) for p in range(periods)] for name in ("matrix.a", "matrix.a.1")}
    for found in draws.values():
        counts = Counter(map(frozenset, found))
        assert len(counts) == 10 and all(len(pair) == 2 for pair in counts)
        # Chi-squared with 9 degrees of freedom, which exceeds 27.9 once in a thousand.
        assert sum((count - periods / 10) ** 2 / (periods / 10) for count in counts.values()) < 27.9
        # Nothing of a draw is in the next.
        repeated = sum(set(a) == set(b) for a, b in itertools.pairwise(found))
        assert abs(repeated / periods - 0.1) < 0.02
    equal = sum(set(a) == set(b) for a, b in zip(*draws.values(), strict=True))
    assert abs(equal / periods - 0.1) < 0.02
    assert draws["matrix.a"][:50] == [drawn_in(rule, number, "matrix.a", p) for p in range(50)]


@pytest.mark.parametrize("full_rank, number, drawn", [(0.0, 8, 0), (0.25, 8, 2), (0.01, 8, 1), (0.99, 8, 7),
                                                      (0.5, 1, 0), (0.25, 2, 1), (0.9, 2, 1)])  # fmt: skip
def test_at_least_one_is_drawn_and_one_is_not(full_rank, number, drawn):
    assert GaLore(full_rank=full_rank).num_drawn(number) == drawn


@pytest.mark.parametrize("number, shape, full_rank", [(1, (64, 160), 0.5), (3, (32, 160), 0.5)])
def test_a_stack_of_one_and_one_that_is_not_projected_are_left_as_they_are(number, shape, full_rank):
    plain = GaLore(Muon(), refresh_every=3)
    found = []
    for rule in (plain, replace(plain, full_rank=full_rank)):
        optimizer, stack = stacked(rule, shape, number)
        assert stack.state.keys() <= {"momentum", "left"}
        for now in range(7):
            step(optimizer, stack, now)
        found.append(snapshot(optimizer))
    assert_same(*found)


def test_all_averages_begin_at_zero_with_a_period():
    optimizer, stack = stacked(RULES["normuon"], (96, 128), 4)
    for now in range(6):
        before = {key: value.clone() for key, value in stack.state.items()}
        optimizer.begin(at(now))
        averages = [key for key in stack.state if key not in ("left", "drawn")]
        assert sorted(averages) == ["full_momentum", "full_rows", "momentum", "rows"]
        for key in averages:
            assert not stack.state[key].any() if now % 3 == 0 else torch.equal(stack.state[key], before[key])
        assert torch.equal(stack.state["left"], before["left"])
        step(optimizer, stack, now)
        assert all(stack.state[key].any() for key in averages)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_step_that_is_not_finite_changes_no_bit_within_a_period(rule):
    model, twin = wide(), wide()
    hurt, clean = (build(m, Optimizer(matrix=rule, schedule=STEADY)) for m in (model, twin))
    for each, optimizer in ((model, hurt), (twin, clean)):
        train(each, optimizer, range(2))
    before = snapshot(hurt)
    for number in (2, 3):
        random_gradients(model, 50)
        for p in model.parameters():
            # Of such a gradient no basis takes anything either.
            p.grad.fill_(math.nan)
        assert not hurt.step(at(number)).isfinite()
        if number == 2:
            assert_same(snapshot(hurt), before)
    # A period begins all the same when it is due.
    clean.begin(at(3))
    assert_same(snapshot(hurt), snapshot(clean))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("broken_at", [3, 4])
def test_save_and_load_in_the_middle_changes_no_bit(rule, broken_at):
    config = Optimizer(matrix=rule, schedule=STEADY)
    models = [wide(), wide(), wide()]
    straight, first, second = (build(model, config) for model in models)
    train(models[0], straight, range(8))
    train(models[1], first, range(broken_at))
    state = {key: value.clone() for key, value in first.state_dict().items()}
    assert any(key.endswith("drawn") for key in state)
    models[2].load_state_dict(models[1].state_dict())
    second.load_state_dict(state)
    train(models[2], second, range(broken_at, 8))
    assert_same(snapshot(second), snapshot(straight))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_costs_a_momentum_in_full_size_of_the_drawn(shape):
    values, block = 2 * shape[0] * shape[1], {160: 80, 96: 96, 64: 64}[shape[1]]
    for inner, extra in ((Muon(), 4 * values), (Muon(state=EIGHT), values + 2 * values // block)):
        states = [GaLore(inner, full_rank=q).init_state(torch.zeros(5, *shape)) for q in (0.0, 0.4)]
        without, corrected = (sum(t.untyped_storage().nbytes() for t in state.values()) for state in states)
        # And two indices.
        assert corrected - without == extra + 2 * 8


def test_periods_share_one_graph():
    graphs = CompileCounter()
    apply = torch.compile(apply_rule, backend=graphs, dynamic=False, fullgraph=True)
    found, draws = [], set()
    for compiled in (False, True):
        optimizer, stack = stacked(RULES["muon8"], (96, 128), 5)
        if compiled:
            optimizer._apply = apply
        for now in range(9):
            step(optimizer, stack, now)
            draws.add(tuple(stack.state["drawn"].tolist()))
        found.append(snapshot(optimizer))
    assert_same(*found)
    assert graphs.frame_count == 1 and len(draws) == 3


def test_8_bits_follow_float32():
    found = []
    for inner in (Muon(), Muon(state=EIGHT)):
        optimizer, stack = stacked(GaLore(inner, **SMALL), (96, 128), 4)
        start = stack.weights.clone()
        for now in range(8):
            step(optimizer, stack, now)
        found.append(stack.weights - start)
    assert stack.state["full_momentum.codes"].dtype == torch.int8
    assert (found[1] - found[0]).norm() < 0.1 * found[0].norm()


@pytest.mark.parametrize("full_rank", [-0.1, 1.0, math.nan])
def test_a_part_that_is_none_is_refused(full_rank):
    with pytest.raises(ValueError, match=f"full_rank = {full_rank}; accepted"):
        GaLore(full_rank=full_rank)


def test_what_cannot_be_corrected_is_refused():
    with pytest.raises(ValueError, match=r"full_rank = 0\.5 around AdamW; accepted: around Muon"):
        GaLore(AdamW(), full_rank=0.5)
    with pytest.raises(ValueError, match=r"project_early with full_rank = 0\.5"):
        Optimizer(matrix=GaLore(full_rank=0.5), project_early=True)
    Optimizer(matrix=GaLore(AdamW()), project_early=True)
