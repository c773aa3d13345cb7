"""Learning-rate schedules by hand."""

import itertools
import math

import pytest
import torch
from small_optimizers import CPU, Plain, at
from torch import nn

from cggr_ray.optim.optimizer import Optimizer
from cggr_ray.optim.schedules import WSD, Linear


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


@pytest.mark.parametrize("schedule", [Linear, WSD])
@pytest.mark.parametrize("values", [{"floor": -0.1}, {"floor": 2.0}, {"floor": math.nan}, {"warmup_tokens": -1}])
def test_a_schedule_that_would_leave_the_rate_is_refused(schedule, values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} = {next(iter(values.values()))}"):
        schedule(**values)
