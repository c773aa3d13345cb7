"""Warm-up: every graph that a run can reach is compiled off the clock; afterwards all state is as it was."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cggr_ray.data.batch import Batch
from cggr_ray.data.loader import micro_batches
from cggr_ray.data.packing import RowOrder
from cggr_ray.evaluation.heldout import HeldOut
from cggr_ray.learner import Learner, Levels
from cggr_ray.out_of_memory import FAILURES, LostStepError, first_line, is_out_of_memory

STEPS_PER_GRAPH = 2


def warm_up(
    learner: Learner,
    heldout: HeldOut,
    order: RowOrder,
    rows: int,
    micro_rows: int,
    levels: Sequence[Levels] | None = None,
) -> None:
    """Steps at everything that the parts can ask a step to run at, or at `levels`, and a part of a validation. They
    change neither weights nor the optimizer's state; the rest is restored, also where memory runs out.

    Without a compiler one level is enough: there is nothing to compile, only allocations to touch.
    """
    device = learner.adapter.device
    routing = {name: t.to("cpu", copy=True) for name, t in learner.router.tensors().items()}
    host = learner.state_dict()
    levels = levels or (learner.levels() if device.type == "cuda" else learner.levels()[:1])
    try:
        batch = first_batch(order, rows, min(rows, micro_rows), device)
        with learner.optimizer.rehearsal():
            for level in levels:
                for step in range(STEPS_PER_GRAPH):
                    learner.rehearse(batch, step, level)
        heldout.rehearse(learner.adapter)
    finally:
        # Gradients of a step that did not end, first of all: they may be what fills the memory.
        learner.rewind()
        with torch.no_grad():
            for name, tensor in learner.router.tensors().items():
                tensor.copy_(routing[name])
        learner.adapter.forget()
        learner.load_state_dict(host)


def try_to_warm_up(learner: Learner, heldout: HeldOut, order: RowOrder, rows: int, micro_rows: int) -> str | None:
    """Warms up; why that could not be ended, where memory ran out. Then nothing has changed.

    Raises:
        LostStepError: it ran out where that cannot be said.
    """
    try:
        warm_up(learner, heldout, order, rows, micro_rows)
    except FAILURES as error:
        if isinstance(error, LostStepError) or not is_out_of_memory(error):
            raise
        return first_line(error)
    return None


def first_batch(order: RowOrder, rows: int, micro_rows: int, device: torch.device) -> Batch:
    """The first batch of an order, without a loader."""
    packed = order.first_rows(rows)
    micros = micro_batches(packed, micro_rows, order.shape, device)
    return Batch(tuple(micros), sum(row.real for row in packed))
