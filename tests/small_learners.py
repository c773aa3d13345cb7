"""All that a learner holds and all that a step says, for the tests that want two of them alike to the bit, and what a
warm-up validates where there is nothing to validate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cggr_ray.learner import Learner, StepRow
from cggr_ray.models.adapter import Adapter


def everything(learner: Learner) -> dict[str, Tensor]:
    """Copies of weights, the objective's own too, of the optimizer's state and of what the router has learned."""
    state = {f"optimizer.{k}": v for k, v in learner.optimizer.state_dict().items()}
    state |= {f"router.{k}": v for k, v in learner.router.tensors().items()}
    return {k: v.detach().clone() for k, v in (dict(learner.named_parameters()) | state).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def values(row: StepRow) -> dict[str, Any]:
    """What a step says, on the host."""
    return row.host_values | {name: value.tolist() for name, value in row.device_values.items()}


class NoHeldOut:
    """For a warm-up without a validation set."""

    def rehearse(self, adapter: Adapter) -> None:
        """Nothing to run."""
