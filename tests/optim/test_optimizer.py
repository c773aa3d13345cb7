"""The optimizer around the rules: partition, clipping, bad gradients, accumulation, resume, schedules."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cggr_ray.models.adapter import Adapter
from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.optimizer import Optimizer
from cggr_ray.optim.partition import by_shape, partition
from cggr_ray.optim.schedules import WSD, Linear
from cggr_ray.progress import Progress

CPU = torch.device("cpu")
STEADY = Linear(warmup_tokens=0, floor=1.0)
PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip


def at(step=0, fraction=0.0, tokens=1):
    return Progress(step, train_seconds=100 * fraction, budget_seconds=100.0, tokens_seen=tokens)


@dataclass(frozen=True)
class Plain:
    """Gradient descent: makes what the optimizer does around a rule visible."""

    lr: float = 1.0
    weight_decay: float = 0.0

    def init_state(self, weights):
        return {}

    def direction(self, grad, state, finite):
        return grad

    def shape_scale(self, rows, columns):
        return 1.0


def llama(tied=True, dtype=torch.float32, **values):
    # A vocabulary as large as the width: the embedding has the shape of a hidden matrix.
    small = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "use_cache": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(small | heads | {"tie_word_embeddings": tied} | values))).to(dtype)


def build(model, config):
    adapter = Adapter(model)
    return config.build(adapter.named_parameters(), adapter.hidden_names(), CPU)


def random_gradients(model, seed, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.grad = ((noise + 0.1 * p.detach().float()) * factor).to(p.dtype)


def snapshot(optimizer):
    return {f"{n}.{k}": t.clone() for n, s in optimizer.stacks.items() for k, t in s.tensors().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


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


def test_one_bad_micro_batch_spoils_its_step_alone():
    victim, twin = llama(), llama()
    hurt, clean = build(victim, Optimizer(schedule=STEADY)), build(twin, Optimizer(schedule=STEADY))
    for micro in range(3):
        random_gradients(victim, micro)
        if micro == 1:
            victim.model.norm.weight.grad[0] = math.nan
        hurt.accumulate()
    hurt.step(at())
    for model, optimizer in ((victim, hurt), (twin, clean)):
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
def test_save_and_load_in_the_middle_changes_no_bit(dtype, config):
    def train(model, optimizer, steps):
        for step in steps:
            random_gradients(model, step)
            optimizer.step(at(step, fraction=step / 8, tokens=(step + 1) * 300_000))

    straight = llama(dtype=dtype)
    uninterrupted = build(straight, config)
    train(straight, uninterrupted, range(8))

    first = llama(dtype=dtype)
    optimizer = build(first, config)
    train(first, optimizer, range(4))
    weights = {n: p.detach().clone() for n, p in first.named_parameters()}
    state = {n: t.clone() for n, t in optimizer.state_dict().items()}

    second = llama(dtype=dtype)
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


def test_state_of_another_optimizer_is_refused():
    muon, adamw = build(llama(), Optimizer()), build(llama(), Optimizer(matrix=AdamW()))
    with pytest.raises(ValueError, match="optimizer state holds"):
        adamw.load_state_dict(muon.state_dict())


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan])
def test_clip_norm_must_be_positive(clip_norm):
    with pytest.raises(ValueError, match=f"clip_norm = {clip_norm}"):
        Optimizer(clip_norm=clip_norm)


# Schedules


@pytest.mark.parametrize(
    "schedule, fraction, tokens, expected",
    [
        (Linear(warmup_tokens=0, floor=0.0), 0.0, 0, 1.0),
        (Linear(warmup_tokens=0, floor=0.0), 0.25, 0, 0.75),
        (Linear(warmup_tokens=0, floor=0.2), 0.5, 0, 0.6),
        (Linear(warmup_tokens=0, floor=0.2), 1.0, 0, 0.2),
        (Linear(warmup_tokens=1000, floor=0.0), 0.0, 250, 0.25),
        (Linear(warmup_tokens=1000, floor=0.0), 0.5, 500, 0.25),
        (Linear(warmup_tokens=1000, floor=0.0), 0.5, 10_000, 0.5),
        (WSD(warmup_tokens=0, decay_start=0.6), 0.0, 0, 1.0),
        (WSD(warmup_tokens=0, decay_start=0.6), 0.6, 0, 1.0),
        (WSD(warmup_tokens=0, decay_start=0.6), 0.7, 0, 0.75),
        (WSD(warmup_tokens=0, decay_start=0.6, floor=0.1), 0.8, 0, 0.55),
        (WSD(warmup_tokens=0, decay_start=0.6, floor=0.1), 1.0, 0, 0.1),
        (WSD(warmup_tokens=0, decay_start=0.6, floor=0.1), 1.7, 0, 0.1),
        (WSD(warmup_tokens=0, decay_start=0.0), 0.5, 0, 0.5),
        (WSD(warmup_tokens=4000, decay_start=0.5), 0.1, 1000, 0.25),
        (WSD(warmup_tokens=4000, decay_start=0.5), 0.75, 2000, 0.25),
    ],
)
def test_schedules_by_hand(schedule, fraction, tokens, expected):
    progress = at(fraction=fraction, tokens=tokens)
    assert schedule.multiplier(progress) == pytest.approx(expected, abs=1e-12)
    model = nn.Linear(3, 2, bias=False)
    start = model.weight.detach().clone()
    config = Optimizer(matrix=Plain(lr=0.5), rest=Plain(), schedule=schedule, clip_norm=math.inf)
    optimizer = config.build(model.named_parameters(), ["weight"], CPU)
    model.weight.grad = torch.ones(2, 3)
    optimizer.step(progress)
    assert optimizer.learning_rate(progress) == pytest.approx(0.5 * expected, abs=1e-12)
    torch.testing.assert_close(start - model.weight.detach(), torch.full((2, 3), 0.5 * expected), atol=1e-6, rtol=0)


def test_schedules_never_rise_after_warm_up():
    for schedule in (Linear(1000, 0.1), WSD(1000, 0.3, 0.1)):
        values = [schedule.multiplier(at(fraction=i / 50, tokens=1000 + i)) for i in range(51)]
        assert all(a >= b for a, b in itertools.pairwise(values)) and values[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("decay_start", [-0.1, 1.0, 1.5])
def test_wsd_refuses_a_decay_outside_the_budget(decay_start):
    with pytest.raises(ValueError, match=f"decay_start = {decay_start}"):
        WSD(decay_start=decay_start)
