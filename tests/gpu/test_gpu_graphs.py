"""Micro-steps as CUDA graphs against the same passes launch by launch.

Not bit for bit: FlashAttention adds up its gradients in no fixed order. The forward has no such freedom, but its
kernels may be chosen anew; so losses agree to 1e-3 of their size, and gradients to 1e-2 of their norm: a few roundings
of bf16.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from on_gpu import DEVICE, POSITIONS, ROWS, Found, batches_of, relative_error, tiny, warmed
from torch import Tensor, nn
from transformers import PreTrainedModel

from cggr_ray.data.batch import MicroBatch
from cggr_ray.data.packing import RowOrder
from cggr_ray.graphs import Graphs
from cggr_ray.learner import Learner, Levels, Pass, StepRow
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress
from cggr_ray.recipe import Recipe
from cggr_ray.schema import GRAD_NORM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CURRICULUM = {"full_until": 0.0, "target_at": 0.0}
SELECTED = {"kind": "selected_tokens", "keep": 0.25, "score": "loss", "curriculum": CURRICULUM}
PARTS: dict[str, dict[str, Any]] = {
    "all": {"kind": "all_tokens"},
    "drawn, dense": SELECTED | {"plan": "dense", "selection": "stratified"},
    "after, own": SELECTED | {"plan": "after"},
    "after, ranks": SELECTED
    | {"plan": "after", "score": "combined_rank", "selection": "stratified_top", "drop_hardest": 0.05},
    "before, random": {"kind": "random_tokens", "keep": 0.25, "curriculum": CURRICULUM},
    "before, probe": SELECTED | {"plan": "before", "router": {"kind": "probe", "layers": 1}},
    "before, lens": SELECTED | {"plan": "before", "router": {"kind": "tuned_lens", "layers": 1}},
    "skip": {"kind": "skipped_tokens", "keep": 0.25, "entry": 1, "exit": 1},
}
LEARNS = ("before, probe", "before, lens")


def recipe_of(name: str, **values: Any) -> Recipe:
    return Recipe(name).with_values({"tokens": PARTS[name], "optimizer.schedule.warmup_tokens": 0} | values)


def progress_of(step: int) -> Progress:
    return Progress(step, 0.3, 1.0, 10**6)


def scale_of(micro: MicroBatch) -> Tensor:
    return torch.tensor(1 / micro.labelled, device=DEVICE)


def taken(model: nn.Module, loss: Tensor) -> Found:
    """(loss, gradients), copied and dropped: the next replay writes where these are."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return loss.clone(), found


class Pair:
    """The same pass twice on one model, with routers of one seed: launched, and through a graph."""

    def __init__(self, name: str) -> None:
        self.adapter = Adapter(tiny())
        self.launched, self.captured = (Pass(recipe_of(name), self.adapter, 7, POSITIONS) for _ in range(2))
        self.graphs = Graphs(list(self.adapter.model.parameters()), self.captured.router.generators())

    def capture(self, micro: MicroBatch, ratio: float) -> None:
        """What a warm-up does: the first call of a key runs more than once, so what it teaches is taken back."""
        before = {name: tensor.clone() for name, tensor in self.captured.router.tensors().items()}
        self.by_graph(micro, ratio, step=0)
        for name, tensor in self.captured.router.tensors().items():
            tensor.copy_(before[name])

    def by_graph(self, micro: MicroBatch, ratio: float, step: int) -> tuple[Found, dict[str, Tensor]]:
        self.captured.router.begin(micro, progress_of(step))
        run = partial(self.captured, ratio=ratio)
        loss, seen = self.graphs.run((ratio, micro.tokens_BT.shape), run, micro, scale_of(micro))
        return taken(self.adapter.model, loss), {name: value.clone() for name, value in seen.items()}

    def by_launches(self, micro: MicroBatch, ratio: float, step: int) -> tuple[Found, dict[str, Tensor]]:
        self.launched.router.begin(micro, progress_of(step))
        loss, seen = self.launched(micro, scale_of(micro), ratio)
        return taken(self.adapter.model, loss), seen

    def compare(self, micro: MicroBatch, ratio: float, step: int) -> Found:
        """From one state of the router, so that rounding does not add up to another choice."""
        learned, expected_learned = self.captured.router.tensors(), self.launched.router.tensors()
        for name, tensor in expected_learned.items():
            learned[name].copy_(tensor)
        before = {name: tensor.clone() for name, tensor in learned.items()}
        found, seen = self.by_graph(micro, ratio, step)
        expected, expected_seen = self.by_launches(micro, ratio, step)
        assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-3)
        assert relative_error(found[1], expected[1]) <= 1e-2
        assert seen.keys() == expected_seen.keys()
        for name, value in expected_seen.items():
            torch.testing.assert_close(seen[name], value, rtol=1e-2, atol=1e-2)
        for name, tensor in expected_learned.items():
            # No step, or two, would be a whole one away. AdamW's first turns round where a rounding turns a sign.
            change, wanted = ({name: now - before[name]} for now in (learned[name], tensor))
            assert relative_error(change, wanted) < 0.5, name
        return expected


@pytest.mark.parametrize("name", PARTS)
def test_a_replay_is_the_pass_on_whatever_micro_batch_comes(name: str, order: RowOrder) -> None:
    pair, ratio = Pair(name), 1.0 if name == "all" else 0.25
    first, second = (batch.micros[0] for batch in batches_of(order, 2))
    untrained = {key: tensor.clone() for key, tensor in pair.captured.router.tensors().items()}
    pair.capture(first, ratio)
    found = [pair.compare(micro, ratio, step) for step, micro in enumerate((first, second, first, second))]
    assert relative_error(found[1][1], found[0][1]) > 0.1, "inputs that differ make gradients that do"
    repeats = name in ("all", "after, own")
    assert (relative_error(found[2][1], found[0][1]) < 0.1) == repeats, "draws are those of the step, probes learn"
    assert bool(untrained) == (name in LEARNS)
    for key, tensor in pair.captured.router.tensors().items():
        assert not torch.equal(tensor, untrained[key]), f"{key} has not learned"


@pytest.mark.parametrize("name", ["before, random", "before, probe", "before, lens"])
def test_ratios_share_a_pool(name: str, order: RowOrder) -> None:
    pair, ratios = Pair(name), (0.25, 0.625, 1.0)
    micros = [batch.micros[0] for batch in batches_of(order, 2)]
    for ratio in ratios:
        pair.capture(micros[0], ratio)
    for step, ratio in enumerate((*ratios, *ratios[::-1], 0.25)):
        pair.compare(micros[step % 2], ratio, step)


def learner_of(name: str, model: PreTrainedModel, graphs: bool, order: RowOrder, micro_rows: int) -> Learner:
    recipe = recipe_of(name, **{"execution.cuda_graphs": graphs})
    learner = Learner(recipe, Adapter(copy.deepcopy(model)), 7, POSITIONS)
    assert (learner.graphs is not None) == graphs
    return warmed(
        learner,
        [Levels(1.0, learner.router.ratio(progress_of(1)), learner.updates.begin(progress_of(1)))],
        order,
        micro_rows,
    )


def loss_of(row: StepRow) -> float:
    return next(value.item() for name, value in row.device_values.items() if name.startswith("train/"))


@pytest.mark.parametrize("micro_rows", [ROWS, ROWS // 2])
@pytest.mark.parametrize("name", ["all", "after, own", "before, random", "before, probe", "before, lens", "skip"])
def test_steps_with_graphs_are_steps_without(name: str, micro_rows: int, order: RowOrder) -> None:
    """Losses agree to bf16 rounding while the weights move, which the graphs read where the optimizer writes them."""
    model, batches = tiny(), batches_of(order, 2, micro_rows)
    losses = []
    for graphs in (True, False):
        learner = learner_of(name, model, graphs, order, micro_rows)
        rows = [learner.step(batches[step % 2], progress_of(step)) for step in range(1, 6)]
        losses.append([loss_of(row) for row in rows])
    # What has learned something else, by a rounding, keeps other positions, whose losses are not alike.
    bound = 0.03 if name in LEARNS else 0.01
    assert losses[0] == pytest.approx(losses[1], rel=bound)
    assert losses[0][0] - losses[0][4] > 3 * bound * losses[0][0], "the weights have moved by more than that"


@pytest.mark.parametrize("micro_rows", [ROWS, ROWS // 2])
def test_what_a_step_left_behind_stays(micro_rows: int, order: RowOrder) -> None:
    """A row is read when it is due, steps later: nothing in it may be memory that a replay writes."""
    batches = batches_of(order, 4, micro_rows)
    learner = learner_of("after, own", tiny(), True, order, micro_rows)
    rows, copies = [], []
    for step in range(4):
        rows.append(learner.step(batches[step], progress_of(step)))
        copies.append({name: value.clone() for name, value in rows[-1].device_values.items()})
    for row, copied in zip(rows, copies, strict=True):
        assert GRAD_NORM in copied and all(torch.equal(row.device_values[name], copied[name]) for name in copied)
    assert len({loss_of(row) for row in rows}) == 4


def test_the_first_call_of_a_key_leaves_its_gradients_too(order: RowOrder) -> None:
    """Which captures, and puts back the gradients that were there before; the replay then writes its own."""
    pair, micro = Pair("all"), batches_of(order, 1)[0].micros[0]
    expected = pair.by_launches(micro, 1.0, 1)[0]
    for _ in range(2):
        found = pair.by_graph(micro, 1.0, 1)[0]
        assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-3)
        assert found[1].keys() == expected[1].keys()
        assert relative_error(found[1], expected[1]) <= 1e-2
