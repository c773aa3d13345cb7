"""The loop: equal to a loop written by hand, resumed exactly, inside its budget, its ledgers closed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_runs import STEP_SECONDS, TWELVE_STEPS, KilledError, killed_after, prepared, rows_of, step_losses, trial_of

from cggr_ray.data.dataset import open_data
from cggr_ray.loop import Run, run_race
from cggr_ray.models.random_weights import with_random_weights
from cggr_ray.race import RaceSpec
from cggr_ray.recipe import recipe_names
from cggr_ray.schema import LEDGERS
from cggr_ray.stopping import StoppedError

ROWS, WIDTH = TWELVE_STEPS.global_rows, TWELVE_STEPS.data.row_tokens


@pytest.fixture(scope="module")
def spec() -> RaceSpec:
    return TWELVE_STEPS


@pytest.fixture(scope="module")
def data_folder(spec: RaceSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(spec.data, tmp_path_factory)


def step_rows(folder: Path) -> dict[int, dict]:
    return {row["step"]: row for row in rows_of(folder, "step")}


def losses(folder: Path) -> list[float]:
    return list(step_losses(folder).values())


def hand_written_losses(spec: RaceSpec, data_folder: Path, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training in a page of plain PyTorch: Hugging Face forward, cross-entropy, Muon and AdamW by formula."""
    data = open_data(spec.data, data_folder)
    model = with_random_weights(spec.model.config(spec.model.vocabulary(len(data.tokenizer))), seed=0)
    order, state, seen, found = data.order(), data.order().start(), 0, []
    names = dict(model.named_parameters())
    matrices = [n for n in names if names[n].ndim == 2 and ".layers." in n]
    memory: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    shapes = {tuple(names[n].shape): [m for m in matrices if names[m].shape == names[n].shape] for n in matrices}
    express = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
               (4.042929935166739, -2.808917465908714, 0.5000178451051316),
               (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
               (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
               (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))  # fmt: skip
    for step in range(steps):
        rows = []
        for _ in range(spec.global_rows):
            row, state = order.next_row(state)
            rows.append(row)
        seen += sum(row.real for row in rows)
        tokens, labels, positions = (torch.stack([torch.from_numpy(r[i]) for r in rows]) for i in range(3))
        document = (positions == 0).cumsum(1)
        mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]
        logits = model(tokens, attention_mask=mask, position_ids=positions).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (labels >= 0).sum()
        loss.backward()
        found.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        fraction = step / steps
        lr = 3e-3 * min(1, seen / 1000) * (1 - max(0.0, (fraction - 0.6) / 0.4))
        with torch.no_grad():
            for name in set(names) - set(matrices):
                p, g = names[name], names[name].grad
                m, v = memory.setdefault(name, (torch.zeros_like(p), torch.zeros_like(p)))
                m.lerp_(g, 1 - 0.9)
                v.lerp_(g.square(), 1 - 0.95)
                t = torch.tensor(float(step + 1))
                direction = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
                p.sub_(direction * torch.tensor(lr))
            for shape, members in shapes.items():
                g = torch.stack([names[n].grad for n in members])
                m = memory.setdefault(str(shape), (torch.zeros_like(g), g))[0]
                m.lerp_(g, 1 - 0.95)
                x = g.lerp(m, 0.95)
                x = x.mT if shape[0] > shape[1] else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02)
                for a, b, c in express:
                    s = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
                x = x.mT if shape[0] > shape[1] else x
                for n, direction in zip(members, x, strict=True):
                    names[n].sub_(direction * (torch.tensor(lr) * (0.2 * max(shape) ** 0.5)))
        model.zero_grad()
    return found, names


def test_baseline_is_the_loop_written_by_hand(spec: RaceSpec, data_folder: Path, tmp_path: Path) -> None:
    spec = replace(spec, budget_seconds=20 * STEP_SECONDS, save_model=True)
    trial = trial_of(spec, "baseline", tmp_path, data_folder)
    run_race(trial)
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "model" / "model.safetensors")
    found, names = hand_written_losses(spec, data_folder, steps=20)
    # A loss is a sum, and a polynomial one of products, in orders of their own.
    assert losses(tmp_path) == pytest.approx(found, rel=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(value, names[name].detach(), rtol=0, atol=3e-6, msg=name)


NEUTRAL = {
    "cggr_loss": {"tokens.keep": 1.0},
    "cggr_importance": {"tokens.keep": 1.0},
    "cggr_importance_sparse": {"tokens.keep": 1.0},
    "cggr_model": {"tokens.keep": 1.0},
    "cggr_model_sequence": {"rows.keep": 1.0},
    "cggr_seed": {"tokens.keep": 1.0},
    "cggr_skip": {"tokens.keep": 1.0},
    "cggr_tuned": {"tokens.keep": 1.0},
    "cggr_wrapper": {"tokens.num_buckets": 1},
    "collider": {"tokens.keep": 1.0},
    "galore": {"optimizer.matrix.smallest": 10_000},
    "muon_8bit": {"optimizer.matrix.state": {"kind": "float32"}, "optimizer.rest.state": {"kind": "float32"}},
    "mtp_shared_logits": {"objective.form.weights": [0.0, 0.0]},
    "mtp_heads": {"objective.form.weight": 0.0},
    "mtp_trunk_heads": {"objective.form.weight": 0.0},
    "mtp_sequential": {"objective.form.weight": 0.0, "objective.form.weight_end": 0.0},
    "random_rows": {"rows.keep": 1.0},
    "random_tokens": {"tokens.keep": 1.0},
    "fewer_rows": {"rows.fraction": 1.0},
    "static_suffix": {"updates.keep": 1.0},
    "dynamic_suffix": {"updates.smallest": 1.0},
    "dynamic_suffix_seed": {"updates.smallest": 1.0, "updates.largest": 1.0},
    "random_blocks": {"updates.keep": 1.0},
    "random_suffix": {"updates.smallest": 1.0},
}


# Gradients that are zero change no bit of a weight, but the rounding of the norm by which all are clipped.
ROUNDED = {"mtp_heads", "mtp_trunk_heads", "mtp_sequential"}
BOUND = 1e-5

# What a recipe needs on a model of four layers, or to do something in a few steps.
SMALL = {
    "cggr_model": {"tokens.router.layers": 1},
    "cggr_model_sequence": {"rows.layers": 1},
    "cggr_seed": {"tokens.router.layers": 1},
    "cggr_skip": {"tokens.entry": 1, "tokens.exit": 1},
    "cggr_tuned": {"tokens.entry": 1, "tokens.exit": 1},
    "dynamic_suffix": {
        "updates.cadence": {"first": 3, "shortest": 2},
        "updates.hysteresis": 1,
        "updates.threshold": 0.4,
    },
    "dynamic_suffix_seed": {
        "updates.cadence": {"first": 3, "shortest": 3, "longest": 3},
        "updates.stability": {"window": 2, "mean_change": 9.0, "variation": 9.0},
    },
    "random_blocks": {"updates.every": 2},
    "random_suffix": {"updates.every": 2},
}


@pytest.fixture(scope="module")
def baseline_rows(spec: RaceSpec, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("baseline")
    run_race(trial_of(spec, "baseline", folder, data_folder))
    return step_rows(folder)


E3 = [name for name in recipe_names() if name.startswith("e3/")]


def test_every_recipe_has_a_neutral_setting_here() -> None:
    assert set(NEUTRAL) == set(recipe_names()) - {"baseline", *E3}


@pytest.mark.parametrize("recipe", E3)
def test_the_suite_runs_five_steps_in_one_go_or_stopped(
    recipe: str, spec: RaceSpec, data_folder: Path, tmp_path: Path
) -> None:
    spec = replace(spec, budget_seconds=5 * STEP_SECONDS, milestones=())
    whole, parts = (trial_of(spec, recipe, tmp_path / name, data_folder) for name in ("whole", "parts"))
    summary, asked = run_race(whole), iter([False] * 4 + [True])
    with pytest.raises(StoppedError, match="stopped after 3 steps"):
        run_race(parts, stop=lambda: next(asked))
    assert run_race(parts)["val/loss"] == summary["val/loss"]
    assert summary["status"] == "finished" and summary["steps"] == 5
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "whole"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize(("recipe", "asked"), [("e3/mtp_only", True), ("e3/mtp_only", False), ("e3/baseline", True)])
def test_heads_are_kept_beside_an_ordinary_model_where_asked(
    recipe: str, asked: bool, spec: RaceSpec, data_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    spec = replace(spec, budget_seconds=2 * STEP_SECONDS, milestones=(), save_model=True, save_heads=asked)
    run_race(trial_of(spec, recipe, tmp_path, data_folder))
    model = load_file(tmp_path / "model" / "model.safetensors")
    assert not any("objective" in name or "heads" in name for name in model)
    heads = tmp_path / "heads" / "objective.safetensors"
    assert heads.exists() == (asked and recipe == "e3/mtp_only")
    if heads.exists():
        vocabulary_by_width = model["model.embed_tokens.weight"].shape
        found = load_file(heads)
        assert sorted(found) == [f"objective.heads.{i}.weight" for i in range(4)]
        assert all(head.shape == vocabulary_by_width and head.isfinite().all() for head in found.values())


@pytest.mark.parametrize("recipe", sorted(NEUTRAL))
def test_neutral_settings_are_the_baseline(
    recipe: str, spec: RaceSpec, data_folder: Path, tmp_path: Path, baseline_rows: dict[int, dict]
) -> None:
    run_race(trial_of(spec, recipe, tmp_path, data_folder, **NEUTRAL[recipe], **SMALL.get(recipe, {})))
    rows = step_rows(tmp_path)
    assert rows.keys() == baseline_rows.keys()
    for step, row in rows.items():
        for name in ("train/loss", "train/grad_norm", "tokens_seen", "fraction"):
            expected = baseline_rows[step][name]
            assert row[name] == (pytest.approx(expected, rel=BOUND) if recipe in ROUNDED else expected), (step, name)


# Of the suite's recipes, the one that has all that the others have.
@pytest.mark.parametrize("recipe", sorted({*recipe_names()} - {*E3} | {"e3/full"}))
def test_every_recipe_resumes_exactly(recipe: str, spec: RaceSpec, data_folder: Path, tmp_path: Path) -> None:
    values = dict(SMALL.get(recipe, {}))
    if recipe == "cggr_loss":
        values["tokens.dynamic"] = {"rule": "corrected"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run_race(trial_of(spec, recipe, whole, data_folder, **values))

    saving = replace(spec, checkpoint_every_seconds=6 * STEP_SECONDS)
    with pytest.raises(KilledError):
        run_race(trial_of(saving, recipe, parts, data_folder, **values), killed_after(7.5 * STEP_SECONDS))
    found = run_race(trial_of(saving, recipe, parts, data_folder, **values))
    kinds = [json.loads(line)["kind"] for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("resumed") == 1
    assert losses(parts) == losses(whole)
    layers = [row["updates/active_layers"] for row in step_rows(whole).values()]
    assert (min(layers) < max(layers)) == ("suffix" in recipe or "blocks" in recipe)
    same = ("val/loss", "steps", "tokens_seen", "labelled_tokens", "epochs", "train_seconds", "best_val_loss", "order")
    for name in same:
        assert found[name] == expected[name], name
    assert not (parts / "checkpoints").exists()


def test_a_checkpoint_of_a_gpu_is_left_alone_on_a_cpu(spec: RaceSpec, data_folder: Path, tmp_path: Path) -> None:
    saving = trial_of(replace(spec, checkpoint_every_seconds=6 * STEP_SECONDS), "baseline", tmp_path, data_folder)
    with pytest.raises(KilledError):
        run_race(saving, killed_after(7.5 * STEP_SECONDS))
    record, before = tmp_path / "run.json", sorted(tmp_path.rglob("*"))
    run = json.loads(record.read_text())
    record.write_text(json.dumps(run | {"device": {"type": "cuda", "name": "a large GPU"}}))
    with pytest.raises(ValueError, match=r"began on 'a large GPU' \(cuda\), and the device is 'cpu' here"):
        run_race(saving)
    assert sorted(tmp_path.rglob("*")) == before
    record.write_text(json.dumps(run))
    assert run_race(saving)["status"] == "finished"


def test_micro_batches_do_not_change_the_gradient(
    spec: RaceSpec, data_folder: Path, tmp_path: Path, baseline_rows: dict[int, dict]
) -> None:
    run_race(trial_of(replace(spec, micro_rows=1), "baseline", tmp_path, data_folder))
    expected = [baseline_rows[n]["train/loss"] for n in sorted(baseline_rows)]
    assert losses(tmp_path) == pytest.approx(expected, rel=2e-4)


def test_fewer_rows_reads_the_same_stream(spec: RaceSpec, data_folder: Path, tmp_path: Path) -> None:
    long = replace(spec, budget_seconds=40 * STEP_SECONDS)
    order = {
        recipe: run_race(trial_of(long, recipe, tmp_path / recipe, data_folder))["order"]
        for recipe in ("baseline", "fewer_rows")
    }
    assert set(order["baseline"]) == {"64", "128"} and set(order["fewer_rows"]) == {"64"}  # 160 and 80 rows
    assert order["baseline"]["64"] == order["fewer_rows"]["64"]


def test_real_clock_closes_its_ledgers_and_keeps_its_budget(spec: RaceSpec, data_folder: Path, tmp_path: Path) -> None:
    real = replace(spec, step_seconds=None, budget_seconds=2.0, checkpoint_every_seconds=0.7)
    summary = run_race(trial_of(real, "cggr_loss", tmp_path, data_folder))
    assert set(summary["ledgers"]) == set(LEDGERS)
    assert sum(summary["ledgers"].values()) == pytest.approx(summary["wall_seconds"], rel=0.005)
    assert 0 <= summary["overrun_seconds"] <= summary["last_step_seconds"]
    assert summary["ledgers"]["evaluation"] > 0 and summary["ledgers"]["checkpoint"] > 0
    fractions = [row["fraction"] for row in step_rows(tmp_path).values()]
    assert fractions == sorted(fractions) and fractions[0] == 0.0 and fractions[-1] < 1.0


def test_the_peak_of_memory_is_that_of_all_parts_of_a_run(
    spec: RaceSpec, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = trial_of(replace(spec, checkpoint_every_seconds=6 * STEP_SECONDS), "baseline", tmp_path, data_folder)

    monkeypatch.setattr("cggr_ray.milestones.peak_bytes", lambda device: 300)
    with pytest.raises(KilledError):
        run_race(trial, killed_after(7.5 * STEP_SECONDS))
    monkeypatch.setattr("cggr_ray.milestones.peak_bytes", lambda device: 200)
    run = Run(trial, lambda row: None)
    run.prepare()
    with run.loader:
        assert run.milestones.peak_bytes() == 300
        monkeypatch.setattr("cggr_ray.milestones.peak_bytes", lambda device: 500)
        assert run.milestones.peak_bytes() == 500


def test_a_finished_run_is_not_run_again(spec: RaceSpec, data_folder: Path, tmp_path: Path) -> None:
    trial = trial_of(spec, "baseline", tmp_path, data_folder)
    first = run_race(trial)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert run_race(trial)["val/loss"] == first["val/loss"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_gpu_that_is_not_there_is_a_clear_error(
    spec: RaceSpec, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="accepted: cpu, auto"):
        run_race(trial_of(replace(spec, device="cuda"), "baseline", tmp_path, data_folder))


def test_deterministic_algorithms_are_asked_for_while_a_run_lasts(
    spec: RaceSpec, data_folder: Path, tmp_path: Path
) -> None:
    asked = []

    def note(row: dict) -> None:
        asked.append(torch.are_deterministic_algorithms_enabled())

    short = replace(spec, budget_seconds=2 * STEP_SECONDS)
    run_race(trial_of(short, "baseline", tmp_path / "plain", data_folder), note)
    assert asked and not any(asked)
    asked.clear()
    run_race(trial_of(short, "baseline", tmp_path / "run", data_folder, **{"execution.deterministic": True}), note)
    assert asked and all(asked)
    assert not torch.are_deterministic_algorithms_enabled()
