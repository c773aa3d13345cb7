"""Calibration: the search, what is verified, what is kept and reused, and what nothing fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from small_runs import TWO_ARMS
from typer.testing import CliRunner

from cggr_ray import calibrate_command, cli
from cggr_ray.batches import ArmBatch, Calibrated
from cggr_ray.calibrated import check_calibration
from cggr_ray.calibration import Calibration, Settings, calibrated, notes, sizes_of, write_calibrated
from cggr_ray.codec import to_toml
from cggr_ray.evaluation.generated import Generated
from cggr_ray.evaluation.suite import Evaluation
from cggr_ray.fits import Answer
from cggr_ray.race import RaceSpec, Trial, Tuning, load_race, plan_trials
from cggr_ray.routing.rows import AllRows, FewerRows, HardestRows

CPU = torch.device("cpu")


def test_sizes_divide_a_step_and_grow_where_that_is_asked() -> None:
    assert sizes_of(AllRows(), 12, grows=False) == [1, 2, 3, 4, 6, 12]
    grown = sizes_of(AllRows(), 12, grows=True)
    assert grown[:8] == [1, 2, 3, 4, 6, 12, 13, 14] and grown[-1] == 4096
    assert sizes_of(HardestRows(keep=0.25), 16, grows=True)[:5] == [4, 8, 16, 20, 24]
    assert sizes_of(FewerRows(0.5), 12, grows=True) == [1, 2, 3, 6], "the smaller step of a control stays small"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"head_room": 1.0}, r"head_room = 1\.0; accepted: a fraction of the memory in \[0, 1\)"),
        ({"memory_mib": 0.0}, r"memory_mib = 0\.0; accepted: a positive number of MiB"),
        ({"starts": 0}, r"verify_steps = 10, starts = 0; accepted: at least 1"),
    ],
)
def test_mistakes_in_settings_are_named(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Settings(**values)


def test_a_cpu_needs_a_limit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on the CPU without a limit; accepted: --memory-mib"):
        Settings().limit_mib(CPU)
    assert Settings(head_room=0.25, memory_mib=800.0).limit_mib(CPU) == 600
    out = tmp_path / "out"
    done = CliRunner().invoke(cli.app, ["calibrate", "cpu", "--device", "cpu", "--out", str(out)])
    assert isinstance(done.exception, ValueError) and not out.exists()


def test_a_calibration_has_a_device() -> None:
    with pytest.raises(
        ValueError, match=r"calibration\.device = \{'type': 'cpu'\}; accepted: what `cggr-ray calibrate`"
    ):
        Calibrated({"type": "cpu"}, {})


def test_a_calibration_that_was_interrupted_while_it_prepared_data_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, begun = tmp_path / "out", list[Path]()

    def interrupted(_: object, folder: Path, __: object) -> None:
        (folder / "half").mkdir(parents=True, exist_ok=True)
        begun.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr("cggr_ray.calibrate_command.prepare", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            calibrate_command.calibrate("cpu", out, {"device": "cpu"}, Settings(memory_mib=1.0), False)
    assert begun == [out / "data"] * 2


class Memory:
    """Stands in for the processes: rows of a recipe fit up to a number, longer tries up to a smaller one."""

    def __init__(self, most: dict[str, int], lasting: dict[str, int] | None = None) -> None:
        self.most, self.lasting, self.asked, self.written = most, lasting or {}, list[Trial](), list[bool]()

    def __call__(self, trial: Trial, limit_mib: float, verifies: bool, writes: bool) -> Answer:
        self.asked.append(trial)
        self.written.append(writes)
        name, rows = trial.recipe.name, trial.race.micro_rows
        most = self.most[name] if not verifies else self.lasting.get(name, self.most[name])
        peak = limit_mib * min(1.0, rows / (most + 0.5))
        return Answer(rows <= most, peak, peak, "" if rows <= most else "no memory")


def calibrate(spec: RaceSpec, memory: Memory, file: Path, settings: Settings, again: bool = False) -> dict[str, Any]:
    calibration = Calibration(spec, settings, CPU, file, file.parent, memory, lambda text: None)
    return {name: calibration.arm(name, again) for name in spec.recipes}


SETTINGS = Settings(memory_mib=1000.0, starts=3, verify_steps=30)


def test_what_is_found_is_verified_kept_and_raced(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    memory = Memory({"baseline": 6, "random_tokens": 40}, lasting={"baseline": 3})
    arms = calibrate(TWO_ARMS, memory, file, SETTINGS)
    assert [(arm["micro_rows"], arm["global_rows"], arm["limited"]) for arm in arms.values()] == [
        (2, 16, True),
        (16, 16, False),
    ]
    tries = arms["baseline"]["tries"]
    assert [(t["micro_rows"], t["steps"], t["fits"]) for t in tries] == [
        *((size, 2, size <= 6) for size in (1, 16, 4, 8)),
        (4, 30, False),
        *[(2, 30, True)] * 3,
    ]
    assert all(t["limit_mib"] == 950 and t["global_rows"] == 16 for t in tries) and tries[1]["message"] == "no memory"
    # Of the starts that verify a size, the first.
    assert memory.written[: len(tries)] == [False] * 4 + [True, True, False, False]
    assert [t["writes"] for t in tries] == memory.written[: len(tries)]
    trial = memory.asked[0]
    assert trial.race.step_seconds == 1 and trial.race.budget_seconds == 2 and trial.race.micro_rows == 1
    write_calibrated(TWO_ARMS, notes(SETTINGS, arms), arms, tmp_path / "calibrated.toml")
    text = (tmp_path / "calibrated.toml").read_text()
    assert "# baseline: 2 rows fit, 543 MiB at the peak of 950, 16 rows a step" in text
    assert "# random_tokens: 16 rows fit, and no more were of use" in text
    race = load_race(str(tmp_path / "calibrated.toml"))
    assert race == replace(calibrated(TWO_ARMS, arms), name="small") and race.rows_of("baseline") == (16, 2)
    check_calibration(race, CPU)
    assert all(trial.race.calibration is None for trial in plan_trials(race, tmp_path)), "of the race, not of a run"


@pytest.fixture
def small(tmp_path: Path) -> RaceSpec:
    """A race that was calibrated here."""
    arms = calibrate(TWO_ARMS, Memory({"baseline": 6, "random_tokens": 40}), tmp_path / "calibration.json", SETTINGS)
    return calibrated(replace(TWO_ARMS, evaluation=Evaluation((Generated(max_new_tokens=8),))), arms)


@pytest.mark.parametrize(
    "changes",
    [
        {"arms": {"random_tokens": {"tokens.keep": 0.5}}},
        {"values": {"optimizer.rest.state": {"kind": "int8_blockwise"}}},
        {"batches": {"random_tokens": ArmBatch(32, 32)}},
        {"data": replace(TWO_ARMS.data, row_tokens=256)},
        {"model": replace(TWO_ARMS.model, tie_embeddings=False)},
        {"evaluation": Evaluation((Generated(max_new_tokens=9),))},
        {"evaluation": None},
    ],
    ids=str,
)
def test_another_race_than_was_calibrated_is_refused(changes: dict[str, Any], small: RaceSpec) -> None:
    check_calibration(small, CPU)
    with pytest.raises(
        ValueError, match=r"arm '.*another than its micro-batch was calibrated with; accepted: what was"
    ):
        check_calibration(replace(small, **changes), None)
    check_calibration(replace(small, calibration=None, **changes), CPU)


def test_what_takes_no_memory_may_be_tuned_after_a_calibration(small: RaceSpec) -> None:
    """Rates, schedules, seconds, seeds, and where the questions lie; an arm that does not race is not asked."""
    rates = {"optimizer.lr_scale": 0.5, "optimizer.matrix.lr": 0.01, "optimizer.schedule.warmup_tokens": 500}
    evaluation = Evaluation((Generated(max_new_tokens=8, seconds=1.0, seed=77),))
    tuned = replace(small, budget_seconds=20.0, seeds=(3, 4), milestones=(0.5,), evaluation=evaluation)
    check_calibration(tuned.with_arms(dict.fromkeys(small.recipes, rates)), CPU)
    keep = {"random_tokens": {"tokens.keep": 0.5}}
    check_calibration(replace(small, recipes=("baseline",), batches={"baseline": small.batches["baseline"]}), CPU)
    with pytest.raises(ValueError, match="arm 'random_tokens'"):
        check_calibration(small.with_arms(keep), CPU)


@pytest.mark.parametrize("command", ["race", "tune"])
def test_a_race_that_was_calibrated_elsewhere_is_refused_before_it_begins(
    command: str, small: RaceSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning = Tuning(seconds=1.0, seed=9, values=({"optimizer.lr_scale": 0.5},))
    file, out = tmp_path / "race.toml", tmp_path / "out"
    file.write_text(tomli_w.dumps(to_toml(replace(small, tuning=tuning).to_plain())))
    monkeypatch.setattr("cggr_ray.calibrated.device_info", lambda _: {"type": "cpu", "name": "another", "threads": 1})
    monkeypatch.setattr("sys.argv", ["cggr-ray", command, str(file), "--out", str(out)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and not out.exists()
    assert "micro-batches were calibrated on" in said and "this machine has 'another'; accepted:" in said
    done = CliRunner().invoke(cli.app, [command, str(file), "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0, "the plan of another machine"


def test_a_calibrated_race_is_calibrated_again(small: RaceSpec, tmp_path: Path) -> None:
    changed = small.with_arms({"random_tokens": {"tokens.keep": 0.5}})
    arms = calibrate(changed, Memory({"baseline": 6, "random_tokens": 20}), tmp_path / "again.json", SETTINGS)
    again = calibrated(changed, arms)
    check_calibration(again, CPU)
    assert again.calibration != small.calibration and again.rows_of("random_tokens") == (16, 16)


def test_what_is_known_is_not_tried_again(tmp_path: Path) -> None:
    file, most = tmp_path / "calibration.json", {"baseline": 6, "random_tokens": 40}
    first = calibrate(TWO_ARMS, Memory(most), file, SETTINGS)
    nothing = Memory(most)
    assert calibrate(TWO_ARMS, nothing, file, SETTINGS) == first and not nothing.asked
    # A rate changes nothing here, but who knows of every value? Only what is asked anew is tried anew.
    other = replace(TWO_ARMS, arms={"random_tokens": {"tokens.keep": 0.5}})
    one = Memory(most)
    calibrate(other, one, file, SETTINGS)
    assert {trial.recipe.name for trial in one.asked} == {"random_tokens"}
    for changed in (replace(SETTINGS, head_room=0.1), replace(SETTINGS, memory_mib=900.0)):
        calibrate(TWO_ARMS, everything := Memory(most), file, changed)
        assert {trial.recipe.name for trial in everything.asked} == {"baseline", "random_tokens"}
    calibrate(TWO_ARMS, once_more := Memory(most), file, changed, again=True)
    assert once_more.asked


@pytest.mark.parametrize("what", ["device_info", "versions"])
def test_what_another_device_or_version_found_is_tried_again(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, most = tmp_path / "calibration.json", {"baseline": 6, "random_tokens": 40}
    calibrate(TWO_ARMS, Memory(most), file, SETTINGS)
    monkeypatch.setattr(f"cggr_ray.calibration.{what}", lambda *_: {"name": "another"})
    calibrate(TWO_ARMS, everything := Memory(most), file, SETTINGS)
    assert {trial.recipe.name for trial in everything.asked} == {"baseline", "random_tokens"}


class StoppedError(Exception):
    pass


def test_an_interrupted_calibration_goes_on(tmp_path: Path) -> None:
    most, lasting = {"baseline": 6, "random_tokens": 40}, {"baseline": 3}
    whole = Memory(most, lasting)
    arms = calibrate(TWO_ARMS, whole, tmp_path / "whole.json", SETTINGS)
    asked = []
    # Fewer tries a process than an arm takes.
    for _ in range(len(whole.asked)):
        memory = Memory(most, lasting)

        def stops(trial: Trial, limit_mib: float, verifies: bool, writes: bool, memory: Memory = memory) -> Answer:
            if len(memory.asked) == 3:
                raise StoppedError
            return memory(trial, limit_mib, verifies, writes)

        calibration = Calibration(TWO_ARMS, SETTINGS, CPU, tmp_path / "parts.json", tmp_path, stops, lambda text: None)
        try:
            found = {name: calibration.arm(name, again=False) for name in TWO_ARMS.recipes}
            break
        except StoppedError:
            continue
        finally:
            asked += memory.asked
    assert [trial.trial_id for trial in asked] == [trial.trial_id for trial in whole.asked] and len(asked) > 6
    for name, arm in found.items():
        without = [[{k: v for k, v in t.items() if k != "seconds"} for t in a["tries"]] for a in (arm, arms[name])]
        assert without[0] == without[1] and arm["micro_rows"] == arms[name]["micro_rows"]


def test_what_an_older_version_began_is_tried_again(tmp_path: Path) -> None:
    """Its tries had one peak, that of the whole."""
    most, file = {"baseline": 6, "random_tokens": 40}, tmp_path / "calibration.json"
    expected = calibrate(TWO_ARMS, whole := Memory(most), file, SETTINGS)
    older = json.loads(file.read_text())
    del older["arms"]["random_tokens"], older["arms"]["baseline"]["micro_rows"]
    for tried in older["arms"]["baseline"]["tries"]:
        del tried["batch_mib"]
    file.write_text(json.dumps(older))
    arms = calibrate(TWO_ARMS, again := Memory(most), file, SETTINGS)
    assert [trial.trial_id for trial in again.asked] == [trial.trial_id for trial in whole.asked]
    assert all(arm["micro_rows"] == expected[name]["micro_rows"] for name, arm in arms.items())


def test_what_fails_at_every_size_is_not_tried_at_every_size(tmp_path: Path) -> None:
    memory = Memory({"baseline": 16, "random_tokens": 16}, lasting={"baseline": 0})
    arms = calibrate(TWO_ARMS, memory, tmp_path / "calibration.json", SETTINGS)
    assert [t["micro_rows"] for t in arms["baseline"]["tries"] if t["steps"] == 30] == [16, 8, 1]
    assert arms["baseline"]["micro_rows"] is None and arms["random_tokens"]["micro_rows"] == 16


def test_the_smallest_size_is_asked_once_and_after_a_second_failure(tmp_path: Path) -> None:
    settings = replace(SETTINGS, scale_batch=True, starts=1)
    memory = Memory({"baseline": 100, "random_tokens": 100}, lasting={"baseline": 75})
    arms = calibrate(TWO_ARMS, memory, tmp_path / "calibration.json", settings)
    verified = [t["micro_rows"] for t in arms["baseline"]["tries"] if t["verifies"]]
    found = verified[0]
    assert 97 <= found <= 100 and verified[1] == int(0.9 * found) and verified[2] == 1
    assert verified[3:] == [int(0.9 * verified[1]), int(0.9 * int(0.9 * verified[1]))]
    assert arms["baseline"]["micro_rows"] == verified[-1] <= 75


def test_a_step_grows_to_its_micro_batch(tmp_path: Path) -> None:
    settings = replace(SETTINGS, scale_batch=True, starts=1)
    arms = calibrate(TWO_ARMS, Memory({"baseline": 6, "random_tokens": 40}), tmp_path / "calibration.json", settings)
    spec = replace(calibrated(TWO_ARMS, arms), batch_lr_rule="linear")
    assert spec.rows_of("baseline") == (16, 4) and spec.rows_of("random_tokens") == (40, 40)
    assert spec.recipe("random_tokens").optimizer.lr_scale == 2.5
    assert all(t["global_rows"] == max(16, t["micro_rows"]) for arm in arms.values() for t in arm["tries"])


def test_a_control_takes_its_part_of_the_baseline_s_grown_step(tmp_path: Path) -> None:
    settings = replace(SETTINGS, scale_batch=True, starts=1)
    spec = replace(TWO_ARMS, recipes=("baseline", "fewer_rows", "random_tokens"))
    memory = Memory({"baseline": 40, "fewer_rows": 40, "random_tokens": 50})
    arms = calibrate(spec, memory, tmp_path / "calibration.json", settings)
    grown = replace(calibrated(spec, arms), batch_lr_rule="linear")
    assert [grown.rows_of(name) for name in grown.recipes] == [(40, 40), (40, 20), (50, 50)]
    assert [trial.race.global_rows for trial in plan_trials(grown, tmp_path)] == [40, 40, 50]
    assert [grown.recipe(name).optimizer.lr_scale for name in grown.recipes] == [2.5, 2.5, 3.125]
    told = replace(spec, batches={"fewer_rows": ArmBatch(8, 2)})
    assert calibrate(told, memory, tmp_path / "told.json", settings)["fewer_rows"]["global_rows"] == 8


def test_nothing_fits(tmp_path: Path) -> None:
    arms = calibrate(TWO_ARMS, Memory({"baseline": 0, "random_tokens": 4}), tmp_path / "calibration.json", SETTINGS)
    assert arms["baseline"]["micro_rows"] is None and len(arms["baseline"]["tries"]) == 1
    assert notes(SETTINGS, arms)[1] == "baseline: no micro-batch fits"
    assert calibrated(TWO_ARMS, arms).batches == {"random_tokens": ArmBatch(16, 4)}
