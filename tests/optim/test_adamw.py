"""AdamW against torch.optim.AdamW, in float32 and with bf16 weights."""

import math

import pytest
import torch
from torch import nn

from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.optimizer import Optimizer
from cggr_ray.optim.schedules import Linear
from cggr_ray.optim.state_formats import Int8Blockwise
from cggr_ray.progress import Progress

SHAPES = [(5, 3), (7,), (1,), (3, 5), (7,), (2, 3, 4), (5, 3)]
STEPS = 20


def optimizer_of(parameters, rule, as_matrix=False):
    names = [f"p{i}" for i in range(len(parameters))]
    schedule = Linear(warmup_tokens=0, floor=0.1)
    config = Optimizer(matrix=rule, rest=rule, schedule=schedule, clip_norm=math.inf)
    hidden = [n for n, p in zip(names, parameters, strict=True) if p.ndim == 2] if as_matrix else []
    return config.build(zip(names, parameters, strict=True), hidden, torch.device("cpu"))


def gradients(generator, step):
    """Gradients of very different sizes, and some that stay zero for a while, as of tokens that were not seen."""
    found = [torch.randn(shape, generator=generator) * 10.0 ** (i - 3) for i, shape in enumerate(SHAPES)]
    found[0][2:] *= step >= 5
    found[1] *= step % 3 == 0
    return found


def at(step):
    return Progress(step, train_seconds=float(step), budget_seconds=float(STEPS), tokens_seen=step)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.5), (0.9, 0.999)])
@pytest.mark.parametrize("as_matrix", [False, True])
def test_twenty_steps_follow_torch(weight_decay, betas, as_matrix):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    mine, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    lr, eps = 1e-3, 1e-6
    rule = AdamW(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
    optimizer = optimizer_of(mine, rule, as_matrix)
    oracle = torch.optim.AdamW(theirs, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    for step in range(STEPS):
        for a, b, g in zip(mine, theirs, gradients(generator, step), strict=True):
            a.grad, b.grad = g, g.clone()
        oracle.param_groups[0]["lr"] = lr * (1 - 0.9 * step / STEPS)
        optimizer.step(at(step))
        oracle.step()
    for w, a, b in zip(start, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        assert (a - w).abs().max() > 1e-4


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_bf16_weights_follow_a_float32_run(weight_decay):
    generator = torch.Generator().manual_seed(1)
    mine = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().float()) for p in mine]
    # A rate so small that bf16 weights updated in place would not move at all.
    lr = 1e-4
    optimizer = optimizer_of(mine, AdamW(lr=lr, weight_decay=weight_decay))
    oracle = torch.optim.AdamW(theirs, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    for step in range(STEPS):
        for a, b, g in zip(mine, theirs, gradients(generator, step), strict=True):
            a.grad = g.bfloat16()
            b.grad = a.grad.float()
        oracle.param_groups[0]["lr"] = lr * (1 - 0.9 * step / STEPS)
        optimizer.step(at(step))
        oracle.step()
    masters = {id(p): m for s in optimizer.stacks.values() for p, m in zip(s.parameters, s.master, strict=True)}
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(masters[id(a)], b.detach(), atol=1e-6, rtol=0)
        assert torch.equal(a, masters[id(a)].bfloat16())


def test_never_a_gradient_means_no_update():
    parameter = nn.Parameter(torch.ones(4, 3))
    optimizer = optimizer_of([parameter], AdamW())
    for step in range(3):
        parameter.grad = torch.zeros(4, 3)
        optimizer.step(at(step))
    assert (parameter == 1).all()


@pytest.mark.parametrize(
    "values", [{"beta1": 1.0}, {"beta2": -0.1}, {"lr": -1.0}, {"weight_decay": -1.0}, {"eps": 0.0}, {"lr": math.nan},
               {"lr": math.inf}, {"weight_decay": math.nan}, {"eps": math.inf}, {"eps": 1e-50}]
)  # fmt: skip
def test_impossible_values_are_refused(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))}={next(iter(values.values()))}"):
        AdamW(**values)


# Moments in 8 bits


def rarely_seen(generator, rows=256, columns=128):
    """Which rows have a gradient: all, half, a tenth, a thirtieth of the time."""
    often = torch.tensor([1.0, 0.5, 0.1, 0.03]).repeat_interleave(rows // 4)
    # Sizes over two decades among rows and among the values of a block.
    size = torch.randn(rows, 1, generator=generator).exp() * torch.randn(1, columns, generator=generator).exp() * 1e-3
    drift = 0.3 * torch.randn(rows, columns, generator=generator)
    for _ in range(100):
        seen = torch.rand(rows, generator=generator) < often
        yield seen, (torch.randn(rows, columns, generator=generator) + drift) * size * seen[:, None]


@pytest.mark.parametrize("beta2", [0.95, 0.97])
def test_updates_with_8_bits_stay_close_to_those_of_torch(beta2):
    rule = AdamW(beta2=beta2, state=Int8Blockwise())
    state, exact = rule.init_state(torch.zeros(1, 256, 128)), nn.Parameter(torch.zeros(256, 128))
    oracle = torch.optim.AdamW([exact], lr=1.0, betas=(0.9, beta2), eps=1e-8, weight_decay=0.0)
    assert {t.dtype for k, t in state.items() if k.endswith("codes")} == {torch.int8, torch.uint8}
    unseen, peak = torch.zeros(256), torch.zeros(256)
    for seen, gradient in rarely_seen(torch.Generator().manual_seed(8)):
        before, exact.grad = exact.detach().clone(), gradient
        oracle.step()
        theirs = before - exact.detach()
        mine = rule.direction(gradient[None], state, torch.ones(()))[0]
        unseen = torch.where(seen, 0.0, unseen + 1)
        long, expected = mine.norm(dim=-1), theirs.norm(dim=-1)
        assert (long[expected == 0] == 0).all()
        cosines = (mine * theirs).sum(-1)[expected > 0] / (long * expected)[expected > 0]
        assert cosines.min() > 0.97 and cosines.mean() > 0.994
        # A row that is not seen decays as it should, but for what scales are rounded up by, 0.2 % a step.
        ratio = (long / expected)[expected > 0]
        assert (ratio < 1.06 * 1.002 ** unseen[expected > 0]).all() and (ratio > 0.9).all()
        peak = torch.where(seen, expected, torch.maximum(peak, expected))
        assert (long - expected <= 0.06 * peak).all()
    assert unseen.max() > 30


def test_an_average_too_long_for_8_bits_is_refused():
    with pytest.raises(ValueError, match=r"beta2 = 0.999 with 8-bit state; accepted: at most 0.95 and 0.97"):
        AdamW(beta2=0.999, state=Int8Blockwise())
    with pytest.raises(ValueError, match=r"beta1 = 0.99, beta2"):
        AdamW(beta1=0.99, state=Int8Blockwise())
    AdamW(beta2=0.999)
