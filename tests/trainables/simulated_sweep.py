"""Tune without Ray: the sweep's own searcher, scheduler, stopper and callback, called as Tune calls them, one process.

A trial is a number, its weight, that each interval moves by what its values say; it leaves on disk what a run leaves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

import trainables  # noqa: F401 - settles Ray's settings before Ray is imported
from cggr_ray import checkpoint
from cggr_ray.race import RaceSpec
from search_spaces.domains import Choice, Domains, LogUniform, Uniform
from trainables.history import History
from trainables.schedulers import replay
from trainables.settings import Search, SweepSpec
from trainables.sweep import Sweep
from trainables.sweep_driver import Draws, OwnBudget, Reports

BUDGET = 8.0
RATE, START = "optimizer.matrix.lr", "optimizer.schedule.decay_start"
DOMAINS: Domains = {RATE: LogUniform(5e-4, 2e-2), START: Uniform(0.2, 0.8)}
SMALL: Domains = {RATE: Choice((0.001, 0.002, 0.004)), START: Choice((0.25, 0.5))}


class Killed(Exception):
    """The driver, after so many events."""


def spec_of(domains: Domains = DOMAINS, **search: Any) -> SweepSpec:
    race = RaceSpec(recipes=("baseline",), budget_seconds=BUDGET, milestones=(0.5,))
    return SweepSpec.from_plain(
        {**SweepSpec("mine", "baseline", domains, race, Search()).to_plain(), "search": {"trials": 8, **search}}
    )


class FakeTrial:
    """A trial as Tune has it, and the worker behind it."""

    def __init__(self, config: dict[str, Any], tune_id: str, spec: SweepSpec, sweep: Sweep) -> None:
        self.config, self.trial_id = config, tune_id
        self.last_result: dict[str, Any] = {}
        self.error_file = None
        self._saved = sweep.spec.search.scheduler.parks
        self._folder = Path(config["trial"]["folder"])
        self._rate = config["trial"]["recipe"]["optimizer"]["matrix"]["lr"]
        self._milestones = [*sweep.race.milestones, 1.0]
        self._state = {"format": checkpoint.FORMAT, "weight": 10.0, "done": 0, "ledgers": {}, "wall_seconds": 0.0}
        saved = sorted(self._folder.glob("checkpoints/step_*"))
        if saved:
            self._state = json.loads((saved[-1] / "state.json").read_text())

    def report(self) -> dict[str, Any] | None:
        """The next report; None where the run has returned."""
        if self._state["done"] == len(self._milestones):
            return None
        fraction = self._milestones[self._state["done"]]
        self._state["done"] += 1
        # The best rate is 0.01; a weight of one's own tells trials apart.
        self._state["weight"] *= 0.7 + abs(self._rate - 0.01) * 10
        row = {
            "trial": self.config["trial_id"],
            "kind": "milestone",
            "step": self._state["done"],
            "train_seconds": fraction * BUDGET + 1e-6,
            "tokens_seen": 100 * self._state["done"],
            "val/loss": self._state["weight"],
        }
        self._write(row, fraction)
        return row

    def _write(self, row: dict[str, Any], fraction: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        (self._folder / "progress.f64").touch()
        if self._saved and fraction < 1:
            folder = self._folder / "checkpoints" / f"step_{self._state['done']:08d}"
            folder.mkdir(parents=True)
            (folder / "state.json").write_text(json.dumps(self._state))
            checkpoint.seal(folder)
        if fraction == 1:
            (self._folder / "summary.json").write_text(json.dumps({**row, "status": "finished", "message": ""}))


def run(
    spec: SweepSpec,
    folder: Path,
    concurrent: int = 1,
    kill_after: int | None = None,
    changed: Callable[[FakeTrial, dict[str, Any]], dict[str, Any]] = lambda trial, row: row,
    now: Callable[[], float] = lambda: 0.0,
) -> list[dict[str, Any]]:
    """Runs a sweep, or what is left of it; its events without times and sessions.

    Args:
        kill_after: the driver dies before it writes this event of the session.
        changed: what becomes of a report before it arrives.
    """
    folder.mkdir(exist_ok=True)
    with History(folder, now) as history:
        if kill_after is not None:
            _kill(history, kill_after)
        scheduler = spec.search.scheduler.build(spec.race.budget_seconds)
        history.session()
        sweep = Sweep(spec, folder, history)
        sweep.stopped_before(replay(scheduler, history.events))
        _loop(spec, sweep, scheduler, concurrent, changed)
        return told(history.events)


def told(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in event.items() if k != "at"} for event in events if event["kind"] != "session"]


def _kill(history: History, after: int) -> None:
    write, left = history._write, [after]

    def killing(kind: Any, **more: Any) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        write(kind, **more)

    history._write = killing  # type: ignore[method-assign]


def _loop(
    spec: SweepSpec, sweep: Sweep, scheduler: TrialScheduler, concurrent: int, changed: Callable[..., Any]
) -> None:
    draws, stopper, reports = Draws(sweep, concurrent), OwnBudget(sweep), Reports(sweep, lambda row: None)
    running: list[FakeTrial] = []
    number = 0
    while True:
        config = draws.suggest(f"tune{number}") if number < sweep.most_runs else None
        if isinstance(config, dict):
            running.append(FakeTrial(config, f"tune{number}", spec, sweep))
            scheduler.on_trial_add(None, running[-1])
            number += 1
            continue
        assert config != Searcher.FINISHED or not running
        if not running:
            return
        trial = running.pop(0)
        if _goes_on(trial, scheduler, stopper, reports, changed):
            running.append(trial)


def _goes_on(
    trial: FakeTrial, scheduler: TrialScheduler, stopper: OwnBudget, reports: Reports, changed: Callable[..., Any]
) -> bool:
    """One report in the order of Tune: stopper, scheduler, callback, then what was decided."""
    row = trial.report()
    if row is not None:
        row = changed(trial, row)
        stopped = stopper(trial.trial_id, row)
        decision = "STOP" if stopped else scheduler.on_trial_result(None, trial, row)
        row["done"] = decision == "STOP"
        reports.on_trial_result(0, [], trial, row)
        trial.last_result = row
        if decision != "STOP":
            return True
    reports.on_trial_complete(0, [], trial)
    return False
