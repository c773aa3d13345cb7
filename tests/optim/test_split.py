"""Fused projections: against rules that are given the three by hand, and against the polar factor of each."""

import copy
import math

import pytest
import torch
from polar_oracle import cosine, with_spectrum
from small_models import small_model
from small_optimizers import CPU, EIGHT, EIGHT_ADAMW, OPTIMIZERS, STEADY, assert_same, at, random_gradients, snapshot
from torch import nn

from cggr_ray import MatrixOptimizer
from cggr_ray.models.adapter import Adapter
from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.optimizer import Optimizer
from cggr_ray.optim.split import Split, is_fused, split
from cggr_ray.workers import Workers

HALF = {"rank": 48, "largest_fraction": 0.5, "refresh_every": 1}
RULES = {
    "muon": Muon(),
    "normuon8": Muon(row_beta=0.95, state=EIGHT),
    "galore": GaLore(Muon(), **HALF),
    "galore8": GaLore(EIGHT_ADAMW, **HALF, basis=EIGHT),
    "galore_debiased": GaLore(Muon(), **HALF, full_rank=0.4),
    "too_small": GaLore(Muon(state=EIGHT), rank=4, smallest=200),
}
ALL_RULES = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
ROWS = pytest.mark.parametrize("rows", [True, False])
CLIPS_NOTHING = {"schedule": STEADY, "clip_norm": math.inf}


def thirds(x, rows):
    """Queries, keys and values of each matrix of a stack, one after the other."""
    size = min(x.shape[1:])
    spans = [slice(at, at + size) for at in (0, size, 2 * size)]
    return torch.stack([one[span] if rows else one[:, span] for one in x for span in spans])


def gradient_of(seed, rows, number=2, size=96):
    # Thirds of very different sizes, so that what is done to all of them at once shows.
    columns = torch.tensor([1.0, 30.0, 0.03]).repeat_interleave(size)
    wide = torch.randn(number, size, 3 * size, generator=torch.Generator().manual_seed(seed)) * columns
    return wide.mT.contiguous() if rows else wide


@ROWS
@ALL_RULES
def test_directions_are_those_of_the_three(rule, rows):
    fused = split(rule, (288, 96) if rows else (96, 288))
    assert isinstance(fused, Split) and fused.rows is rows
    state, apart = fused.init_state(gradient_of(0, rows)), rule.init_state(thirds(gradient_of(0, rows), rows))
    for step in range(4):
        gradient = gradient_of(step, rows)
        fused.begin(state, 2, step, "name")
        rule.begin(apart, 6, step, "name")
        found, expected = gradient, thirds(gradient, rows)
        assert fused.projects(state) is rule.projects(apart)
        if rule.projects(apart):
            for i in fused.due(2, step):
                fused.refresh(gradient[i : i + 1], state, slice(i, i + 1), step == 0)
            rule.refresh(expected, apart, slice(0, 6), step == 0)
            found, expected = fused.project(found, state), rule.project(expected, apart)
            torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
        direction = fused.direction(found, state, torch.ones(()))
        assert direction.shape == gradient.shape
        for one, other in zip(thirds(direction, rows), rule.direction(expected, apart, torch.ones(())), strict=True):
            assert cosine(one, other) > 0.9999 and one.norm().item() == pytest.approx(other.norm().item(), rel=1e-3)
    assert sum(t.numel() * t.element_size() for t in state.values()) == sum(
        t.numel() * t.element_size() for t in apart.values()
    )


@ROWS
def test_scale_is_that_of_a_third(rows):
    shape = (48, 16) if rows else (16, 48)
    assert split(Muon(), shape).shape_scale(*shape) == pytest.approx(0.2 * 4)
    assert split(Muon(scale="keller"), shape).shape_scale(*shape) == 1.0
    assert split(AdamW(), shape) == AdamW()


@pytest.mark.parametrize("shape, fused", [((8, 24), True), ((24, 8), True), ((8, 16), False), ((24,), False)])
def test_three_square_ones_can_be_told_by_their_shape(shape, fused):
    assert is_fused(torch.Size(shape)) is fused


def gpt2_optimizer(config, model):
    adapter = Adapter(model)
    return config.build(adapter.named_parameters(), adapter.hidden_names(), CPU, fused=adapter.fused_names())


def test_queries_keys_and_values_of_gpt2_each_move_by_their_polar_factor():
    model = small_model("gpt2")
    optimizer = gpt2_optimizer(Optimizer(matrix=Muon(lr=0.5), **CLIPS_NOTHING), model)
    assert {name for name in optimizer.stacks if name.startswith("fused.")} == {"fused.32x96"}
    weights = [layer.attn.c_attn.weight for layer in model.transformer.h]
    before, polar = [w.detach().clone() for w in weights], []
    random_gradients(model, 3)
    spectrum = torch.linspace(1, 0.2, 32, dtype=torch.float64)
    for i, weight in enumerate(weights):
        parts = [with_spectrum(32, 32, spectrum, seed=10 * i + j) for j in range(3)]
        # Values as large as they are beside small queries.
        weight.grad = torch.cat([size * g for size, (g, _) in zip((1e-3, 1.0, 1e3), parts, strict=True)], 1).float()
        polar.append(torch.cat([q for _, q in parts], 1))
    optimizer.step(at())
    for weight, old, expected in zip(weights, before, polar, strict=True):
        moved = (old - weight.detach()).double() / (0.5 * 0.2 * 32**0.5)
        for j in range(3):
            span = slice(32 * j, 32 * (j + 1))
            assert cosine(moved[:, span], expected[:, span]) > 0.99
            assert moved[:, span].norm() == pytest.approx(32**0.5, rel=0.1)


GPT2_CONFIGS = {
    **OPTIMIZERS,
    "galore_fused": Optimizer(matrix=GaLore(Muon(), rank=4, refresh_every=3, smallest=8), schedule=STEADY),
    "galore_early": Optimizer(
        matrix=GaLore(Muon(state=EIGHT), rank=4, refresh_every=3, smallest=8), project_early=True, schedule=STEADY
    ),
}


@pytest.mark.parametrize("config", GPT2_CONFIGS.values(), ids=GPT2_CONFIGS)
def test_what_is_saved_goes_on_to_the_bit(config):
    models = [small_model("gpt2") for _ in range(2)]
    optimizers = [gpt2_optimizer(config, model) for model in models]

    def train(which, steps):
        for step in steps:
            optimizers[which].begin(at(step))
            for micro in range(2):
                tokens = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(10 * step + micro))
                models[which](tokens, labels=tokens).loss.backward()
                optimizers[which].accumulate()
            optimizers[which].step(at(step))

    train(0, range(5))
    saved = {key: value.clone() for key, value in optimizers[0].state_dict().items()}
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(saved)
    # The layer between rests from now on: those that learn are no neighbours.
    for model in models:
        model.transformer.h[1].requires_grad_(False)
    for which in range(2):
        train(which, range(5, 8))
    assert_same(snapshot(optimizers[0]), snapshot(optimizers[1]))
    assert all(t.isfinite().all() for t in snapshot(optimizers[0]).values())


class Recorded(Workers):
    def __init__(self):
        self.shapes = []

    def share(self, find, stack_N):
        self.shapes.append(tuple(stack_N.shape))
        return find(stack_N)


def test_workers_share_the_thirds():
    rule, workers = split(Muon(), (16, 48)), Recorded()
    gradient = torch.randn(2, 16, 48)
    rule.direction(gradient, rule.init_state(gradient), torch.ones(()), workers)
    assert workers.shapes == [(6, 16, 16)]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(16, 48)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()


def test_the_optimizer_for_other_loops_knows_them_too():
    ours = small_model("gpt2")
    optimizer = MatrixOptimizer(ours, Muon(lr=0.5), clip_norm=math.inf)
    adapted = small_model("gpt2")
    expected = gpt2_optimizer(Optimizer(matrix=Muon(lr=0.5), **CLIPS_NOTHING), adapted)
    for model in (ours, adapted):
        random_gradients(model, 1)
    optimizer.step()
    expected.step(at())
    assert_same(dict(ours.named_parameters()), dict(adapted.named_parameters()))
    both = copy.deepcopy((ours, optimizer))
    for model in (ours, both[0]):
        random_gradients(model, 2)
    optimizer.step()
    both[1].step()
    assert_same(dict(ours.named_parameters()), dict(both[0].named_parameters()))


def test_rows_of_a_linear_layer_called_so_are_three_as_well():
    model = nn.ModuleList([Block()])
    weight = model[0].attn.c_attn.weight
    before = weight.detach().clone()
    random_gradients(model, 1)
    gradient = weight.grad.clone()
    MatrixOptimizer(model, Muon(lr=1.0, scale="none")).step()
    for span in (slice(0, 16), slice(16, 32), slice(32, 48)):
        u, _, v = torch.linalg.svd(gradient[span].double())
        assert cosine(before[span] - weight[span].detach(), u @ v) > 0.98
