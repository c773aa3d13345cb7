"""A sweep that is killed at any event and taken up again ends as if it had not been: searcher, scheduler and callback
called as Tune calls them, without Ray."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from simulated_sweep import BUDGET, RATE, SMALL, START, FakeTrial, Killed, run, spec_of

from cggr_ray.race import RaceSpec
from search_spaces.domains import Domains, LogUniform, Uniform
from trainables.population import Population
from trainables.settings import Search, SweepSpec

SEARCHES = {
    "random asha": {"scheduler": "asha"},
    "random hyperband": {"scheduler": "hyperband", "trials": 12},
    "grid none": {"algorithm": {"kind": "grid", "points": 3}, "scheduler": "none"},
    "tpe asha": {"algorithm": {"kind": "tpe", "startup": 3}, "scheduler": "asha"},
    "tpe_memory none": {"algorithm": {"kind": "tpe_memory", "startup": 3}, "scheduler": "none"},
    "random pbt": {"scheduler": {"kind": "pbt", "interval": 0.25}},
}


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
def test_a_sweep_killed_at_every_fifth_event_ends_as_one_that_was_not(search: dict[str, Any], tmp_path: Path) -> None:
    spec = spec_of(**search)
    whole = run(spec, tmp_path / "whole")
    assert len({event["trial_id"] for event in whole if event["kind"] == "end"}) == spec.search.trials
    for after in range(1, len(whole), 5):
        folder = tmp_path / f"killed{after}"
        with pytest.raises(Killed):
            run(spec, folder, kill_after=after)
        with (folder / "sweep.jsonl").open("ab") as file:
            file.write(b'{"kind": "trial", "trial_')
        assert run(spec, folder) == whole, after


def test_a_sweep_killed_twice_in_a_row_ends_as_one_that_was_not(tmp_path: Path) -> None:
    spec = spec_of(scheduler="asha")
    whole = run(spec, tmp_path / "whole")
    for after in (9, 8, 0, 7):
        with pytest.raises(Killed):
            run(spec, tmp_path / "killed", kill_after=after)
    assert run(spec, tmp_path / "killed") == whole


def test_side_by_side_the_same_is_drawn_and_everything_ends_once(tmp_path: Path) -> None:
    spec = spec_of(scheduler="asha")
    one = run(spec, tmp_path / "one")
    with pytest.raises(Killed):
        run(spec, tmp_path / "three", concurrent=3, kill_after=11)
    three = run(spec, tmp_path / "three", concurrent=3)
    drawn = [[event["values"] for event in events if event["kind"] == "trial"] for events in (one, three)]
    assert drawn[0] == drawn[1]
    ends = [event["trial_id"] for event in three if event["kind"] == "end"]
    assert len(ends) == len(set(ends)) == spec.search.trials


def test_asha_stops_who_is_worse_than_the_better_half_at_a_rung(tmp_path: Path) -> None:
    """By hand: a trial goes on past a rung if it is the first there, or no worse than the median of those before it."""
    events = run(spec_of(scheduler="asha", trials=10), tmp_path / "sweep")
    rungs: dict[int, list[float]] = {}
    stopped = set()
    for event in (e for e in events if e["kind"] == "result" and e["train_seconds"] < BUDGET):
        rung, loss = round(event["train_seconds"]), event["val/loss"]
        before = sorted(rungs.setdefault(rung, []))
        middle = (before[(len(before) - 1) // 2] + before[len(before) // 2]) / 2 if before else loss
        if loss > middle:
            stopped.add(event["trial_id"])
        rungs[rung].append(loss)
    ends = {event["trial_id"]: event["status"] for event in events if event["kind"] == "end"}
    assert set(rungs) == {1, 2, 4}
    assert stopped and stopped == {trial_id for trial_id, status in ends.items() if status == "stopped"}
    assert set(ends.values()) == {"finished", "stopped"}


def test_a_population_goes_on_with_the_weights_of_its_best(tmp_path: Path) -> None:
    events = run(spec_of(scheduler={"kind": "pbt", "interval": 0.25}), tmp_path / "sweep")
    exploits = [event for event in events if event["kind"] == "exploit"]
    assert [e["generation"] for e in exploits] == [1, 1, 2, 2, 3, 3]
    drawn = {event["trial_id"]: event["values"] for event in events if event["kind"] == "trial"}
    values = dict(drawn)
    for generation in (1, 2, 3):
        losses = {e["trial_id"]: e["val/loss"] for e in events
                  if e["kind"] == "result" and round(e["train_seconds"]) == 2 * generation}  # fmt: skip
        ranked = sorted(losses, key=lambda trial_id: losses[trial_id])
        now = [e for e in exploits if e["generation"] == generation]
        assert {e["trial_id"] for e in now} == set(ranked[-2:]) and {e["donor"] for e in now} <= set(ranked[:2])
        for e in now:
            # The next loss follows from the donor's, so its weights were taken, by the rate that it has now.
            following = next(r["val/loss"] for r in events if r["kind"] == "result" and r["trial_id"] == e["trial_id"]
                             and round(r["train_seconds"]) == 2 * generation + 2)  # fmt: skip
            assert following == pytest.approx(losses[e["donor"]] * (0.7 + abs(e["values"][RATE] - 0.01) * 10))
            before = values[e["donor"]]
            assert e["values"][RATE] in [min(max(before[RATE] * f, 5e-4), 2e-2) for f in (0.8, 1.25)]
            assert e["values"][START] in [min(max(before[START] * f, 0.2), 0.8) for f in (0.8, 1.25)]
        values |= {e["trial_id"]: e["values"] for e in now}


def test_a_population_goes_on_where_no_checkpoint_of_its_best_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every trial with its own weights and values, and nothing in the history says otherwise."""
    monkeypatch.setattr("trainables.sweep.adopt", lambda donor, receiver: False)
    events = run(spec_of(scheduler={"kind": "pbt", "interval": 0.25}, trials=4), tmp_path / "sweep")
    assert [event["status"] for event in events if event["kind"] == "end"] == ["finished"] * 4
    assert not [event for event in events if event["kind"] == "exploit"]
    assert [event["generation"] for event in events if event["kind"] == "generation"] == [1, 2, 3]


@pytest.mark.parametrize("done", [0, 1])
def test_a_trial_of_a_population_that_diverges_between_intervals_ends(
    done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients were not finite, and changed nothing: it ends before its time with a loss that is."""
    report = FakeTrial.report

    def diverging(trial: FakeTrial) -> dict[str, Any] | None:
        if trial.config["trial_id"] != "t0001" or trial._state["done"] != done:
            return report(trial)
        row = {"trial": "t0001", "train_seconds": (done + 0.5) * 0.25 * BUDGET, "tokens_seen": 150, "val/loss": 9.0}
        if trial.last_result.get("train_seconds") != row["train_seconds"]:
            return row
        trial._folder.mkdir(exist_ok=True, parents=True)
        ended = {**row, "status": "diverged", "message": "20 steps without a finite gradient"}
        (trial._folder / "summary.json").write_text(json.dumps(ended))
        return None

    monkeypatch.setattr(FakeTrial, "report", diverging)
    spec = spec_of(scheduler={"kind": "pbt", "interval": 0.25}, trials=4)
    events = run(spec, tmp_path / "sweep")
    ends = {event["trial_id"]: event["status"] for event in events if event["kind"] == "end"}
    assert ends == {"t0000": "finished", "t0001": "diverged", "t0002": "finished", "t0003": "finished"}


def test_a_population_keeps_its_best_s_values_where_moved_ones_make_no_recipe(tmp_path: Path) -> None:
    """Each moved to its own bound, the end of the one would come before the end of the other."""
    until, target = "tokens.curriculum.full_until", "tokens.curriculum.target_at"
    domains: Domains = {RATE: LogUniform(5e-4, 2e-2), until: Uniform(0.0, 0.42), target: Uniform(0.4, 0.6)}
    race = RaceSpec(recipes=("cggr_loss",), budget_seconds=BUDGET)
    spec = SweepSpec("mine", "cggr_loss", domains, race, Search(trials=6, seed=1, scheduler=Population()))
    events = run(spec, tmp_path / "sweep")
    assert [event["status"] for event in events if event["kind"] == "end"] == ["finished"] * 6
    values = {event["trial_id"]: event["values"] for event in events if event["kind"] == "trial"}
    kept = 0
    for event in (event for event in events if event["kind"] == "exploit"):
        assert event["values"][until] <= event["values"][target]
        kept += event["values"] == values[event["donor"]]
        values[event["trial_id"]] = event["values"]
    assert kept


def test_no_draw_equals_an_earlier_one_and_a_space_that_is_used_up_ends_the_sweep(tmp_path: Path) -> None:
    for number, algorithm in enumerate(("random", "grid", {"kind": "tpe", "startup": 2})):
        spec = spec_of(SMALL, algorithm=algorithm, scheduler="none", trials=9)
        events = run(spec, tmp_path / str(number))
        drawn = [json.dumps(event["values"], sort_keys=True) for event in events if event["kind"] == "trial"]
        assert len(drawn) == len(set(drawn)) == 6


def test_the_sweeps_own_budget_cuts_what_runs_and_starts_nothing(tmp_path: Path) -> None:
    spec = spec_of(scheduler="none", total_seconds=2.5 * BUDGET)
    events = run(spec, tmp_path / "sweep", concurrent=2)
    ends = {event["trial_id"]: event for event in events if event["kind"] == "end"}
    assert [end["status"] for end in ends.values()] == ["finished", "finished", "cut", "cut"]
    assert ends["t0002"]["train_seconds"] == pytest.approx(0.5 * BUDGET)
    assert run(spec, tmp_path / "sweep") == events


def test_a_population_is_cut_where_it_waits(tmp_path: Path) -> None:
    spec = spec_of(scheduler={"kind": "pbt", "interval": 0.25}, trials=4, total_seconds=1.5 * BUDGET)
    events = run(spec, tmp_path / "sweep")
    ends = [event for event in events if event["kind"] == "end"]
    assert len(ends) == 4 and {end["status"] for end in ends} == {"cut"}
    assert sum(end["train_seconds"] for end in ends) == pytest.approx(1.5 * BUDGET)


def test_the_wall_clock_of_a_sweep_cuts_it_too(tmp_path: Path) -> None:
    """A clock that moves by a second whenever it is read."""
    spec = spec_of(scheduler="none", wall_seconds=40.0)
    events = run(spec, tmp_path / "sweep", now=map(float, count()).__next__)
    statuses = [event["status"] for event in events if event["kind"] == "end"]
    assert 1 < len(statuses) < 8 and set(statuses[:-1]) == {"finished"}
    assert run(spec, tmp_path / "sweep", now=map(float, count(1000)).__next__) == events


def test_the_time_from_a_kill_to_the_next_begin_is_not_the_sweeps(tmp_path: Path) -> None:
    """Also where a trial came to its end after the driver had died, of which the next one hears."""
    spec = spec_of(scheduler="none", trials=3, wall_seconds=1000.0)
    with pytest.raises(Killed):
        run(spec, tmp_path / "sweep", kill_after=4)
    assert (tmp_path / "sweep" / "runs" / "t0000" / "summary.json").is_file()
    events = run(spec, tmp_path / "sweep", now=lambda: 5000.0)
    assert [event["status"] for event in events if event["kind"] == "end"] == ["finished"] * 3


def test_memory_that_runs_out_is_an_end_with_what_was_asked_for(tmp_path: Path) -> None:
    def no_memory(trial: Any, row: dict[str, Any]) -> dict[str, Any]:
        if row["trial"] != "t0002":
            return row
        trial._state["done"] = 3
        trial._milestones = [0.0] * 3
        (trial._folder / "summary.json").unlink(missing_ok=True)
        return {"trial": "t0002", "status": "out_of_memory", "peak_memory_mib": 5000.0, "message": "no memory"}

    spec = spec_of(scheduler="asha", algorithm={"kind": "tpe_memory", "startup": 2})
    events = run(spec, tmp_path / "sweep", changed=no_memory)
    ends = {event["trial_id"]: event for event in events if event["kind"] == "end"}
    assert len(ends) == 8
    assert ends["t0002"]["status"] == "out_of_memory" and ends["t0002"]["peak_memory_mib"] == 5000.0
    assert ends["t0002"]["message"] == "no memory" and ends["t0002"]["val/loss"] is None


def test_a_trial_that_was_interrupted_goes_on_later_and_not_now(tmp_path: Path) -> None:
    def interrupted(trial: Any, row: dict[str, Any]) -> dict[str, Any]:
        if row["trial"] == "t0001":
            trial._state["done"] = 2
            trial._milestones = [0.0] * 2
        return row

    spec = spec_of(scheduler="none", trials=3)
    events = run(spec, tmp_path / "sweep", changed=interrupted)
    assert [e["trial_id"] for e in events if e["kind"] == "end"] == ["t0000", "t0002"]
    events = run(spec, tmp_path / "sweep")
    assert [e["trial_id"] for e in events if e["kind"] == "end"] == ["t0000", "t0002", "t0001"]
    assert {e["status"] for e in events if e["kind"] == "end"} == {"finished"}
