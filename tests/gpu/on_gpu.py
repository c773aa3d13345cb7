"""What the GPU tests share: bf16 models and their float32 twins, batches on the GPU, a device that nobody waits for."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import small_batches
import torch
from small_learners import NoHeldOut
from small_models import small_model
from torch import Tensor
from transformers import PreTrainedModel

from cggr_ray.data.batch import Batch, MicroBatch
from cggr_ray.data.packing import RowOrder
from cggr_ray.graphs import tensor_fields
from cggr_ray.learner import Learner, Levels
from cggr_ray.models.presets import ModelSpec
from cggr_ray.routing.route import TokenRoute
from cggr_ray.warmup import warm_up

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
Found = tuple[Tensor, dict[str, Tensor]]
"""(loss, gradients)"""


ROWS, WIDTH, VOCABULARY, POSITIONS = 4, 64, 128, 4000
"""Of packed batches: rows, their positions, tokens that there are, positions of the whole data set or more."""


class Twins(NamedTuple):
    low: PreTrainedModel
    exact: PreTrainedModel


def twins(model: PreTrainedModel) -> Twins:
    """The model in bf16 on the GPU, and a float32 model of the very same numbers on the CPU, buffers included."""
    low = model.to(DTYPE)
    exact = copy.deepcopy(low).float()
    return Twins(low.to(DEVICE), exact)


@torch.no_grad()
def small_twins(family: str) -> list[Twins]:
    """Three draws of weights, as one alone says little about rounding. Matrices are half as large as on the CPU, where
    nothing is rounded: at full size bf16 would lose a fifth of the gradient, with or without a plan."""
    found = []
    for seed in (5, 6, 7):
        model = small_model(family, seed)
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.dim() > 1 else 1.0)
        found.append(twins(model))
    return found


def moved(micro: MicroBatch) -> MicroBatch:
    return replace(micro, **{name: getattr(micro, name).to(DEVICE) for name in tensor_fields(micro)})


def moved_route(route: TokenRoute) -> TokenRoute:
    return TokenRoute(route.index_BK.to(DEVICE), route.weights_BK.to(DEVICE))


def relative_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """|found - exact| / |exact| over all parameters at once."""
    assert found.keys() == exact.keys()
    pairs = [(found[name].cpu().double(), exact[name].cpu().double()) for name in exact]
    wrong = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
    size = torch.stack([b.square().sum() for _, b in pairs]).sum()
    return (wrong / size).sqrt().item()


def mean_error(found: Sequence[Found], exact: Sequence[Found]) -> float:
    return sum(relative_error(a[1], b[1]) for a, b in zip(found, exact, strict=True)) / len(exact)


def assert_as_good(found: Sequence[Found], dense: Sequence[Found], exact: Sequence[Found]) -> None:
    """Gradients no further from the exact ones than a dense bf16 pass is, by half and one percent; losses are near.

    One entry a model; errors are averaged over them.
    """
    error, allowed = mean_error(found, exact), mean_error(dense, exact)
    assert error <= 1.5 * allowed + 0.01, f"{error:.4f}, a dense pass {allowed:.4f}"
    assert allowed < 0.1, f"a dense pass is off by {allowed:.4f}: the bound says nothing"
    for (loss, _), (expected, _) in zip(found, exact, strict=True):
        assert loss.item() == pytest.approx(expected.item(), rel=0.02)


@contextmanager
def no_waiting(events: bool = True) -> Iterator[None]:
    """Inside, whatever makes the host wait for the device raises; with `events`, waiting for an event does too."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the host waits for the device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", refuse)
        patch.setattr(torch.cuda.Stream, "synchronize", refuse)
        if events:
            patch.setattr(torch.cuda.Event, "synchronize", refuse)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def tiny() -> PreTrainedModel:
    """Four layers, heads of 32."""
    return ModelSpec(preset="tiny").build(VOCABULARY, 3, DEVICE, DTYPE)


def batches_of(order: RowOrder, count: int, micro_rows: int = ROWS) -> list[Batch]:
    """The first batches of an order; all have one shape."""
    return small_batches.batches_of(order, count, ROWS, micro_rows, DEVICE)


def warmed(learner: Learner, levels: Sequence[Levels], order: RowOrder, micro_rows: int) -> Learner:
    """After the warm-up of a race, at some ratios alone: every other one would be compiled for nothing."""
    assert set(levels) <= set(learner.levels())
    learner.levels = lambda: list(levels)
    warm_up(learner, NoHeldOut(), order, ROWS, micro_rows)
    return learner
