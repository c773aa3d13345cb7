"""A sweep through real Ray Tune, on the CPU, small: stopped, killed, taken up again, and raced."""

from __future__ import annotations

import json
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import MARK, PATIENCE, left_behind, saved_steps, shell, started, until_saved
from small_races import cggr_ray, write_race

import trainables  # noqa: F401 - settles Ray's settings before Ray is imported
from cggr_ray.race import load_race, plan_trials
from cggr_ray.recipe import load_recipe
from trainables.history import read_events
from trainables.schedulers import Asha, replay

pytestmark = [pytest.mark.slow, pytest.mark.ray]
BUDGET = 3.0


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "sweep.jsonl"
    return [event for event in read_events(path)[0] if event["kind"] == kind] if path.is_file() else []


@dataclass(frozen=True)
class Flow:
    """What SIGTERM has left: exit code, checkpoints by run, trials that were drawn and that had ended, processes."""

    folder: Path
    output: str
    stopped: int
    saved: dict[str, list[int]]
    drawn: list[str]
    ended: list[str]
    left_behind: list[str]


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """A sweep that gets SIGTERM in its first trial, then SIGKILL after this one's end and while its second runs."""
    folder = tmp_path_factory.mktemp("flow")
    write_race(folder, budget=BUDGET, more="step_seconds = 0.05\ncheckpoint_every_seconds = 0.2")
    file, sweep = folder / "mine.toml", folder / "my sweep"
    file.write_text('race = "small.toml"\nspace = "baseline"\n[search]\ntrials = 3\nseed = 1\n')
    environment = shell(**{MARK: str(folder)})
    first = started("sweep", file, "--out", sweep, environment=environment)
    until_saved(first, sweep / "runs" / "t0000")
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=PATIENCE)[0]
    saved = {run.name: saved_steps(run) for run in (sweep / "runs").iterdir()}
    drawn, ended = ([event["trial_id"] for event in events(sweep, kind)] for kind in ("trial", "end"))
    seen = Flow(sweep, output, first.returncode, saved, drawn, ended, left_behind(str(folder)))
    second = started("sweep", "--resume", sweep, environment=environment)
    until_saved(second, sweep / "runs" / "t0001")
    second.send_signal(signal.SIGKILL)
    second.communicate()
    return seen


@pytest.fixture(scope="module")
def killed(flow: Flow) -> Path:
    return flow.folder


def test_sigterm_saves_the_trials_that_run_and_ends_ray(flow: Flow) -> None:
    assert flow.stopped == 143, flow.output
    assert "stopped by SIGTERM; --resume" in flow.output
    assert flow.drawn == list(flow.saved) == ["t0000"] and flow.ended == []
    assert flow.left_behind == []
    lines = (flow.folder / "runs" / "t0000" / "metrics.jsonl").read_text().splitlines()
    resumed = [row["step"] for row in map(json.loads, lines) if row["kind"] == "resumed"]
    assert resumed == [max(flow.saved["t0000"])]


def test_a_killed_sweep_goes_on_where_it_stood(killed: Path) -> None:
    first = {path: path.read_bytes() for path in (killed / "runs" / "t0000").rglob("*") if path.is_file()}
    known = (killed / "sweep.jsonl").read_bytes()
    assert [event["trial_id"] for event in events(killed, "end")] == ["t0000"]
    with (killed / "sweep.jsonl").open("ab") as file:
        file.write(b'{"kind": "resu')
    done = cggr_ray("sweep", "--resume", killed)

    assert (killed / "sweep.jsonl").read_bytes().startswith(known + b'{"kind": "session"')
    assert {path: path.read_bytes() for path in first} == first
    resumed = [json.loads(line) for line in (killed / "runs" / "t0001" / "metrics.jsonl").read_text().splitlines()]
    assert any(row["kind"] == "resumed" and row["step"] > 0 for row in resumed)

    ends = {event["trial_id"]: event["status"] for event in events(killed, "end")}
    assert len(events(killed, "end")) == 3 and set(ends.values()) <= {"finished", "stopped"}
    stopped = replay(Asha().build(BUDGET), read_events(killed / "sweep.jsonl")[0])
    assert stopped == {trial_id for trial_id, status in ends.items() if status == "stopped"}
    seen = [(event["trial_id"], round(8 * event["train_seconds"] / BUDGET)) for event in events(killed, "result")]
    assert len(set(seen)) == len(seen)
    assert "best recipe" in done.stdout
    typed = shlex.split(done.stdout.partition("race it: ")[2])
    assert typed == ["cggr-ray", "race", str(killed / "best" / "race.toml"), "--seeds", "1,2,3"]


def test_its_draws_are_those_of_a_sweep_that_was_not_killed(killed: Path) -> None:
    rates = np.array([event["values"]["optimizer.matrix.lr"] for event in events(killed, "trial")])
    assert len(set(rates)) == 3
    generators = [np.random.default_rng((1, number, 0)) for number in range(3)]
    again = [np.exp(generator.uniform(np.log(5e-4), np.log(2e-2))) for generator in generators]
    np.testing.assert_allclose(rates, again, rtol=1e-12)


def test_its_best_recipe_can_be_raced_against_what_it_started_from(killed: Path) -> None:
    best = load_recipe(str(killed / "best" / "baseline.toml"))
    finished = {e["trial_id"]: e["val/loss"] for e in events(killed, "end") if e["status"] == "finished"}
    values = {event["trial_id"]: event["values"] for event in events(killed, "trial")}
    lowest = values[min(finished, key=lambda trial_id: finished[trial_id])]
    assert best.name == "baseline-best"
    assert best.optimizer.matrix.lr == lowest["optimizer.matrix.lr"]
    assert best.optimizer.schedule.warmup_tokens == 1000
    race = load_race(str(killed / "best" / "race.toml"))
    race.check()
    default, raced = (trial.recipe for trial in plan_trials(race, killed))
    assert raced == best and default == load_recipe("baseline").with_values(race.values)
