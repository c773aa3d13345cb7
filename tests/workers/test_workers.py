"""Trials of two workers against the same trials of one: the same steps, the same weights, one record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import Job, run, together
from safetensors.torch import load_file

from cggr_ray.calibrate_command import calibrate
from cggr_ray.calibration import Settings
from cggr_ray.data.dataset import DataSpec, prepare
from cggr_ray.data.sources import Problems
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import RaceSpec, Trial, plan_trials
from cggr_ray.reproduce import reproduce

pytestmark = pytest.mark.slow

STEP_SECONDS, STEPS, WIDTH = 0.5, 5, 32
SPEC = RaceSpec(
    budget_seconds=STEPS * STEP_SECONDS,
    step_seconds=STEP_SECONDS,
    global_rows=4,
    micro_rows=2,
    milestones=(0.5,),
    model=ModelSpec(preset="tiny"),
    data=DataSpec(sources=(Problems(count=300),), row_tokens=WIDTH, val_documents=2),
    values={"optimizer.schedule.warmup_tokens": 1000},
    device="cpu",
)
FEW = replace(SPEC, data=DataSpec(sources=(Problems(count=6),), row_tokens=WIDTH, val_documents=2, val_per_mille=500))
AT_ONCE = {"full_until": 0.0, "target_at": 0.0}
RANDOM_ROWS = {"kind": "random_rows", "keep": 0.5, "curriculum": AT_ONCE}
EIGHT_BITS = {f"optimizer.{part}.state": {"kind": "int8_blockwise"} for part in ("matrix", "rest")}
PROBE = {"kind": "selected_tokens", "score": "loss", "plan": "before", "router": {"kind": "probe", "layers": 1}}
STALE = {"kind": "selected_tokens", "score": "loss", "plan": "before", "router": {"kind": "stale_scores"}}
SUFFIX = {
    f"updates.{key}": value
    for key, value in (
        ("cadence", {"first": 2, "shortest": 2}),
        ("hysteresis", 1),
        ("threshold", 0.3),
        ("full_until", 0.0),
        ("full_from", 1.0),
    )
}
# Recipes whose every number is that of one worker, bit for bit: micro-batches and draws are the same, and a sum of two
# has one order. By name: recipe, race, values.
EXACT: dict[str, tuple[str, RaceSpec, dict[str, Any]]] = {
    "baseline": ("baseline", SPEC, {}),
    "own scores": ("cggr_loss", SPEC, {"tokens.dynamic": {"rule": "corrected"}, "tokens.curriculum": AT_ONCE}),
    "random rows and positions": ("random_tokens", SPEC, {"tokens.curriculum": AT_ONCE, "rows": RANDOM_ROWS}),
    "stale scores": ("cggr_loss", FEW, {"tokens": STALE | {"curriculum": AT_ONCE}}),
    "fewer rows in 8 bits": ("fewer_rows", replace(SPEC, micro_rows=1), EIGHT_BITS),
    "suffix": ("dynamic_suffix", SPEC, SUFFIX),
    "diverges": (
        "baseline",
        replace(SPEC, budget_seconds=1000 * STEP_SECONDS),
        {"optimizer.matrix.lr": 1e30, "optimizer.rest.lr": 1e30},
    ),
}
GALORE = {"optimizer.matrix.rank": 16, "optimizer.matrix.smallest": 16, "optimizer.matrix.refresh_every": 3}
# The others: what one worker has to do to be near them. A probe learns from other micro-batches at a time.
NEAR = {
    # Whole micro-batches of one worker: bases follow the gradient of all rows, as they do with several workers.
    "galore": ("galore", SPEC, GALORE),
    "probe": ("cggr_loss", SPEC, {"tokens": PROBE | {"curriculum": AT_ONCE}}),
}
# Two steps of warm-up, of a pass each, then the second step.
SCARCE_AT = 4
UNTIED = ModelSpec(preset="tiny", tie_embeddings=False)
STOPS_AFTER, SAVING = 3.2 * STEP_SECONDS, {"checkpoint_every_seconds": 2 * STEP_SECONDS, "micro_rows": 1}
ASKED_AFTER = 2
# Learned by a router and a projected optimizer: all that a checkpoint of several workers has to hold.
RESUMED = ("galore", {"tokens": PROBE, **GALORE})


def trial_of(spec: RaceSpec, recipe: str, folder: Path, values: dict[str, Any], data: Path) -> Trial:
    arm = replace(spec, recipes=(recipe,), arms={recipe: values} if values else {})
    arm.check()
    return plan_trials(arm, folder)[0].placed(folder, data)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Prepared data by the number of problems."""
    folders = {}
    for spec in (SPEC, FEW):
        count = spec.data.sources[0].count  # type: ignore[union-attr]
        folders[count] = tmp_path_factory.mktemp("data")
        prepare(spec.data, folders[count])
    return folders


@pytest.fixture(scope="module")
def pairs(data: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trials of two workers, in one folder each."""
    folder = tmp_path_factory.mktemp("pairs")

    def trial(name: str, recipe: str, spec: RaceSpec, values: dict[str, Any], **changes: Any) -> Trial:
        spec = replace(spec, workers=2, **changes)
        return trial_of(spec, recipe, folder / name, values, data[spec.data.sources[0].count])  # type: ignore[union-attr]

    jobs = [Job(trial(name, recipe, *rest)) for name, (recipe, *rest) in (EXACT | NEAR).items()]
    jobs.append(Job(trial("scarce", "baseline", SPEC, {}), scarce_at=SCARCE_AT))
    recipe, values = RESUMED
    jobs.append(Job(trial("whole", recipe, SPEC, values, **SAVING)))
    parts = trial("parts", recipe, SPEC, values, **SAVING)
    jobs += [Job(parts, stops_after=STOPS_AFTER), Job(parts)]
    asked, saved = (trial(name, recipe, SPEC, values, micro_rows=1) for name in ("asked", "saved"))
    jobs += [Job(asked, asked_after=ASKED_AFTER), Job(asked)]
    jobs += [Job(saved, stops_after=SPEC.budget_seconds / 2, saved=True), Job(saved)]
    together(jobs, trial("killed", "baseline", SPEC, {}))
    return folder


def held(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"held-{rank}.safetensors") for rank in range(len(list(folder.glob("held-*"))))]


def rows(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "wall_seconds"} for row in found if row["kind"] == kind]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return {k: v for k, v in found.items() if k not in ("wall_seconds", "ledgers")}


def alone(name: str, spec: RaceSpec, tmp_path: Path, data: dict[int, Path], scarce_at: int | None = None) -> None:
    recipe, race, values = (EXACT | NEAR).get(name, EXACT["baseline"])
    count = race.data.sources[0].count  # type: ignore[union-attr]
    run(Job(trial_of(spec, recipe, tmp_path, values, data[count]), scarce_at))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(bits(found[key]), bits(expected[key]))]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A run that diverges holds what equals nothing, not even itself."""
    return tensor.flatten().view(torch.uint8)


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Of the weights. A basis may turn within directions that are equally strong."""
    assert found.keys() == expected.keys()
    for key in (key for key in expected if key.startswith("model.")):
        torch.testing.assert_close(
            found[key], expected[key], rtol=2e-3, atol=1e-4, msg=lambda text, key=key: key + text
        )


@pytest.mark.parametrize("name", sorted(EXACT))
def test_two_workers_are_one_worker_bit_for_bit(name: str, pairs: Path, data: dict[int, Path], tmp_path: Path) -> None:
    alone(name, EXACT[name][1], tmp_path, data)
    first, second = held(pairs / name)
    assert_same(first, second)
    assert_same(first, held(tmp_path)[0])
    assert rows(pairs / name) == rows(tmp_path) and len(rows(tmp_path)) >= STEPS
    assert rows(pairs / name, "milestone") == rows(tmp_path, "milestone")
    assert summary(pairs / name) == summary(tmp_path)


def test_what_is_compared_does_something(pairs: Path) -> None:
    kept = {name: [row["router/kept_fraction"] for row in rows(pairs / name)] for name in EXACT}
    for name in ("own scores", "random rows and positions", "stale scores"):
        assert min(kept[name]) < 1, name
    assert summary(pairs / "stale scores")["epochs"]["problems"] > 1
    assert min(row["updates/active_layers"] for row in rows(pairs / "suffix")) < 4
    assert summary(pairs / "diverges")["status"] == "diverged" and summary(pairs / "baseline")["status"] == "finished"
    assert summary(pairs / "baseline")["tokens_seen"] > summary(pairs / "fewer rows in 8 bits")["tokens_seen"]


def test_galore_of_two_workers_is_that_of_one_to_rounding(pairs: Path, data: dict[int, Path], tmp_path: Path) -> None:
    alone("galore", replace(SPEC, micro_rows=4), tmp_path, data)
    first, second = held(pairs / "galore")
    assert_same(first, second)
    assert_near(first, held(tmp_path)[0])
    found, wanted = ([row["train/loss"] for row in rows(folder)] for folder in (pairs / "galore", tmp_path))
    assert found == pytest.approx(wanted, rel=1e-4)


def test_probes_of_two_workers_are_one_probe_and_choose_nearly_as_one_worker_does(
    pairs: Path, data: dict[int, Path], tmp_path: Path
) -> None:
    alone("probe", SPEC, tmp_path, data)
    first, second = held(pairs / "probe")
    assert_same(first, second)
    found, expected = rows(pairs / "probe"), rows(tmp_path)
    assert found[0]["train/loss_kept_positions"] == pytest.approx(expected[0]["train/loss_kept_positions"], rel=0.05)
    exact = ("step", "fraction", "tokens_seen", "router/kept_fraction", "train/learning_rate")
    assert [[row[key] for key in exact] for row in found] == [[row[key] for key in exact] for row in expected]
    assert not torch.equal(first["router.into"], held(tmp_path)[0]["router.into"])


def test_memory_that_runs_out_in_one_worker_makes_all_micro_batches_smaller(
    pairs: Path, data: dict[int, Path], tmp_path: Path
) -> None:
    # One worker has two passes a step.
    alone("baseline", SPEC, tmp_path, data, scarce_at=2 * SCARCE_AT)
    first, second = held(pairs / "scarce")
    assert_same(first, second)
    assert_near(first, held(tmp_path)[0])
    found, expected = summary(pairs / "scarce"), summary(tmp_path)
    assert (
        (found["micro_rows"], found["out_of_memory"]) == (expected["micro_rows"], expected["out_of_memory"]) == (1, 1)
    )
    assert found["order"] == expected["order"] and found["val/loss"] == pytest.approx(expected["val/loss"], rel=1e-5)
    events = [rows(folder, "out_of_memory") for folder in (pairs / "scarce", tmp_path)]
    assert [[row["step"] for row in some] for some in events] == [[2], [2]]
    assert [row["message"] for row in events[0]] == ["in worker 1 of 2"]


@pytest.mark.parametrize("name", ["parts", "asked", "saved"])
def test_two_workers_resume_exactly(name: str, pairs: Path) -> None:
    assert len(rows(pairs / name, "resumed")) == 1 and not rows(pairs / "whole", "resumed")
    for found, expected in zip(held(pairs / name), held(pairs / "whole"), strict=True):
        assert_same(found, expected)
    assert summary(pairs / name) == summary(pairs / "whole")
    last = {row["step"]: row["train/grad_norm"] for row in rows(pairs / name)}
    assert last == {row["step"]: row["train/grad_norm"] for row in rows(pairs / "whole")}


def test_a_stop_that_worker_0_alone_is_asked_for_ends_both_at_one_step(pairs: Path) -> None:
    said = [(pairs / "asked" / f"stopped-{rank}").read_text() for rank in range(2)]
    assert said == [f"galore-s0: stopped after {ASKED_AFTER} steps, can go on from there"] * 2
    # No checkpoint was due before: this one is of the step at which they stopped.
    assert [row["step"] for row in rows(pairs / "asked", "resumed")] == [ASKED_AFTER]


def test_a_milestone_of_two_workers_is_reported_once_there_is_a_checkpoint_of_it(pairs: Path) -> None:
    (half,) = (row["step"] for row in rows(pairs / "whole", "milestone") if row["fraction"] < 1)
    assert (pairs / "saved" / "stopped-0").read_text() == f"milestone of step {half} after step_{half:08d}"
    assert [row["step"] for row in rows(pairs / "saved", "resumed")] == [half]


def test_one_worker_writes(pairs: Path) -> None:
    for name in EXACT:
        steps = [row["step"] for row in rows(pairs / name)]
        assert steps == sorted(set(steps))
        files = {path.name for path in (pairs / name).rglob("*") if not path.name.startswith("held-")}
        assert files == {"metrics.jsonl", "progress.f64", "run.json", "summary.json"}
        assert len((pairs / name / "progress.f64").read_bytes()) == 8 * summary(pairs / name)["steps"]
        assert json.loads((pairs / name / "run.json").read_text())["spec"]["workers"] == 2


def test_a_worker_that_is_killed_ends_the_others(pairs: Path) -> None:
    # How they ended is in their exit codes, which `together` looks at.
    assert (pairs / "killed" / "said").read_text() and not (pairs / "killed" / "summary.json").exists()
    assert 0 < len(rows(pairs / "killed")) < STEPS


def test_one_worker_reproduces_what_two_did(pairs: Path, tmp_path: Path) -> None:
    verdict = reproduce(pairs / "baseline", tmp_path / "again", lambda text: None)
    assert verdict.agrees and "accepted: a difference of" in verdict.lines[0]
    assert rows(tmp_path / "again") == rows(pairs / "baseline")


def test_calibration_tries_one_worker() -> None:
    with pytest.raises(ValueError, match="workers = 2; accepted: workers = 1"):
        calibrate("cpu", None, {"workers": 2, "device": "cpu"}, Settings(), False)


def test_a_trial_of_two_workers_is_not_run_by_one(data: dict[int, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers = 2 in a group of 1; accepted: as many"):
        run(Job(trial_of(replace(SPEC, workers=2), "baseline", tmp_path, {}, data[300])))


@pytest.mark.parametrize(
    ("recipe", "changes", "values", "message"),
    [
        ("baseline", {"workers": 3}, {}, "4 rows a step with workers = 3; accepted: a multiple"),
        ("baseline", {"workers": 0}, {}, "workers = 0; accepted: 1 or more"),
        ("fewer_rows", {"workers": 2}, {"rows.fraction": 0.75}, "3 rows a step with workers = 2"),
        ("galore", {"workers": 2}, {"optimizer.project_early": True}, "project_early with workers = 2"),
        ("static_suffix", {"workers": 2, "model": UNTIED}, {"execution.activation_cache": {}}, "activation_cache with"),
    ],
)
def test_what_several_workers_cannot_run_is_refused(
    recipe: str, changes: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SPEC, recipes=(recipe,), arms={recipe: values}, **changes).check()
