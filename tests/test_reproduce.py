"""A recorded run is run again from its folder, and what is not the same is found."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import KilledError, killed_after
from typer.testing import CliRunner

from cggr_ray import cli, hub
from cggr_ray.clock import RaceClock, ReplayClock
from cggr_ray.data.dataset import DataSpec, prepare
from cggr_ray.data.sources import Problems
from cggr_ray.loop import run_race
from cggr_ray.models.presets import ModelSpec
from cggr_ray.progress import ProgressFile, read_progress
from cggr_ray.race import RaceSpec, Trial, plan_trials
from cggr_ray.recipe import load_recipe
from cggr_ray.reproduce import Recorded, compare, compare_loosely, read_by_step, read_recorded, reproduce

# A curriculum over the whole budget, a threshold that observes, and a decay: all of them read the clock.
VALUES = {
    "tokens.curriculum": {"target_at": 0.9},
    "tokens.dynamic": {"rule": "corrected"},
    "optimizer.schedule": {"kind": "linear", "warmup_tokens": 500},
}


def trial_in(race: Path, **changes: Any) -> Trial:
    spec = RaceSpec(
        recipes=("cggr_loss",),
        budget_seconds=1.2,
        global_rows=2,
        micro_rows=1,
        milestones=(0.3, 0.31, 0.6),
        model=ModelSpec(preset="tiny"),
        data=DataSpec(sources=(Problems(count=300),), row_tokens=64, val_documents=4),
        values=VALUES,
        device="cpu",
        checkpoint_every_seconds=0.4,
    )
    return plan_trials(replace(spec, **changes), race)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed and went on, on a clock whose steps take now this, now that."""
    trial = trial_in(tmp_path_factory.mktemp("race"))
    prepare(trial.race.data, Path(trial.data_folder))
    rng = random.Random(0)
    ticks = itertools.accumulate(rng.uniform(0.002, 0.045) for _ in itertools.count())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cggr_ray.loop.RaceClock", lambda: RaceClock(now=lambda: next(ticks)))
        with pytest.raises(KilledError):
            run_race(trial, killed_after(0.55))
        assert run_race(trial)["status"] == "finished"
    return Path(trial.folder)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The run's folder alone, elsewhere."""
    return Path(shutil.copytree(run, tmp_path / "moved"))


@pytest.fixture(scope="module")
def again(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A replay, by the command line, of a copy that has no race around it."""
    folder = tmp_path_factory.mktemp("again")
    shutil.copytree(run, folder / "run")
    shown = CliRunner().invoke(cli.app, ["reproduce", str(folder / "run"), "--out", str(folder / "out")])
    assert shown.exit_code == 0, shown.output
    validations = sum(kind == "milestone" for kind, _ in read_by_step(run))
    assert validations > 2 and f", {validations} validations" in shown.output
    assert "agrees bit for bit" in shown.output
    return folder / "out"


def test_progress_is_what_the_rows_say(run: Path) -> None:
    began = np.fromfile(run / "progress.f64", "<f8")
    summary = json.loads((run / "summary.json").read_text())
    assert len(began) == summary["steps"] > 5 and began[0] >= 0
    budget = summary["budget_seconds"]
    steps = {step: row for (kind, step), row in read_by_step(run).items() if kind == "step"}
    assert steps
    for step, row in steps.items():
        assert row["fraction"] == min(1.0, began[step - 1] / budget)


def test_a_replay_has_every_step_and_every_fraction(run: Path, again: Path) -> None:
    assert (again / "progress.f64").read_bytes() == (run / "progress.f64").read_bytes()
    before, after = read_by_step(run), read_by_step(again)
    steps = json.loads((run / "summary.json").read_text())["steps"]
    assert [step for kind, step in after if kind == "step"] == list(range(1, steps + 1))
    assert {key for key in before if key[0] == "milestone"} == {key for key in after if key[0] == "milestone"}
    for key in before:
        assert after[key].get("train/loss_kept_positions") == before[key].get("train/loss_kept_positions"), key


def test_a_run_with_fewer_rows_than_steps_is_reproduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two rows, while the kept part of the positions falls."""
    monkeypatch.setattr("cggr_ray.recorder.ROWS", 12)
    trial = trial_in(tmp_path / "race", step_seconds=0.03, milestones=(0.5,))
    prepare(trial.race.data, Path(trial.data_folder))
    with pytest.raises(KilledError):
        run_race(trial, killed_after(0.55))
    run_race(trial)
    verdict = reproduce(Path(trial.folder), tmp_path / "again", print)
    before, after = read_by_step(Path(trial.folder)), read_by_step(tmp_path / "again")
    steps = [step for kind, step in before if kind == "step"]
    assert 5 < len(steps) < 20 and len(after) > 40 and verdict.agrees, verdict.lines
    kept = "router/kept_fraction"
    assert any(before["step", step][kept] != after["step", step][kept] for step in steps)
    other = after | {("step", steps[-1] - 1): after["step", steps[-1] - 1] | {kept: 0.5}}
    recorded = read_recorded(Path(trial.folder))
    assert not compare(recorded, recorded.summary, other).agrees


ALONE = """
import os, sys
from pathlib import Path
import torch
from test_reproduce import DataSpec, Problems, prepare, reproduce, run_race, trial_in

folder, data = Path(sys.argv[1]), DataSpec(sources=(Problems(count=400),), row_tokens=256, val_documents=4)
trial = trial_in(folder, data=data, global_rows=8, micro_rows=8, step_seconds=0.6, milestones=())
prepare(data, Path(trial.data_folder))
run_race(trial)
verdict = reproduce(Path(trial.folder), folder / "again", print)
print(f"{torch.get_num_threads()} threads", *verdict.lines, sep="\\n")
"""


def test_a_run_of_a_process_that_never_said_how_many_threads_is_reproduced(tmp_path: Path) -> None:
    """With matrices so large that it matters how many threads share a product, in a process of their own."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    if "1 threads" in done.stdout.splitlines():
        pytest.skip("one core: nothing is shared among threads")
    assert "agrees bit for bit" in done.stdout


def altered(rows: dict[tuple[str, int], dict[str, Any]], kind: str, name: str) -> Iterator[dict[tuple[str, int], Any]]:
    for key in rows:
        if key[0] == kind and name in rows[key]:
            yield rows | {key: rows[key] | {name: np.nextafter(rows[key][name], 9)}}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("step", "train/grad_norm"), ("step", "fraction"), ("step", "router/kept_fraction"), ("milestone", "val/loss")],
)
def test_the_last_bit_of_any_row_is_seen(run: Path, again: Path, kind: str, name: str) -> None:
    recorded, rows = read_recorded(run), read_by_step(again)
    summary = json.loads((again / "summary.json").read_text())
    assert compare(recorded, summary, rows).agrees
    # Rows that the recorded run does not have are nobody's to compare.
    wrong = [w for w in altered(rows, kind, name) if any(w[key] != rows[key] for key in recorded.rows)]
    assert wrong
    for rows_of in wrong:
        verdict = compare(recorded, summary, rows_of)
        assert not verdict.agrees and name in verdict.lines[1]


def test_a_total_a_hash_and_a_lost_row_are_seen(run: Path, again: Path) -> None:
    recorded, rows = read_recorded(run), read_by_step(again)
    summary = json.loads((again / "summary.json").read_text())
    assert not compare(recorded, summary | {"tokens_seen": summary["tokens_seen"] + 1}, rows).agrees
    marked = replace(recorded, summary=recorded.summary | {"order": {"64": "a"}})
    assert compare(marked, summary | {"order": {"64": "a", "128": "b"}}, rows).agrees
    assert not compare(marked, summary | {"order": {"64": "b"}}, rows).agrees
    missing = {key: row for key, row in rows.items() if key != ("milestone", recorded.summary["steps"])}
    assert not compare(recorded, summary, missing).agrees


@pytest.mark.parametrize("what", ["clock", "seed"])
def test_another_trial_does_not_agree(what: str, copy: Path, tmp_path: Path) -> None:
    if what == "clock":
        began = np.fromfile(copy / "progress.f64", "<f8")
        began[1] += 0.4 * (began[2] - began[1])
        began.tofile(copy / "progress.f64")
    else:
        plain = json.loads((copy / "run.json").read_text())
        plain["seed"] += 1
        (copy / "run.json").write_text(json.dumps(plain))
    said: list[str] = []
    verdict = reproduce(copy, tmp_path / "out", said.append)
    assert not verdict.agrees and verdict.lines[0].startswith("does not agree: ")


@pytest.mark.parametrize("record", ["race.json", "tuning.json", "sweep.json"])
def test_data_of_the_race_is_read_and_not_written(run: Path, tmp_path: Path, record: str) -> None:
    data = run.parents[1] / "data"
    shutil.copytree(run.parents[1], tmp_path / "race", ignore=shutil.ignore_patterns("race.json"))
    moved = tmp_path / "race" / "runs" / run.name
    (tmp_path / "race" / record).write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "race" / "data").rglob("*")}
    said: list[str] = []
    assert reproduce(moved, tmp_path / "out", said.append).agrees
    assert not said and not (tmp_path / "out" / "data").exists()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "race" / "data").rglob("*")} == before
    assert data.is_dir()


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("run.json", r"run\.json' does not exist; accepted: the folder of a run that has ended"),
        ("summary.json", r"summary\.json' does not exist; accepted: the folder of a run that has ended"),
        ("progress.f64", r"progress\.f64' does not exist; accepted: a run that kept when its steps began"),
        ("run.json spec", r"run\.json: no 'spec'; accepted: an object with trial_id, seed, values, parts, spec"),
        ("run.json micro_rows", r"run\.json: no 'micro_rows'; accepted: an object with"),
        ("summary.json order", r"summary\.json: no 'order'; accepted: an object with steps"),
        ("short", r"progress\.f64 has \d+ steps; accepted: the \d+ of the run"),
        ("torn", r"progress\.f64' has \d+ bytes; accepted: 8 a step"),
        ("still", r"seconds that do not rise; accepted"),
        ("out", r"out' is not empty; accepted: a new or empty folder"),
    ],
)
def test_a_folder_without_what_it_takes_is_refused(broken: str, said: str, copy: Path, tmp_path: Path) -> None:
    file = copy / "progress.f64"
    if broken.endswith(("json", "f64")):
        (copy / broken).unlink()
    elif " " in broken:
        name, key = broken.split()
        plain = json.loads((copy / name).read_text())
        del plain[key]
        (copy / name).write_text(json.dumps(plain))
    elif broken in ("short", "torn"):
        file.write_bytes(file.read_bytes()[: -8 if broken == "short" else -3])
    elif broken == "still":
        np.zeros(file.stat().st_size // 8, "<f8").tofile(file)
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(ValueError, match=said):
        reproduce(copy, tmp_path / "out", print)


def test_a_run_that_ended_earlier_does_not_agree(copy: Path, tmp_path: Path) -> None:
    """As one that diverged, where the replay does not."""
    began = np.fromfile(copy / "progress.f64", "<f8")
    began[:3].tofile(copy / "progress.f64")
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"steps": 3, "train_seconds": began[3]}))
    verdict = reproduce(copy, tmp_path / "out", print)
    assert verdict.lines == ("does not agree: the recorded run ended after 3 steps, this one goes on",)
    assert not verdict.agrees


def altered_run(copy: Path, **changed: Any) -> Path:
    run = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(run | changed))
    return copy


def test_a_cache_of_activations_is_not_exact(copy: Path) -> None:
    assert read_recorded(copy).is_exact
    resting = load_recipe("static_suffix")
    cached = resting.with_values({"execution.activation_cache": {}})
    assert read_recorded(altered_run(copy, parts=resting.to_plain())).is_exact
    assert not read_recorded(altered_run(copy, parts=cached.to_plain())).is_exact


def test_a_gpu_s_run_is_exact_by_deterministic_algorithms_on_a_gpu_of_the_same_name(copy: Path) -> None:
    h100, h200 = ({"type": "cuda", "name": name, "memory_mib": 1.0} for name in ("NVIDIA H100", "NVIDIA H200"))
    assert not read_recorded(altered_run(copy, device=h100)).is_exact
    repeating = load_recipe("baseline").with_values({"execution.deterministic": True})
    recorded = read_recorded(altered_run(copy, parts=repeating.to_plain()))
    assert recorded.is_exact
    assert recorded.is_of_another_gpu(h200) and not recorded.is_of_another_gpu(h100)


def test_a_gpu_s_run_needs_a_gpu(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    altered_run(copy, device={"type": "cuda", "name": "NVIDIA H100", "memory_mib": 1.0})
    with pytest.raises(ValueError, match="was run on 'NVIDIA H100', and no GPU is visible; accepted: a machine with a"):
        reproduce(copy, tmp_path / "out", print)
    assert not (tmp_path / "out").exists()


def test_another_commit_of_the_model_is_said(copy: Path, tmp_path: Path) -> None:
    model = json.loads((copy / "run.json").read_text())["model"]
    assert model["commit"] is None, "a preset has none"
    altered_run(copy, model=model | {"commit": "a" * 40})
    said: list[str] = []
    reproduce(copy, tmp_path / "out", said.append)
    assert f"model commit: {'a' * 40} then, None now" in said


def test_the_commit_that_a_hub_name_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--a--b"
    for commit, branch in (("a" * 40, "main"), ("b" * 40, "old")):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    assert hub.commit("a/b") == hub.commit(f"a/b@{'a' * 40}") == "a" * 40
    assert hub.commit("a/b@old") == "b" * 40 and hub.commit("a/b@new") is hub.commit("c/d") is None


def test_a_gpu_s_run_agrees_within_its_seeds(tmp_path: Path) -> None:
    def recorded(seeds: list[float]) -> Recorded:
        for number, loss in enumerate(seeds):
            folder = tmp_path / "runs" / f"a-s{number}"
            folder.mkdir(parents=True, exist_ok=True)
            of = {"recipe": "a", "status": "finished", "val/loss": loss}
            (folder / "summary.json").write_text(json.dumps(of))
        return Recorded(
            tmp_path / "runs" / "a-s0", {"recipe": "a", "device": {"type": "cuda"}}, {"val/loss": 1.0}, [], {}
        )

    alone = recorded([1.0])
    assert compare_loosely(alone, {"val/loss": 1.0099}).agrees
    assert not compare_loosely(alone, {"val/loss": 1.0101}).agrees
    (tmp_path / "race.json").write_text("{}")
    # t(0.975, 2) = 4.302653; losses 0.9, 1.0, 1.1 have s = 0.1.
    half = 4.302653 * 0.1 / 3**0.5
    three = recorded([0.9, 1.0, 1.1])
    assert compare_loosely(three, {"val/loss": 1 + half - 1e-4}).agrees
    assert not compare_loosely(three, {"val/loss": 1 - half - 1e-4}).agrees
    assert not compare_loosely(three, {"val/loss": None}).agrees
    assert "over 3 seeds" in compare_loosely(three, {"val/loss": 1.0}).lines[0]


def test_a_progress_file_goes_on_where_a_checkpoint_stands(tmp_path: Path) -> None:
    path = tmp_path / "progress.f64"
    first = ProgressFile(path, 0)
    for second in (0.0, 0.1, 0.30000000000000004):
        first.add(second)
    assert path.read_bytes() == b""
    first.flush()
    first.add(7.0)
    assert read_progress(path) == [0.0, 0.1, 0.30000000000000004]
    later = ProgressFile(path, 2)
    later.add(0.5)
    later.flush()
    later.flush()
    assert np.fromfile(path, "<f8").tolist() == [0.0, 0.1, 0.5]


def test_a_replay_clock_says_what_was_said() -> None:
    clock = ReplayClock([0.25, 1.5, 2.0], 3.5)
    said = []
    for _ in range(3):
        clock.switch("data_wait")
        said.append(clock.train_seconds)
        with clock.ledger("evaluation"):
            clock.switch("reporting")
        clock.switch("train")
        clock.tick()
    assert said == [0.25, 1.5, 2.0] and clock.train_seconds == 3.5
