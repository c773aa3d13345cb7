"""Attention's logits in the thousands on the GPU: compiled forward and backward passes round alike where they must."""

from __future__ import annotations

import copy

import pytest
import torch
from on_gpu import DEVICE, DTYPE, moved, moved_route
from test_large_logits import MICRO, ROUTE, exact, large_llama, size
from test_plans import PLANS, plan_gradients

from cggr_ray.models.checkpointing import Checkpointing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize("detach", ["const", "live"])
@pytest.mark.parametrize("plan", sorted(PLANS))
def test_gradients_are_of_the_size_they_have_in_float64(plan: str, detach: str, checkpointing: Checkpointing) -> None:
    model = copy.deepcopy(large_llama()).to(DEVICE, DTYPE)
    found = plan_gradients(model, moved(MICRO), moved_route(ROUTE), plan, detach, checkpointing)[1]
    assert size(found) < 100 * exact(detach)
