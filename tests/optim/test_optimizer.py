"""The optimizer around the rules: partition, clipping, bad gradients, accumulation, resume, decay, stacks."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from small_optimizers import (
    CPU,
    OPTIMIZERS,
    PROJECTIONS,
    STEADY,
    Plain,
    assert_same,
    at,
    build,
    llama,
    random_gradients,
    snapshot,
    wide,
)
from torch import nn

from cggr_ray.optim import stack as stack_module
from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.optimizer import Optimizer
from cggr_ray.optim.partition import by_shape, partition
from cggr_ray.optim.schedules import Linear

ALL_NEW = pytest.mark.parametrize("config", OPTIMIZERS.values(), ids=OPTIMIZERS)


# Partition


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_every_parameter_is_in_exactly_one_group(tied, biases):
    model = llama(tied, attention_bias=biases, mlp_bias=biases)
    optimizer = build(model, Optimizer())
    groups = {id(p): name for name, s in optimizer.stacks.items() for p in s.parameters}
    assert sum(len(s.parameters) for s in optimizer.stacks.values()) == len(groups) == len(list(model.parameters()))
    matrices = {n for n, p in model.named_parameters() if groups[id(p)].startswith("matrix.")}
    assert matrices == {f"model.layers.{i}.{name}.weight" for i in range(2) for name in PROJECTIONS}
    for name, p in model.named_parameters():
        if name not in matrices:
            assert groups[id(p)].startswith("rest."), name
    rules = {type(s.rule) for n, s in optimizer.stacks.items() if n.startswith("matrix.")}
    assert rules == {Muon} and all(type(s.rule) is AdamW for n, s in optimizer.stacks.items() if n.startswith("rest."))


def test_partition_refuses_a_parameter_under_two_names():
    p, q = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="in two groups"):
        partition([("a", p), ("b", q), ("c", p)], ["a"])
    with pytest.raises(AssertionError, match="ghost"):
        partition([("a", p)], ["a", "ghost"])


def test_by_shape_keeps_the_order_and_tells_transposes_apart():
    named = [(str(i), nn.Parameter(torch.zeros(shape))) for i, shape in enumerate([(2, 3), (3, 2), (2, 3), (6,)])]
    found = {shape: [name for name, _ in members] for shape, members in by_shape(named).items()}
    assert found == {(2, 3): ["0", "2"], (3, 2): ["1"], (6,): ["3"]}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacking_changes_no_weight_and_updates_reach_the_model(tied, dtype):
    model = llama(tied, dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build(model, Optimizer(schedule=STEADY))
    assert_same(before, dict(model.named_parameters()))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    tokens = torch.arange(12).view(2, 6)
    logits = model(tokens).logits.detach()
    random_gradients(model, seed=1)
    optimizer.step(at())
    assert not torch.equal(model(tokens).logits, logits)
    assert all(p.grad is None for p in model.parameters())
    for stack in optimizer.stacks.values():
        for p, master in zip(stack.parameters, stack.master, strict=True):
            assert torch.equal(p, master.to(dtype))


# Clipping


@pytest.mark.parametrize("clip_norm", [0.1, 1.0, 1e9, math.inf])
@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
def test_clipping_is_that_of_torch(clip_norm, factor):
    mine, theirs = llama(), llama()
    optimizer = build(mine, Optimizer(matrix=Plain(0.5), rest=Plain(0.25), schedule=STEADY, clip_norm=clip_norm))
    start = [p.detach().clone() for p in mine.parameters()]
    random_gradients(mine, 2, factor)
    random_gradients(theirs, 2, factor)
    norm = optimizer.step(at())
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for (name, p), w, q in zip(mine.named_parameters(), start, theirs.parameters(), strict=True):
        lr = 0.5 if name.startswith("model.layers") and p.ndim == 2 else 0.25
        step = q.grad * lr
        torch.testing.assert_close(p.detach(), w - step, rtol=1e-6, atol=1e-6 * max(1, step.abs().max().item()))


# Gradients that are not finite


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("good_steps", [0, 2])
def test_a_step_that_is_not_finite_never_happened(value, dtype, good_steps):
    config = Optimizer(matrix=Muon(weight_decay=0.1), rest=AdamW(weight_decay=0.1), schedule=STEADY)
    victim, twin = llama(dtype=dtype), llama(dtype=dtype)
    hurt, clean = build(victim, config), build(twin, config)
    for step in range(good_steps):
        for model, optimizer in ((victim, hurt), (twin, clean)):
            random_gradients(model, step)
            optimizer.step(at(step))
    before = snapshot(hurt)
    random_gradients(victim, 50)
    # 3e38 is finite, but not the sum of its squares.
    list(victim.parameters())[3].grad[0, 1] = value
    assert not hurt.step(at(good_steps)).isfinite()
    assert_same(snapshot(hurt), before)
    assert all(p.grad is None for p in victim.parameters())
    for model, optimizer in ((victim, hurt), (twin, clean)):
        random_gradients(model, 60)
        assert optimizer.step(at(good_steps)).isfinite()
    assert_same(snapshot(hurt), snapshot(clean))


@ALL_NEW
def test_a_step_that_is_not_finite_changes_no_bit_of_any_state(config):
    model = wide()
    optimizer = build(model, config)
    for step in range(2):
        random_gradients(model, step)
        optimizer.step(at(step))
    before = snapshot(optimizer)
    random_gradients(model, 50)
    model.model.layers[1].mlp.up_proj.weight.grad[0, 1] = math.nan
    assert not optimizer.step(at(2)).isfinite()
    assert_same(snapshot(optimizer), before)
    random_gradients(model, 51)
    optimizer.step(at(3))
    assert all(t.isfinite().all() for t in snapshot(optimizer).values())


def test_one_bad_micro_batch_spoils_its_step_alone():
    victim, twin = llama(), llama()
    hurt, clean = build(victim, Optimizer(schedule=STEADY)), build(twin, Optimizer(schedule=STEADY))
    hurt.begin(at())
    for micro in range(3):
        random_gradients(victim, micro)
        if micro == 1:
            victim.model.norm.weight.grad[0] = math.nan
        hurt.accumulate()
    hurt.step(at())
    for model, optimizer in ((victim, hurt), (twin, clean)):
        optimizer.begin(at(1))
        for micro in range(2):
            random_gradients(model, 10 + micro)
            optimizer.accumulate()
        optimizer.step(at(1))
    assert_same(snapshot(hurt), snapshot(clean))


# Accumulation


@pytest.mark.parametrize("splits", [(12,), (5, 7), (1, 3, 2, 6)])
def test_micro_batches_sum_to_the_gradient_of_one_batch(splits):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(12, 6, generator=generator), torch.randn(12, 4, generator=generator)
    layer = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    truth = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    truth.load_state_dict(layer.state_dict())
    (truth(x.double()) - y.double()).square().sum().backward()
    start = [p.detach().double().clone() for p in layer.parameters()]
    config = Optimizer(matrix=Plain(), rest=Plain(), schedule=STEADY, clip_norm=math.inf)
    optimizer = config.build(layer.named_parameters(), ["0.weight"], CPU)
    optimizer.begin(at())
    for part_x, part_y in zip(x.split(splits), y.split(splits), strict=True):
        (layer(part_x) - part_y).square().sum().backward()
        optimizer.accumulate()
    optimizer.step(at())
    for w, p, q in zip(start, layer.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(w - p.detach().double(), q.grad, rtol=1e-6, atol=1e-6 * q.grad.abs().max().item())


@pytest.mark.parametrize("copies", [1, 3])
def test_bf16_gradients_are_summed_in_float32(copies):
    parameters = [nn.Parameter(torch.zeros(7, 5, dtype=torch.bfloat16)) for _ in range(copies)]
    named = [(str(i), p) for i, p in enumerate(parameters)]
    optimizer = Optimizer(matrix=Plain(), rest=Plain()).build(named, [], CPU)
    (stack,) = optimizer.stacks.values()
    generator = torch.Generator().manual_seed(4)
    total = torch.zeros(copies, 7, 5, dtype=torch.float64)
    optimizer.begin(at())
    for _ in range(40):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(7, 5, generator=generator).add(1).bfloat16()
            total[i] += p.grad.double()
        optimizer.accumulate()
    found = stack.gradient()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), total, rtol=1e-6, atol=1e-5)


def test_a_missing_gradient_is_noticed():
    model = llama()
    optimizer = build(model, Optimizer())
    random_gradients(model, 0)
    model.model.layers[1].mlp.up_proj.weight.grad = None
    with pytest.raises(AssertionError, match="no gradient"):
        optimizer.step(at())


# Resume


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [Optimizer(), Optimizer(matrix=AdamW(), schedule=Linear()), Optimizer(clip_norm=50)])
def test_save_and_load_in_the_middle_changes_no_bit(dtype, config, make=llama):
    def train(model, optimizer, steps):
        for step in steps:
            random_gradients(model, step)
            optimizer.step(at(step, fraction=step / 8, tokens=(step + 1) * 300_000))

    straight = make(dtype=dtype)
    uninterrupted = build(straight, config)
    train(straight, uninterrupted, range(8))

    first = make(dtype=dtype)
    optimizer = build(first, config)
    train(first, optimizer, range(4))
    weights = {n: p.detach().clone() for n, p in first.named_parameters()}
    state = {n: t.clone() for n, t in optimizer.state_dict().items()}

    second = make(dtype=dtype)
    for p in second.parameters():
        p.data.normal_()
    resumed = build(second, config)
    with torch.no_grad():
        for name, p in second.named_parameters():
            p.copy_(weights[name])
    resumed.load_state_dict(state)
    train(second, resumed, range(4, 8))
    assert_same(snapshot(resumed), snapshot(uninterrupted))
    assert_same(dict(second.named_parameters()), dict(straight.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ALL_NEW
def test_save_and_load_in_the_middle_changes_no_bit_of_any_state(dtype, config):
    if isinstance(config.matrix, GaLore):
        # Some bases move before the break and some after.
        config = replace(config, matrix=replace(config.matrix, refresh_every=3))
    state = build(wide(dtype), config).state_dict()
    assert {t.dtype for t in state.values()} <= {torch.float32, torch.bfloat16, torch.int8, torch.uint8}
    assert any(t.dtype == torch.int8 for t in state.values()) == ("Int8" in str(config))
    test_save_and_load_in_the_middle_changes_no_bit(dtype, config, wide)


def test_state_of_another_optimizer_is_refused():
    muon, adamw = build(llama(), Optimizer()), build(llama(), Optimizer(matrix=AdamW()))
    with pytest.raises(ValueError, match=r"without \['matrix.16x16.count', .*'matrix.16x16.momentum'"):
        adamw.load_state_dict(muon.state_dict())


def test_state_of_a_model_of_another_depth_is_refused():
    """One row of a stack would be copied to all of them, unnoticed."""
    one, two = (build(llama(num_hidden_layers=layers), Optimizer()) for layers in (1, 2))
    state = {key: value[:1] if key.startswith("matrix.") else value for key, value in two.state_dict().items()}
    assert one.state_dict().keys() == state.keys()
    with pytest.raises(ValueError, match=r"'matrix.16x16.awake' of shape \(1, 1, 1\); accepted: \(4, 1, 1\)"):
        two.load_state_dict(state)


def test_a_scale_of_the_rates_scales_both():
    models = [llama(), llama()]
    rules = {"schedule": STEADY, "clip_norm": math.inf}
    configs = [Optimizer(Plain(0.5), Plain(0.25), lr_scale=3.0, **rules), Optimizer(Plain(1.5), Plain(0.75), **rules)]
    for model, config in zip(models, configs, strict=True):
        random_gradients(model, 4)
        optimizer = build(model, config)
        optimizer.step(at())
        assert optimizer.learning_rate(at()) == 1.5
    assert_same(*(dict(model.named_parameters()) for model in models))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Muon(lr=1e300),
        lambda: AdamW(lr=1e39),
        lambda: AdamW(weight_decay=1e300),
        lambda: Muon(weight_decay=1e39),
        lambda: Optimizer(matrix=Muon(lr=1e30), lr_scale=1e10),
        lambda: Optimizer(rest=AdamW(lr=1.0), lr_scale=1e300),
    ],
)
def test_rates_that_float32_has_not_are_refused(make):
    with pytest.raises(ValueError, match=r"(1e\+30|1e\+39|lr_scale = 1e\+300|300).*accepted: .*3\.4e\+38"):
        make()


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_of_the_rates_must_be_positive(scale):
    with pytest.raises(ValueError, match=f"lr_scale = {scale}"):
        Optimizer(lr_scale=scale)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan])
def test_clip_norm_must_be_positive(clip_norm):
    with pytest.raises(ValueError, match=f"clip_norm = {clip_norm}"):
        Optimizer(clip_norm=clip_norm)


# Decay and stacks


@pytest.mark.parametrize("rule", [Muon, AdamW, lambda **values: GaLore(Muon(**values), rank=4, smallest=8)])
def test_cautious_decay_touches_what_the_update_shrinks(rule):
    lr, decay, generator = 0.05, 0.8, torch.Generator().manual_seed(6)
    start = torch.randn(16, 24, generator=generator)
    gradients = [torch.randn(16, 24, generator=generator) for _ in range(4)]
    runs = []
    for values in ({}, {"weight_decay": decay, "cautious": True}, {"weight_decay": decay}):
        p = nn.Parameter(start.clone())
        config = Optimizer(matrix=rule(lr=lr, **values), schedule=STEADY, clip_norm=math.inf)
        optimizer, seen = config.build([("p", p)], ["p"], CPU), [start]
        for step, gradient in enumerate(gradients):
            p.grad = gradient.clone()
            optimizer.step(at(step))
            seen.append(p.detach().clone())
        runs.append(seen)
    undecayed, cautious, everywhere = runs
    touched = 0
    for step in range(4):
        for i, j in itertools.product(range(16), range(24)):
            moved = (undecayed[step + 1][i, j] - undecayed[step][i, j]).item()
            weight = cautious[step][i, j].item()
            # Only where the update, minus the direction, and the weight differ in sign does decay add to it.
            expected = weight * (1 - lr * decay) + moved if moved * weight < 0 else weight + moved
            assert cautious[step + 1][i, j].item() == pytest.approx(expected, abs=2e-6)
            touched += moved * weight < 0
    assert 0.3 < touched / (4 * 16 * 24) < 0.7
    torch.testing.assert_close(everywhere[1], start * (1 - lr * decay) + undecayed[1] - start, atol=2e-6, rtol=0)


@ALL_NEW
@pytest.mark.parametrize("most, stacks", [(2 * 96 * 96, {"96x96": 2, "128x96": 4, "96x128": 2, "48x96": 1}),
                                          (1, {"96x96": 4, "128x96": 4, "96x128": 2, "48x96": 4})])  # fmt: skip
def test_smaller_stacks_make_the_same_updates(config, most, stacks, monkeypatch):
    whole = wide()
    unsplit = build(whole, config)
    monkeypatch.setattr(stack_module, "LARGEST_STACK", most)
    parted = wide()
    split = build(parted, config)
    for shape, number in stacks.items():
        assert sum(name.startswith(f"matrix.{shape}") for name in split.stacks) == number
        assert sum(name.startswith(f"matrix.{shape}") for name in unsplit.stacks) == 1
    start = {n: p.detach().clone() for n, p in whole.named_parameters()}
    for step in range(3):
        norms = []
        for model, optimizer in ((whole, unsplit), (parted, split)):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            norms.append(optimizer.step(at(step)))
        torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
    for (name, p), q in zip(whole.named_parameters(), parted.parameters(), strict=True):
        torch.testing.assert_close(q, p, atol=1e-6, rtol=0, msg=name)
        assert not torch.equal(p, start[name])
    loaded = build(wide(), config)
    loaded.load_state_dict(split.state_dict())
    assert_same(loaded.state_dict(), split.state_dict())
