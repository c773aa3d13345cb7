"""Collider's choice against a loop over rows, and the backward pass it leads to."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_batches import LENGTHS, packed
from small_models import small_model
from torch import Tensor

from cggr_ray.data.batch import MicroBatch
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress
from cggr_ray.routing.collider import Collider
from cggr_ray.routing.scorers import Setting
from cggr_ray.schema import ROUTER_KEPT_FRACTION
from cggr_ray.sparse.plan import KeptRows, Seen, seen_after

NOW = Progress(5, 50.0, 100.0, 1)


def losses_of(seen: Seen, micro: MicroBatch) -> Tensor:
    logits = seen.final_ND.double() @ seen.head_VD.double().mT
    nll = F.cross_entropy(logits, micro.labels_BT.flatten(), reduction="none", ignore_index=-100)
    return nll.view(micro.labels_BT.shape)


def kept_by_hand(losses_BT: Tensor, micro: MicroBatch, keep: float, threshold: float | None) -> list[list[int]]:
    kept = []
    for losses, labels in zip(losses_BT.tolist(), micro.labels_BT.tolist(), strict=True):
        places = [t for t, label in enumerate(labels) if label >= 0]
        hardest = sorted(places, key=lambda t: -losses[t])
        chosen = hardest[: max(min(1, len(places)), round(keep * len(places)))]
        if threshold is not None and places:
            low, high = min(losses[t] for t in places), max(losses[t] for t in places)
            above = [t for t in chosen if high > low and (losses[t] - low) / (high - low) >= threshold]
            chosen = above or hardest[:1]
        kept.append(sorted(chosen))
    return kept


@pytest.mark.parametrize("keep", [0.5, 0.65, 0.9])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.3, 0.8, 1.0])
def test_the_positions_of_the_largest_loss_are_kept(keep: float, threshold: float | None) -> None:
    micro = packed(LENGTHS, 21)
    adapter = Adapter(small_model("llama"))
    seen = seen_after(adapter, micro, len(adapter.layers))
    # Losses of one row far apart, so that the threshold decides; a row of equal ones beside it.
    factor = torch.linspace(0.1, 30.0, micro.tokens_BT.shape[1]).repeat(len(micro.tokens_BT))
    factor[-micro.tokens_BT.shape[1] :] = 0.0
    seen = replace(seen, final_ND=seen.final_ND * factor.unsqueeze(1))
    part = Collider(keep) if threshold is None else Collider(keep, "upstream", threshold)
    router = part.build(0, Setting(torch.device("cpu"), len(adapter.layers), adapter.head_VD.shape[1], 1000))
    assert router.ratio(NOW) == keep
    router.begin(micro, NOW)
    route = router.route(seen, micro, keep)
    assert route is not None
    found = [index[filled].tolist() for index, filled in zip(route.index_BK, route.filled_BK, strict=True)]
    expected = kept_by_hand(losses_of(seen, micro), micro, keep, threshold)
    assert [len(row) for row in found] == [len(row) for row in expected]
    # Of equal losses any may be kept: the last row has nothing else.
    assert found[:-1] == expected[:-1]
    for row, weights in zip(range(len(found)), route.weights_BK, strict=True):
        labelled = int((micro.labels_BT[row] >= 0).sum())
        assert weights.sum().item() == pytest.approx(labelled, rel=1e-5)
    if threshold is not None:
        assert route.statistics[ROUTER_KEPT_FRACTION].item() == sum(map(len, expected))
    assert route.index_BK.shape[1] == math.ceil(keep * micro.tokens_BT.shape[1] - 1e-9)


def test_a_threshold_is_reached_by_what_equals_it() -> None:
    """The least loss of a row is 0 of its range, the largest 1."""
    micro = packed([[3], [4]], 4, masked=0.0)
    adapter = Adapter(small_model("llama"))
    seen = seen_after(adapter, micro, len(adapter.layers))
    setting = Setting(torch.device("cpu"), len(adapter.layers), adapter.head_VD.shape[1], 1000)
    for threshold, kept in ((0.0, [3, 4]), (1.0, [1, 1])):
        router = Collider(0.9, "upstream", threshold).build(0, setting)
        route = router.route(seen, micro, 0.9)
        assert route is not None and route.filled_BK.sum(1).tolist() == kept


def test_its_plan_runs_backward_on_kept_rows() -> None:
    assert isinstance(Collider().plan_for(Adapter(small_model("llama"))), KeptRows)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 0.0}, "keep = 0.0"),
        ({"threshold": 0.5}, "mode 'quantile', which has none"),
        ({"threshold": 1.5}, "threshold = 1.5"),
        ({"threshold": -0.1}, "threshold = -0.1"),
        ({"keep": 1.0, "mode": "upstream"}, "keep = 1 with mode 'upstream'"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Collider(**values)
