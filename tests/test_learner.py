"""Steps of routers that score early and learn: what their rows hold, and that they go on exactly from a checkpoint."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_batches import batches_of, lens_logits
from small_learners import everything, values
from small_runs import KilledError, killed_after, rows_of
from transformers import PreTrainedModel

from cggr_ray import checkpoint
from cggr_ray.clock import SteppedClock
from cggr_ray.data.batch import Batch, MicroBatch
from cggr_ray.data.dataset import DataSpec, prepare
from cggr_ray.data.packing import RowOrder
from cggr_ray.data.sources import Problems
from cggr_ray.data.store import TokenStore
from cggr_ray.learner import Learner, StepRow
from cggr_ray.loop import run_race
from cggr_ray.models.adapter import Adapter
from cggr_ray.models.presets import ModelSpec
from cggr_ray.progress import Progress
from cggr_ray.race import RaceSpec, Trial, plan_trials
from cggr_ray.recipe import Recipe
from cggr_ray.routing import routers
from cggr_ray.routing.route import TokenRoute
from cggr_ray.schema import (
    KEPT_LOSS,
    ROUTER_CONFIDENCE,
    ROUTER_ENTROPY,
    ROUTER_KEPT_FRACTION,
    ROUTER_RECALL,
    ROUTER_SPEARMAN,
    SKIP_LOSS,
    TOKEN_LOSS,
    TRAIN_LOSS,
)
from cggr_ray.updates.schedule import Learning

STEPS, SAVED = 12, 7
CURRICULUM = {"full_until": 0.25, "target_at": 0.5}
PROBE = {"kind": "probe", "layers": 1}
SELECTED = {"kind": "selected_tokens", "keep": 0.5, "score": "loss", "plan": "before", "curriculum": CURRICULUM}
TOKENS: dict[str, dict[str, Any]] = {
    "probe": SELECTED | {"router": PROBE},
    "probe, full every third step": SELECTED | {"router": PROBE, "curriculum": CURRICULUM | {"full_every": 3}},
    "probe, dense": SELECTED | {"router": PROBE, "plan": "dense", "selection": "stratified"},
    "truncated": SELECTED | {"router": {"kind": "truncated_router", "layers": 1}, "score": "combined"},
    "lens": SELECTED | {"router": {"kind": "tuned_lens", "layers": 1, "positions": 20}, "score": "combined"},
    "lens, dense": SELECTED | {"router": {"kind": "tuned_lens", "layers": 1}, "plan": "dense", "score": "surprise"},
    "stale": SELECTED | {"router": {"kind": "stale_scores"}},
    "skip": {"kind": "skipped_tokens", "choice": "confidence", "entry": 1, "exit": 0, "curriculum": CURRICULUM},
}
KEEPING: dict[str, dict[str, Any]] = {
    "all": {"kind": "all_tokens"},
    "chance": {"kind": "random_tokens", "keep": 0.3},
    "top-k of the batch": {"kind": "selected_tokens", "keep": 0.3, "scope": "batch"},
    "threshold": {"kind": "collider", "keep": 0.9, "mode": "upstream", "threshold": 0.5},
}


@pytest.fixture(autouse=True)
def compare_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "STEPS_PER_COMPARISON", 3)


@pytest.fixture
def store(make_store: Callable[..., TokenStore]) -> TokenStore:
    rng = random.Random(0)
    return make_store([rng.randint(3, 60) for _ in range(30)])


@pytest.fixture
def batches(store: TokenStore) -> list[Batch]:
    """Twelve batches of two micro-batches; a bit more than an epoch."""
    order = RowOrder([store], (1.0,), (None,), 32, True, 2)
    return batches_of(order, STEPS, 4, 2, torch.device("cpu"))


def train(learner: Learner, batches: list[Batch], clock: SteppedClock, steps: range) -> list[StepRow]:
    rows = []
    for step in steps:
        seen = sum(batch.tokens for batch in batches[: step + 1])
        rows.append(learner.step(batches[step], Progress(step, clock.train_seconds, float(STEPS), seen)))
        clock.tick()
    return rows


def learner_of(name: str, model: PreTrainedModel, store: TokenStore) -> Learner:
    recipe = Recipe("x").with_values({"tokens": TOKENS[name], "optimizer.schedule.warmup_tokens": 100})
    return Learner(recipe, Adapter(copy.deepcopy(model)), 4, len(store.tokens))


def share_kept(batch: Batch, ratio: float) -> float:
    """Of the labelled positions, where a ratio is kept of each row and at least one."""
    labelled = [int((row >= 0).sum()) for micro in batch.micros for row in micro.labels_BT]
    return sum(max(round(ratio * n), min(n, 1)) for n in labelled) / sum(labelled)


@pytest.mark.parametrize("name", ["probe", "probe, dense", "truncated", "lens", "lens, dense", "skip"])
def test_full_steps_come_first_and_agreement_every_third(
    name: str, tiny_model: PreTrainedModel, store: TokenStore, batches: list[Batch]
) -> None:
    learner = learner_of(name, tiny_model, store)
    untrained = {k: v.clone() for k, v in learner.router.tensors().items()}
    rows = train(learner, batches, clock := SteppedClock(1.0), range(STEPS))
    assert clock.train_seconds == STEPS
    # A quarter of twelve steps is full, and so is the one from which the ratio falls, to its target at the half.
    keep = 0.25 if name == "skip" else 0.5
    levels = [keep + (1 - keep) * i / 4 for i in range(5)]
    ratios = [1.0] * 4 + [levels[3], levels[2]] + [keep] * 6
    kept = [values(row)[ROUTER_KEPT_FRACTION] for row in rows]
    assert kept == pytest.approx([share_kept(batch, ratio) for batch, ratio in zip(batches, ratios, strict=True)])
    learns = name != "truncated"
    for step, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        seen = row.device_values
        thinned = SKIP_LOSS if name == "skip" else KEPT_LOSS
        assert (TRAIN_LOSS in seen) == (ratio == 1) and (thinned in seen) == (ratio < 1)
        # A thinned forward has no scores of its own to compare with.
        compared = step % 3 == 0 and (learns if ratio == 1 else name != "skip")
        assert (ROUTER_SPEARMAN in seen) == (ROUTER_RECALL in seen) == compared, step
        if compared:
            assert -1 <= seen[ROUTER_SPEARMAN] <= 1 and 0 <= seen[ROUTER_RECALL] <= 1
            assert seen[ROUTER_SPEARMAN].shape == seen[ROUTER_RECALL].shape == ()
        assert all(v.isfinite().all() for v in seen.values())
    assert learns == bool(untrained)
    assert all(not torch.equal(v, learner.router.tensors()[k]) for k, v in untrained.items())


@pytest.mark.parametrize(
    "rows",
    [{"kind": "all_rows"}, {"kind": "random_rows", "keep": 0.5}, {"kind": "hardest_rows", "keep": 0.5, "layers": 1}],
)
@pytest.mark.parametrize("tokens", KEEPING)
def test_the_kept_positions_are_counted(
    tokens: str, rows: dict[str, Any], tiny_model: PreTrainedModel, store: TokenStore
) -> None:
    """Of rows with few labels and with many, in micro-batches of unequal size; what is kept alone has a loss."""
    order = RowOrder([store], (1.0,), (None,), 32, True, 2)
    batch = batches_of(order, 1, 6, 4, torch.device("cpu"))[0]
    labelled = [int((row >= 0).sum()) for micro in batch.micros for row in micro.labels_BT]
    assert len(set(labelled)) > 1 and len({len(micro.tokens_BT) for micro in batch.micros}) == 2
    recipe = Recipe("x").with_values({"tokens": KEEPING[tokens], "rows": rows})
    learner = Learner(recipe, Adapter(copy.deepcopy(tiny_model)), 4, len(store.tokens))
    row = values(learner.step(batch, Progress(9, 0.9, 1.0, 9)))
    lost = sum(row[TOKEN_LOSS])
    assert row[ROUTER_KEPT_FRACTION] == pytest.approx(lost / sum(labelled), rel=1e-12)
    assert (lost < sum(labelled)) == (tokens != "all" or rows["kind"] != "all_rows")


def test_entropy_and_confidence_are_means_over_positions_not_over_micro_batches(
    tiny_model: PreTrainedModel, store: TokenStore
) -> None:
    """Of micro-batches with labels in unequal numbers: a dynamic threshold goes by the confidence."""
    order = RowOrder([store], (1.0,), (None,), 32, True, 2)
    batch = batches_of(order, 1, 6, 4, torch.device("cpu"))[0]
    layers = tiny_model.config.num_hidden_layers
    found = [lens_logits(tiny_model, micro, layers)[micro.labels_BT >= 0].log_softmax(-1) for micro in batch.micros]
    of_micros, log_p = [x.exp().amax(-1).mean().item() for x in found], torch.cat(found)
    confidence = log_p.exp().amax(-1).mean().item()
    assert confidence != pytest.approx(sum(of_micros) / len(of_micros), rel=1e-4)
    recipe = Recipe("x").with_values({"tokens": {"kind": "selected_tokens"}})
    learner = Learner(recipe, Adapter(copy.deepcopy(tiny_model)), 4, len(store.tokens))
    row = values(learner.step(batch, Progress(9, 0.9, 1.0, 9)))
    assert row[ROUTER_CONFIDENCE] == pytest.approx(confidence, rel=1e-5)
    assert row[ROUTER_ENTROPY] == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("choice", ["random", "confidence"])
def test_positions_that_pass_the_middle_are_counted(
    choice: str, tiny_model: PreTrainedModel, store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that have a label, though any may pass by chance."""
    order = RowOrder([store], (1.0,), (None,), 32, True, 2)
    batch = batches_of(order, 1, 6, 4, torch.device("cpu"))[0]
    tokens = {"kind": "skipped_tokens", "keep": 0.5, "choice": choice, "entry": 1, "exit": 0}
    recipe = Recipe("x").with_values({"tokens": tokens})
    learner = Learner(recipe, Adapter(copy.deepcopy(tiny_model)), 4, len(store.tokens))
    passed, route = [], learner.router.route

    def seen(*args: Any, micro: MicroBatch, **kwargs: Any) -> TokenRoute | None:
        found = route(*args, micro=micro, **kwargs)
        assert found is not None
        for row, index, filled in zip(micro.labels_BT, found.index_BK, found.filled_BK, strict=True):
            passed.extend(int(row[i]) for i in index[filled])
        return found

    monkeypatch.setattr(learner.router, "route", seen)
    row = values(learner.step(batch, Progress(0, 0.1, 1.0, 9)))
    labelled = sum(label >= 0 for label in passed)
    assert labelled < len(passed) if choice == "random" else labelled == len(passed)
    assert row[ROUTER_KEPT_FRACTION] == pytest.approx(labelled / batch.labelled, rel=1e-12)


def test_the_first_epoch_is_full_whatever_the_curriculum(
    tiny_model: PreTrainedModel, store: TokenStore, batches: list[Batch]
) -> None:
    learner = learner_of("stale", tiny_model, store)
    rows = train(learner, batches, SteppedClock(1.0), range(STEPS))
    ratios = [1.0 if TRAIN_LOSS in row.device_values else 0.5 for row in rows]
    kept = [values(row)[ROUTER_KEPT_FRACTION] for row in rows]
    assert kept == pytest.approx([share_kept(batch, ratio) for batch, ratio in zip(batches, ratios, strict=True)])
    seen = [sum(batch.tokens for batch in batches[: n + 1]) for n in range(STEPS)]
    epoch = next(n for n in range(STEPS) if seen[n] >= len(store.tokens))
    assert 6 < epoch < STEPS and ratios == [1.0] * epoch + [0.5] * (STEPS - epoch)
    ids = torch.cat([m.position_ids_BT[m.labels_BT >= 0] for batch in batches[:epoch] for m in batch.micros])
    later = torch.cat([m.position_ids_BT[m.labels_BT >= 0] for batch in batches[epoch:] for m in batch.micros])
    known = learner.router.tensors()["losses"][:-1].isfinite().nonzero().flatten().tolist()
    assert set(ids.tolist()) <= set(known) <= set(ids.tolist()) | set(later.tolist())


@pytest.mark.parametrize("name", TOKENS)
def test_training_goes_on_exactly_where_it_was_saved(
    name: str, tmp_path: Path, tiny_model: PreTrainedModel, store: TokenStore, batches: list[Batch]
) -> None:
    whole, clock = learner_of(name, tiny_model, store), SteppedClock(1.0)
    train(whole, batches, clock, range(SAVED))
    saved, ledgers = everything(whole), clock.ledgers
    folder = checkpoint.save(tmp_path, SAVED, whole, {"ledgers": ledgers})
    expected = train(whole, batches, clock, range(SAVED, STEPS))

    resumed = learner_of(name, tiny_model, store)
    train(resumed, batches, SteppedClock(1.0), range(2))
    state = checkpoint.load(folder, resumed)
    for key, tensor in everything(resumed).items():
        assert torch.equal(tensor, saved[key]), key
    clock = SteppedClock(1.0)
    clock.restore(state["ledgers"])
    found = train(resumed, batches, clock, range(SAVED, STEPS))
    assert [values(row) for row in found] == [values(row) for row in expected]
    last = everything(whole)
    for key, tensor in everything(resumed).items():
        assert torch.equal(tensor, last[key]), key
    assert any(not torch.equal(tensor, saved[key]) for key, tensor in last.items() if key.startswith("router.")) == (
        name != "truncated"
    )


def test_a_layer_that_learns_again_has_rested_for_as_many_steps(
    tiny_model: PreTrainedModel, store: TokenStore, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(Recipe("x"), Adapter(copy.deepcopy(tiny_model)), 4, len(store.tokens))
    first, layers = learner.adapter.layer_parameters(0), len(learner.adapter.layers)
    woken: list[tuple[int, bool, int]] = []

    def wake(parameters: list[Any], steps: int) -> None:
        woken.append((at, [*map(id, parameters)] == [*map(id, first)], steps))

    monkeypatch.setattr(learner.optimizer, "wake", wake)
    for at, learns in enumerate([True, False, False, False, True, True, False, True]):
        learning = Learning((learns, *[True] * (layers - 1)))
        monkeypatch.setattr(learner.updates, "begin", lambda progress, learning=learning: learning)
        learner.step(batches[at], Progress(at, 0.1, 1.0, 9))
    assert woken == [(4, True, 3), (7, True, 1)]


# Whole runs

STEP_SECONDS = 0.5


@pytest.mark.parametrize("name", ["probe", "lens", "stale"])
def test_a_killed_run_goes_on_with_what_its_router_has_learned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = RaceSpec(
        budget_seconds=STEPS * STEP_SECONDS,
        step_seconds=STEP_SECONDS,
        global_rows=4,
        micro_rows=4,
        milestones=(),
        model=ModelSpec(preset="tiny"),
        data=DataSpec(sources=(Problems(count=14),), row_tokens=64, val_documents=2, val_per_mille=300),
        values={"optimizer.schedule.warmup_tokens": 1000},
        device="cpu",
    )
    changed = {"tokens.score": "loss", "tokens.keep": 0.5, "tokens.curriculum": CURRICULUM} | {
        "tokens.router": TOKENS[name]["router"]
    }
    prepare(spec.data, tmp_path / "data")

    def trial(folder: str, **more: Any) -> Trial:
        arm = replace(spec, recipes=("cggr_model",), arms={"cggr_model": changed}, **more)
        return plan_trials(arm, tmp_path / folder)[0].placed(tmp_path / folder, tmp_path / "data")

    def rows(folder: str) -> dict[int, dict[str, Any]]:
        timed = ("wall_seconds", "tokens_per_sec", "system/", "step_seconds", "samples_per_sec")
        return {
            line["step"]: {k: v for k, v in line.items() if not any(t in k for t in timed)}
            for line in rows_of(tmp_path / folder, "step")
        }

    expected = run_race(trial("whole"))
    with pytest.raises(KilledError):
        run_race(trial("parts", checkpoint_every_seconds=6 * STEP_SECONDS), killed_after(7.5 * STEP_SECONDS))
    assert checkpoint.newest(tmp_path / "parts")[0] is not None
    found = run_race(trial("parts", checkpoint_every_seconds=6 * STEP_SECONDS))
    assert rows("parts") == rows("whole") and found["val/loss"] == expected["val/loss"]
    kept = [row[ROUTER_KEPT_FRACTION] for row in rows("whole").values()]
    assert kept[0] == 1.0 and kept[-1] == 0.5
    assert [n for n, row in rows("whole").items() if ROUTER_SPEARMAN in row] == [1, 4, 7, 10]
