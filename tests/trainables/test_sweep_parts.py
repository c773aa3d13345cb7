"""Files, settings and edges of a sweep; what a worker tells of memory that ran out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from cggr_ray import checkpoint
from cggr_ray.commands import specify
from cggr_ray.models.presets import ModelSpec
from cggr_ray.out_of_memory import asked_mib
from cggr_ray.race import RaceSpec, load_race
from cggr_ray.recipe import load_recipe
from cggr_ray.sweep_command import begin_sweep, check_sweep, finish_sweep, specify_sweep, sweep
from search_spaces.domains import LogUniform
from trainables.best import write_best
from trainables.history import Drawn, History
from trainables.population import Population
from trainables.schedulers import Asha, Named
from trainables.settings import Search, SweepSpec, load_parts
from trainables.sweep import Sweep, sweep_race, sweep_trial
from trainables.sweep_driver import Draws
from trainables.worker import out_of_memory

MINE = """
recipe = "cggr_loss"
[domains]
"tokens.keep" = {kind = "uniform", low = 0.25, high = 0.75}
"tokens.score" = {kind = "choice", of = ["entropy", "margin"]}
[search]
trials = 5
algorithm = {kind = "tpe", startup = 3}
scheduler = "hyperband"
[race]
budget_seconds = 7
device = "cpu"
"""


def test_a_file_says_space_search_and_race_and_the_command_line_has_the_last_word(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MINE)
    spec = specify_sweep(
        str(tmp_path / "mine.toml"), None, {}, {"tokens.num_strata": 2}, {"trials": 6, "scheduler": "pbt"}
    )
    assert spec.recipe == "cggr_loss" and spec.race.recipes == ("cggr_loss",) and spec.race.budget_seconds == 7
    assert set(spec.domains) == {"tokens.keep", "tokens.score"} and spec.race.values == {"tokens.num_strata": 2}
    assert (spec.search.trials, spec.search.algorithm.startup) == (6, 3)  # type: ignore[union-attr]
    assert spec.search.scheduler.milestones == tuple(n / 8 for n in range(1, 8))
    assert type(spec).from_plain(json.loads(json.dumps(spec.to_plain()))) == spec


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('recipe = "cggr_loss"', 'space = "cggr"', "accepted: space, or domains, and not both"),
        ('recipe = "cggr_loss"', 'recipes = "cggr_loss"', "unknown key 'recipes'; did you mean 'recipe'?"),
        ('"uniform"', '"unifrom"', "did you mean 'uniform'?"),
        ("low = 0.25", "low = 0.75", "low = 0.75, high = 0.75; accepted: two finite numbers"),
        ("of = [", "off = [", "unknown key 'domains.tokens.score.off'"),
        ("trials = 5", "trials = 0", "trials = 0; accepted: at least 1"),
        ("startup = 3", "startup = 0", "startup = 0; accepted: at least 1 trial"),
        ('"hyperband"', '"ahsa"', "did you mean 'asha'?"),
        ('"hyperband"', '{kind = "asha", first_rung = 1.0}', "first_rung = 1.0; accepted: a fraction"),
        ('"hyperband"', '{kind = "hyperband", brackets = 4}', "brackets = 4; accepted: 1 to the number of rungs, 3"),
        ('"hyperband"', '{kind = "asha", reduction = inf}', "reduction = inf; accepted: a finite number"),
        ('"hyperband"', '{kind = "pbt", quantile = 0.6}', "quantile = 0.6; accepted"),
        ('"hyperband"', '{kind = "pbt", factors = [0.8, nan]}', "factors = [0.8, nan]; accepted: positive"),
        ("budget_seconds = 7", "budget_second = 7", "did you mean 'budget_seconds'?"),
    ],
)
def test_a_mistake_in_a_file_is_named(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert old in MINE
    (tmp_path / "mine.toml").write_text(MINE.replace(old, new))
    with pytest.raises(ValueError, match=r"mine\.toml: ") as error:
        load_parts(str(tmp_path / "mine.toml"))
    assert said in str(error.value)


@pytest.mark.parametrize("values", [{"total_seconds": 0.0}, {"wall_seconds": -1.0}, {"gpus_per_trial": 1.5},
                                    {"gpus_per_trial": 0.0}, {"seed": -1}, {"seed": 2**63}])  # fmt: skip
def test_settings_outside_their_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"= .*; accepted: "):
        Search(**values)


def test_a_history_is_read_as_it_was_written_without_its_torn_end(tmp_path: Path) -> None:
    times = iter(range(100))
    with History(tmp_path, now=lambda: float(next(times))) as history:
        history.session()
        trial = history.drawn({"a": 1})
        history.result(trial.trial_id, {"train_seconds": 1.0, "tokens_seen": 5, "val/loss": 2.0, "more": 1})
        history.end(trial.trial_id, "diverged", {"train_seconds": 1.5, "val/loss": float("nan")}, "no gradient")
        written = history.events
        with pytest.raises(ValueError, match="is written by a sweep that runs; accepted: one at a time"):
            History(tmp_path)
    whole = (tmp_path / "sweep.jsonl").read_bytes()
    (tmp_path / "sweep.jsonl").write_bytes(whole + b'{"kind": "trial", "trial_id": "t00')
    with History(tmp_path, now=lambda: float(next(times))) as again:
        assert again.events == written and (tmp_path / "sweep.jsonl").read_bytes() == whole
        # The last good loss, at the time of the end.
        assert again.trials["t0000"].end == {
            "kind": "end", "trial_id": "t0000", "status": "diverged", "val/loss": 2.0, "train_seconds": 1.5,
            "tokens_seen": 5, "peak_memory_mib": None, "message": "no gradient", "at": 3.0,
        }  # fmt: skip
        with pytest.raises(AssertionError):
            again.end("t0000", "finished", {})


def test_the_wall_clock_of_a_sweep_leaves_its_interruptions_out(tmp_path: Path) -> None:
    for begin in (10.0, 100.0, 1000.0):
        times = iter([begin, begin + 2.0, begin + 3.0])
        with History(tmp_path, now=lambda times=times: next(times)) as history:  # type: ignore[misc]
            history.session()
            history.drawn({"at": begin})
            seconds = history.wall_seconds()
    assert seconds == pytest.approx(2.0 + 2.0 + 3.0)


def test_a_broken_line_in_the_middle_of_a_history_is_named(tmp_path: Path) -> None:
    (tmp_path / "sweep.jsonl").write_text('{"kind": "session", "at": 1}\nnonsense\n{"kind": "session", "at": 2}\n')
    with pytest.raises(ValueError, match=r"sweep.jsonl:2: nonsense; accepted: an event a line"):
        History(tmp_path)


def test_an_event_that_lacks_something_is_named(tmp_path: Path) -> None:
    events = [{"kind": "session", "at": 1}, {"kind": "trial", "trial_id": "t0000", "at": 2}]
    (tmp_path / "sweep.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    with pytest.raises(ValueError, match=r"sweep.jsonl:2: no 'values'; accepted: events as a sweep writes them"):
        History(tmp_path)


@pytest.mark.parametrize(
    ("message", "mib"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB "
            "is free. Of the allocated memory 76.00 GiB is allocated by PyTorch, and 512.00 MiB is reserved",
            78.5 * 1024,
        ),
        ("CUDA out of memory. Tried to allocate 20.00 MiB.", 20.0),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1048576 bytes. Error code 12", 1.0),
        ("Unable to allocate 8.00 KiB for an array with shape (1024,) and data type float64", 8 / 1024),
        ("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)", None),
    ],
)
def test_what_was_asked_for_is_read_from_the_message(message: str, mib: float | None) -> None:
    assert asked_mib(message) == mib


def test_memory_that_runs_out_in_a_worker_is_a_result_and_nothing_else_is() -> None:
    def too_much() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def mistaken() -> None:
        raise RuntimeError("shapes do not fit")

    assert out_of_memory(lambda: None) is None
    assert out_of_memory(too_much) == {
        "status": "out_of_memory",
        "peak_memory_mib": 2048.0,
        "message": "CUDA out of memory. Tried to allocate 2.00 GiB.",
    }
    with pytest.raises(RuntimeError, match="shapes"):
        out_of_memory(mistaken)
    # numpy says it before anything is allocated.
    import numpy as np

    found = out_of_memory(lambda: np.empty(1 << 49))
    assert (found is not None and found["peak_memory_mib"] is None) or found["peak_memory_mib"] >= 2**30


def sweep_of(values: dict[str, Any], arms: dict[str, Any], **search: Any) -> SweepSpec:
    race = RaceSpec(recipes=("baseline",), budget_seconds=8.0, values=values, arms=arms)
    domains = {"optimizer.matrix.lr": LogUniform(1e-3, 1e-1)}
    plain = SweepSpec("mine", "baseline", domains, race, Search()).to_plain()
    return SweepSpec.from_plain(plain | {"search": {"trials": 2, **search}})


@pytest.mark.parametrize(
    ("values", "arms"),
    [
        ({"optimizer.matrix": {"kind": "adamw"}}, {}),
        ({"optimizer.lr_scale": 2.0}, {"baseline": {"optimizer.lr_scale": 0.5}}),
    ],
)
def test_the_best_arm_of_the_race_is_the_trial_that_was_best(
    values: dict[str, Any], arms: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever the race's values say again on top of the recipe's file."""
    spec = sweep_of(values, arms)
    best = Drawn("t0000", *({"optimizer.matrix.lr": 0.0123},) * 2, end={"status": "finished", "val/loss": 1.0})
    _, beside = write_best(spec, best, tmp_path)
    ran = sweep_trial(spec, sweep_race(spec), best.values, "t0000", tmp_path).recipe
    race = load_race(str(beside))
    first, raced = map(race.recipe, race.recipes)
    assert raced.optimizer == ran.optimizer != first.optimizer
    assert first == spec.race.recipe(race.recipes[0])


@pytest.mark.parametrize(
    ("values", "arms"),
    [({"optimizer.matrix.momentum": 0.9}, {}), ({}, {"baseline": {"optimizer.matrix.momentum": 0.9}})],
)
def test_a_part_that_is_drawn_whole_is_what_runs_and_what_is_raced(
    values: dict[str, Any], arms: dict[str, Any], tmp_path: Path
) -> None:
    """Also where the race sets a key of it, by itself or for the arm."""
    drawn = {"optimizer.matrix": {"kind": "muon", "lr": 0.01, "momentum": 0.8}}
    spec = sweep_of(values, arms)
    trial = sweep_trial(spec, sweep_race(spec), drawn, "t0000", tmp_path)
    assert trial.values == drawn
    best = Drawn("t0000", drawn, drawn, end={"status": "finished", "val/loss": 1.0})
    file, beside = write_best(spec, best, tmp_path)
    race = load_race(str(beside))
    for recipe in (trial.recipe, load_recipe(str(file)), race.recipe(race.recipes[1])):
        assert (recipe.optimizer.matrix.lr, recipe.optimizer.matrix.momentum) == (0.01, 0.8)  # type: ignore[union-attr]
    assert race.recipe(race.recipes[0]).optimizer.matrix.momentum == 0.9  # type: ignore[union-attr]


def test_the_best_recipe_and_its_race_can_be_copied_elsewhere(tmp_path: Path) -> None:
    """As from the node that ran the sweep."""
    spec = sweep_of({}, {})
    best = Drawn("t0000", *({"optimizer.matrix.lr": 0.0123},) * 2, end={"status": "finished", "val/loss": 1.0})
    file, beside = write_best(spec, best, tmp_path)
    known = load_recipe(str(file))
    moved = file.parent.rename(tmp_path / "moved")
    race = load_race(str(moved / beside.name))
    race.check()
    assert race.recipe(race.recipes[1]) == known != race.recipe(race.recipes[0])


def test_the_race_of_a_best_trial_takes_several_seeds_with_trained_weights_too(tmp_path: Path) -> None:
    """As the command that a sweep prints asks for them."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 3}))
    save_file({}, tmp_path / "model.safetensors")
    race = RaceSpec(recipes=("baseline",), budget_seconds=8.0, model=ModelSpec(folder=str(tmp_path)))
    spec = SweepSpec("mine", "baseline", {"optimizer.lr_scale": LogUniform(1e-3, 1e-2)}, race, Search())
    best = Drawn("t0000", *({"optimizer.lr_scale": 0.005},) * 2, end={"status": "finished", "val/loss": 1.0})
    _, beside = write_best(spec, best, tmp_path)
    specify(str(beside), {"seeds": [1, 2, 3]}, {}).check()


def test_a_best_trial_may_have_left_parts_out(tmp_path: Path) -> None:
    """Of the shipped space half of the draws have no gate, and half no moving limits."""
    gate = {"window": 4, "mean_change": 0.1, "variation": 0.1}
    race = RaceSpec(recipes=("dynamic_suffix_seed",), budget_seconds=8.0, values={"updates.stability": gate})
    spec = SweepSpec("suffix", "dynamic_suffix_seed", {"updates.beta": LogUniform(0.1, 0.9)}, race, Search())
    values = {"updates.stability": None, "updates.limits": None, "updates.cadence": {"first": 12}}
    best = Drawn("t0000", *(values,) * 2, end={"status": "finished", "val/loss": 1.0})
    file, beside = write_best(spec, best, tmp_path)
    compared = load_race(str(beside))
    first, raced = (compared.recipe(name).updates for name in compared.recipes)
    ran = sweep_trial(spec, sweep_race(spec), best.values, "t0000", tmp_path).recipe.updates
    assert raced == ran == load_recipe(str(file)).updates
    assert (raced.stability, raced.limits, raced.cadence.first) == (None, None, 12)
    assert first.stability is not None and first.limits is not None


def test_a_population_goes_on_when_a_slow_step_has_taken_a_trial_beyond_an_interval() -> None:
    population = Population(interval=0.25)
    trials = [Drawn(f"t000{n}", {}, {}, [{"train_seconds": at, "val/loss": 1.0}]) for n, at in enumerate((4.1, 2.1))]
    assert population.generation(trials, 8.0) == 1
    trials[1].results.append({"train_seconds": 4.2, "val/loss": 1.0})
    assert population.generation(trials, 8.0) == 2


def test_a_full_disk_interrupts_a_sweep_and_ends_no_trial(tmp_path: Path) -> None:
    with History(tmp_path) as history:
        sweep = Sweep(sweep_of({}, {}), tmp_path, history)
        first = sweep.next()
        assert first is not None
        sweep.ended(first.trial_id, {"trial": "t0000", "status": "interrupted", "message": "no space left"}, False)
        assert sweep.next() is None and [trial.trial_id for trial in sweep.open] == ["t0000"]
        again = Sweep(sweep_of({}, {}), tmp_path, history).next()
        assert again is first


def test_a_machine_on_which_every_trial_dies_does_not_use_up_the_sweep(tmp_path: Path) -> None:
    def after(sweep: Sweep, reports: int) -> int:
        """Trials that are begun when all die, the first few after a report; each reports before the next is begun."""
        begun = 0
        while (drawn := sweep.next()) is not None:
            begun += 1
            if begun <= reports:
                sweep.cuts({"trial": drawn.trial_id, "train_seconds": 1.0})
            sweep.failed(drawn.trial_id, "CUDA error: no device")
        return begun

    spec = sweep_of({}, {}, trials=20)
    with History(tmp_path) as history:
        assert after(Sweep(spec, tmp_path, history), reports=3) == 3 + 5
        assert after(Sweep(spec, tmp_path, history), reports=0) == 5, "taken up again, it goes on"
        assert [trial.status for trial in history.trials.values()] == ["failed"] * 13


def test_seconds_of_trials_that_failed_stay_used_when_a_sweep_is_taken_up_again(tmp_path: Path) -> None:
    """Those after the last validation too: here there was none."""
    spec = sweep_of({}, {}, trials=4, total_seconds=10.0)
    with History(tmp_path) as history:
        sweep = Sweep(spec, tmp_path, history)
        first, second = sweep.next(), sweep.next()
        assert first is not None and second is not None
        for trial in (first, second):
            sweep.report({"trial": trial.trial_id, "train_seconds": 6.0})
        sweep.failed(first.trial_id, "CUDA error")
        memory = {"trial": second.trial_id, "status": "out_of_memory", "peak_memory_mib": 5.0, "message": "no memory"}
        sweep.ended(second.trial_id, memory, False)
        assert sweep.over() and Sweep(spec, tmp_path, history).over()
        assert [trial.end["train_seconds"] for trial in history.trials.values() if trial.end] == [6.0, 6.0]


def test_a_sweep_that_ends_before_its_time_says_so_though_it_has_a_best_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every trial that was drawn has ended; others were not drawn, as five in a row had died."""

    def after(sweep: Sweep) -> None:
        while (drawn := sweep.next()) is not None:
            sweep.failed(drawn.trial_id, "CUDA error: no device")

    spec = sweep_of({}, {}, trials=11)
    with History(tmp_path) as history:
        first = history.drawn({"optimizer.matrix.lr": 0.002})
        history.end(first.trial_id, "finished", {"train_seconds": 8.0, "val/loss": 1.0})
        sweeps = Sweep(spec, tmp_path, history), Sweep(spec, tmp_path, history)
        after(sweeps[0])
        assert len(history.trials) == 6 and not sweeps[0].open and not sweeps[0].complete
        with pytest.raises(SystemExit, match="1"):
            finish_sweep(spec, history, tmp_path, Console(), sweeps[0].complete)
        assert f"go on with: cggr-ray sweep --resume {tmp_path}" in capsys.readouterr().out
        after(sweeps[1])
        # The last five have died as well, and nothing is left.
        assert len(history.trials) == 11 and sweeps[1].complete
        finish_sweep(spec, history, tmp_path, Console(), sweeps[1].complete)
        assert "go on" not in capsys.readouterr().out


def test_trials_of_a_sweep_have_one_worker(tmp_path: Path) -> None:
    spec = sweep_of({}, {})
    with pytest.raises(ValueError, match="workers = 2 in a sweep; accepted: workers = 1, and trials side by side"):
        check_sweep(replace(spec, race=replace(spec.race, workers=2)), "train", tmp_path)


def test_a_recipe_that_was_edited_in_the_middle_of_a_sweep_is_refused(tmp_path: Path) -> None:
    own, folder = tmp_path / "own.toml", tmp_path / "sweep"
    own.write_text("[optimizer]\nlr_scale = 0.5\n")
    race = RaceSpec(recipes=(str(own),), budget_seconds=8.0, device="cpu")
    begin_sweep(SweepSpec("mine", str(own), {"optimizer.matrix.lr": LogUniform(1e-3, 1e-1)}, race, Search()), folder)

    def resumed() -> None:
        sweep(None, None, None, {}, {}, {}, "inprocess", None, None, folder, dry_run=True)

    resumed()
    own.write_text("[optimizer]\nlr_scale = 0.25\n")
    with pytest.raises(
        ValueError, match=r"own.toml' is another than .* as parts of sweep.json have it, or a new sweep"
    ):
        resumed()


def test_all_trials_that_may_run_wait_for_their_machines_at_once(tmp_path: Path) -> None:
    """A cluster that grows starts machines for what waits, as many at a time."""
    from ray.tune.execution.tune_controller import _get_max_pending_trials
    from ray.tune.search import SearchGenerator

    with History(tmp_path) as history:
        draws = Draws(Sweep(sweep_of({}, {}), tmp_path, history), 8)
        assert _get_max_pending_trials(SearchGenerator(draws)) >= 8


def test_what_a_trial_did_after_its_sweep_had_died_counts_as_far_as_its_checkpoint(tmp_path: Path) -> None:
    """Not what it did before it went on from an earlier step, and not what it will do again."""
    run = tmp_path / "runs" / "t0000"
    saved = checkpoint.place(run, 3)
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT}))
    checkpoint.seal(saved)
    seen = ((1, 1.0, 5.0), (2, 2.0, 4.0), None, (2, 2.0, 4.5), (4, 4.0, 3.0))
    rows = [
        {"kind": "milestone", "step": row[0], "train_seconds": row[1], "val/loss": row[2]}
        if row
        else {"kind": "resumed", "step": 1}
        for row in seen
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with History(tmp_path) as history:
        history.drawn({"optimizer.matrix.lr": 0.002})
        Sweep(sweep_of({}, {}), tmp_path, history)
        assert [row["val/loss"] for row in history.trials["t0000"].results] == [5.0, 4.5]


def test_a_trial_that_another_version_began_is_refused_before_it_is_begun_and_ended(tmp_path: Path) -> None:
    """In a worker it would fail as often as it is started, and the version that began it could not go on either."""
    saved = checkpoint.place(tmp_path / "runs" / "t0000", 3)
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT + 1}))
    checkpoint.seal(saved)
    with History(tmp_path) as history:
        trial = history.drawn({"optimizer.matrix.lr": 0.002})
        with pytest.raises(ValueError, match="format = 3; accepted: 2, this version's"):
            Sweep(sweep_of({}, {}), tmp_path, history)
        assert not trial.ended and saved.is_dir()


@pytest.mark.parametrize(("budget", "first_rung", "reduction", "step"), [(5.0, 0.04, 3.0, 0.2), (3.0, 1 / 3, 2.0, 0.1)])
def test_a_rung_is_where_the_run_is_validated_to_the_last_bit(
    budget: float, first_rung: float, reduction: float, step: float
) -> None:
    """By a clock of equal steps a run is validated at 1.7999... s for a fraction of 0.36, and each rung decides."""
    asha = Asha(first_rung=first_rung, reduction=reduction)
    scheduler, trials = asha.build(budget), (Named("t0000"), Named("t0001"))
    for trial in trials:
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    for milestone in asha.milestones:
        used = 0.0
        while used / budget < milestone:
            used += step
        for trial, loss, decision in zip(trials, (1.0, 2.0), ("CONTINUE", "STOP"), strict=True):
            row = {"train_seconds": used, "val/loss": loss}
            assert scheduler.on_trial_result(None, trial, row) == decision, milestone  # type: ignore[arg-type]


@pytest.mark.parametrize(("seconds", "decision"), [(4.0, "STOP"), (8.0, "CONTINUE")])
def test_a_trial_that_has_used_its_budget_is_not_stopped_any_more(seconds: float, decision: str) -> None:
    """It has yet to write its summary."""
    scheduler = Asha().build(8.0)
    for number, loss in enumerate((1.0, 2.0)):
        trial = Named(f"t{number:04d}")
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        row = {"train_seconds": seconds, "val/loss": loss}
        decided = scheduler.on_trial_result(None, trial, row)  # type: ignore[arg-type]
    assert decided == decision


def test_a_sweep_that_was_killed_while_its_record_was_written_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Nothing after it is run."""

    def killed(*_: Any, **named: Any) -> None:
        raise Killed

    folder, spec = tmp_path / "sweep", sweep_of({}, {})
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("cggr_ray.files.flush", killed)
        patched.setattr("pathlib.Path.unlink", killed)
        begin_sweep(spec, folder)
    assert [path.name for path in folder.iterdir()] == [".sweep.json.partial"]
    begin_sweep(spec, folder)
    assert [path.name for path in folder.iterdir()] == ["sweep.json"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and holds no sweep"):
        begin_sweep(spec, tmp_path / "other")


def test_a_second_process_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the first one still prepares the data, for which it would else wait."""

    def waits(*_: Any) -> None:
        raise AssertionError("it went as far as the data")

    folder, spec = tmp_path / "sweep", sweep_of({}, {})
    begin_sweep(replace(spec, race=replace(spec.race, device="cpu")), folder)
    monkeypatch.setattr("cggr_ray.sweep_command.prepare_data", waits)
    with History(folder), pytest.raises(ValueError, match="is written by a sweep that runs; accepted: one at a time"):
        sweep(None, None, None, {}, {}, {}, "inprocess", None, None, folder, dry_run=False)
