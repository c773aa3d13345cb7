"""Memory that runs out in the middle of a step: the step that is repeated is one that never failed, bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_batches import batches_of
from small_learners import everything, values
from torch import Tensor
from transformers import PreTrainedModel

from cggr_ray.data.batch import Batch
from cggr_ray.data.packing import RowOrder
from cggr_ray.data.store import TokenStore
from cggr_ray.learner import Learner, Pass
from cggr_ray.models.adapter import Adapter
from cggr_ray.optim.optimizer import StackedOptimizer
from cggr_ray.optim.stack import Stack
from cggr_ray.out_of_memory import LostStepError, is_out_of_memory
from cggr_ray.progress import Progress
from cggr_ray.recipe import Recipe
from cggr_ray.routing import routers

STEPS, FAILS_AT = 6, 4
ROWS = 4
SIZES = (ROWS, 2, 1)
CPU_TEXT = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."
CURRICULUM = {"full_until": 0.2, "target_at": 0.4}
SELECTED = {"kind": "selected_tokens", "keep": 0.5, "score": "loss", "curriculum": CURRICULUM}
BEFORE = SELECTED | {"plan": "before"}
GALORE = {"kind": "galore", "rank": 8, "refresh_every": 2, "smallest": 16}
RECIPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "after": {"tokens": SELECTED | {"plan": "after"}},
    "stratified": {"tokens": SELECTED | {"selection": "stratified"}},
    "skip": {"tokens": {"kind": "skipped_tokens", "choice": "random", "entry": 1, "exit": 0, "curriculum": CURRICULUM}},
    "probe": {"tokens": BEFORE | {"router": {"kind": "probe", "layers": 1}}},
    "lens": {"tokens": BEFORE | {"router": {"kind": "tuned_lens", "layers": 1}}},
    "stale": {"tokens": BEFORE | {"router": {"kind": "stale_scores"}}},
    "hardest rows": {"rows": {"kind": "hardest_rows", "keep": 0.5, "layers": 1, "curriculum": CURRICULUM}},
    "random rows": {"rows": {"kind": "random_rows", "keep": 0.5, "curriculum": CURRICULUM}},
    "galore": {"optimizer.matrix": GALORE},
    "galore, early": {"optimizer": {"matrix": GALORE | {"basis": "int8_blockwise"}, "project_early": True}},
    "galore, corrected": {"optimizer.matrix": GALORE | {"full_rank": 0.5}},
    "heads": {"objective": {"kind": "multi_token", "form": {"kind": "heads", "num_heads": 2}}},
    "layers at rest": {"updates": {"kind": "random_suffix", "every": 2, "levels": 2, "smallest": 0.5}},
    "layers measured": {"updates": {"kind": "dynamic_suffix", "cadence": {"first": 2, "shortest": 2}, "full_until": 0}},
}
HALF = {"hardest rows", "random rows"}
"""Recipes that keep half of the rows of a micro-batch, which one row has not."""


class Fails:
    """Calls a function as it is; the n-th call of a step raises when it is done, once or for some steps' worth."""

    def __init__(self, call: Callable[..., Any], number: int, times: int = 1, text: str = "") -> None:
        self.call, self.number, self.times, self.text = call, number, times, text
        self.armed, self.calls = False, 0

    def arm(self) -> None:
        self.armed, self.calls = True, 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        result = self.call(*arguments, **keywords)
        if self.armed and self.times:
            self.calls += 1
            if self.calls == self.number:
                self.calls, self.times = 0, self.times - 1
                raise RuntimeError(self.text) if self.text else torch.OutOfMemoryError("no memory\nadvice")
        return result

    def __get__(self, instance: Any, owner: type) -> Any:
        return lambda *arguments, **keywords: self(instance, *arguments, **keywords)


def in_a_hook(learner: Learner) -> None:
    """In the middle of the second micro-batch's backward pass, once."""
    state = {"calls": 0}

    def fail(gradient: Tensor) -> None:
        state["calls"] += 1
        if state["calls"] == 2 * FAILS_AT + 2:
            raise torch.OutOfMemoryError("no memory")

    first = next(p for name, p in learner.named_parameters() if "layers.1.mlp.up_proj" in name)
    first.register_hook(fail)


# What fails, and at which of its calls of a step with two micro-batches.
POINTS: dict[str, tuple[type, str, int]] = {
    "first pass": (Pass, "__call__", 1),
    "second pass": (Pass, "__call__", 2),
    "first backward": (torch.Tensor, "backward", 1),
    "first learning": (routers.ScoreRouter, "learn", 1),
    "second learning": (routers.ScoreRouter, "learn", 2),
    "first sum": (Stack, "accumulate", 3),
    "second sum": (StackedOptimizer, "accumulate", 2),
}


@pytest.fixture(autouse=True)
def compare_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "STEPS_PER_COMPARISON", FAILS_AT)


@pytest.fixture(scope="module")
def batches(make_store: Callable[..., TokenStore]) -> dict[int, list[Batch]]:
    """The same rows in micro-batches of every size; a bit more than an epoch, with rows read twice in one batch."""
    rng = random.Random(0)
    store = make_store([rng.randint(3, 60) for _ in range(14)])
    order = RowOrder([store], (1.0,), (None,), 32, True, 2)
    return {size: batches_of(order, STEPS, ROWS, size, torch.device("cpu")) for size in SIZES}


def learner_of(name: str, model: PreTrainedModel) -> Learner:
    recipe = Recipe("x").with_values({"optimizer.schedule.warmup_tokens": 100} | RECIPES[name])
    return Learner(recipe, Adapter(copy.deepcopy(model)), 4, 1000)


def progress_at(step: int, batches: list[Batch]) -> Progress:
    return Progress(step, float(step), float(STEPS), sum(batch.tokens for batch in batches[: step + 1]))


def train(
    learner: Learner, batches: dict[int, list[Batch]], size: int, after: int, fails: Fails | None = None
) -> list[dict[str, Any]]:
    """Values of all steps. At the step that fails the micro-batches become smaller, by asking or by themselves."""
    rows, sizes = [], list(SIZES[SIZES.index(size) + 1 :])
    for step in range(STEPS):
        given = sizes.copy()

        def smaller(reason: str, step: int = step, given: list[int] = given) -> Batch:
            assert reason
            return batches[given.pop(0)][step]

        if step == FAILS_AT and fails is not None:
            fails.arm()
        now = size if step < FAILS_AT or (step == FAILS_AT and fails is not None) else after
        row = learner.step(batches[now][step], progress_at(step, batches[size]), smaller=smaller)
        assert (given == sizes) == (step != FAILS_AT or fails is None)
        rows.append(values(row))
        learner.observe(rows[-1], progress_at(step, batches[size]))
    return rows


def assert_same(found: Learner, expected: Learner) -> None:
    wanted = everything(expected)
    for key, tensor in everything(found).items():
        assert torch.equal(tensor, wanted[key]), key
    assert found.state_dict() == expected.state_dict()


EXPECTED: dict[tuple[str, int, int], tuple[Learner, list[dict[str, Any]]]] = {}


def smaller_all_along(
    name: str, model: PreTrainedModel, batches: dict[int, list[Batch]], size: int, after: int
) -> tuple[Learner, list[dict[str, Any]]]:
    """A learner whose micro-batches became smaller at the step without a failure, and its rows."""
    if (name, size, after) not in EXPECTED:
        learner = learner_of(name, model)
        EXPECTED[name, size, after] = learner, train(learner, batches, size, after)
    return EXPECTED[name, size, after]


CASES = [
    *(("dense", point) for point in ("first pass", "first backward", "second sum")),
    *((name, "second pass") for name in sorted(RECIPES.keys() - HALF - {"dense"})),
    *((name, "first pass") for name in sorted(HALF)),
    *((name, f"{count} learning") for name in ("probe", "stale") for count in ("first", "second")),
    *((name, "first sum") for name in ("galore", "galore, corrected")),
    ("galore, early", "first backward"),
]


@pytest.mark.parametrize(("name", "point"), CASES)
def test_the_step_that_is_repeated_never_failed(
    name: str,
    point: str,
    tiny_model: PreTrainedModel,
    batches: dict[int, list[Batch]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size, after = (ROWS, 2) if name in HALF else (2, 1)
    owner, method, number = POINTS[point]
    expected, wanted = smaller_all_along(name, tiny_model, batches, size, after)
    found, fails = learner_of(name, tiny_model), Fails(getattr(owner, method), number)
    monkeypatch.setattr(owner, method, fails)
    rows = train(found, batches, size, after, fails)
    assert fails.times == 0 and rows == wanted
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["dense", "galore, early"])
def test_in_the_middle_of_a_backward_pass(
    name: str, tiny_model: PreTrainedModel, batches: dict[int, list[Batch]]
) -> None:
    expected, wanted = smaller_all_along(name, tiny_model, batches, 2, 1)
    learner = learner_of(name, tiny_model)
    in_a_hook(learner)
    assert train(learner, batches, 2, 1, Fails(in_a_hook, 1)) == wanted
    assert_same(learner, expected)


def test_twice_in_one_step(
    tiny_model: PreTrainedModel, batches: dict[int, list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, wanted = smaller_all_along("probe", tiny_model, batches, ROWS, 1)
    found, fails = learner_of("probe", tiny_model), Fails(Pass.__call__, 1, times=2, text=CPU_TEXT)
    monkeypatch.setattr(Pass, "__call__", fails)
    assert train(found, batches, ROWS, 1, fails) == wanted and fails.times == 0
    assert_same(found, expected)


def test_what_no_allocator_says_is_left_alone(
    tiny_model: PreTrainedModel, batches: dict[int, list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError(CPU_TEXT))
    assert not is_out_of_memory(RuntimeError("out of memory")) and not is_out_of_memory(ValueError(CPU_TEXT))
    fails = Fails(Pass.__call__, 1, text="size mismatch")
    monkeypatch.setattr(Pass, "__call__", fails)
    with pytest.raises(RuntimeError, match="size mismatch"):
        train(learner_of("dense", tiny_model), batches, 2, 1, fails)


def test_without_smaller_micro_batches_nothing_of_the_step_is_left(
    tiny_model: PreTrainedModel, batches: dict[int, list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of("probe", tiny_model)
    before = everything(learner)
    fails = Fails(Pass.__call__, 2)
    monkeypatch.setattr(Pass, "__call__", fails)
    fails.arm()
    with pytest.raises(torch.OutOfMemoryError):
        learner.step(batches[2][0], progress_at(0, batches[2]))
    assert all(torch.equal(tensor, before[key]) for key, tensor in everything(learner).items())
    assert all(p.grad is None for _, p in learner.named_parameters())


def test_an_update_that_finds_no_memory_cannot_be_repeated(
    tiny_model: PreTrainedModel, batches: dict[int, list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of("dense", tiny_model)
    fails = Fails(Stack.pieces, 2)
    monkeypatch.setattr(Stack, "pieces", fails)
    with pytest.raises(LostStepError, match="the optimizer's update, which cannot be repeated: no memory; the last"):
        train(learner, batches, 2, 1, fails)
