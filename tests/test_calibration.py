"""Calibration: the search, what is kept and reused, real tries under a real limit; batches of arms and their rates."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import prepared, rows_of
from typer.testing import CliRunner

from cggr_ray import cli
from cggr_ray.batches import ArmBatch, smaller_sizes
from cggr_ray.calibration import (
    CLOSE,
    Calibration,
    Settings,
    calibrated,
    largest,
    notes,
    sizes_of,
    trial_spec,
    write_calibrated,
)
from cggr_ray.data.dataset import DataSpec
from cggr_ray.data.sources import Problems
from cggr_ray.evaluation.generated import Generated
from cggr_ray.evaluation.suite import Evaluation
from cggr_ray.fits import Answer, SmallRun, ask, limit
from cggr_ray.loop import run_race
from cggr_ray.models.presets import ModelSpec
from cggr_ray.out_of_memory import is_out_of_memory
from cggr_ray.race import RaceSpec, Trial, load_race, plan_trials
from cggr_ray.routing.curriculum import Curriculum
from cggr_ray.routing.rows import AllRows, FewerRows, HardestRows
from cggr_ray.routing.scorers import Setting
from cggr_ray.routing.tokens import RandomTokens

CPU = torch.device("cpu")
SPEC = RaceSpec(
    name="small",
    recipes=("baseline", "random_tokens"),
    global_rows=16,
    micro_rows=4,
    budget_seconds=8.0,
    step_seconds=1.0,
    milestones=(),
    model=ModelSpec(preset="tiny"),
    data=DataSpec(sources=(Problems(count=100),), row_tokens=128, val_documents=8),
    values={"optimizer.schedule.warmup_tokens": 3000},
    device="cpu",
)


# Batches of arms


def test_an_arm_may_have_rows_of_its_own(tmp_path: Path) -> None:
    own = {"random_tokens": {"global_rows": 64, "micro_rows": 32}}
    spec = RaceSpec.from_plain(SPEC.to_plain() | {"batches": own, "batch_lr_rule": "sqrt"})
    assert RaceSpec.from_plain(json.loads(json.dumps(spec.to_plain()))) == spec
    baseline, random = plan_trials(spec, tmp_path)
    assert (baseline.race.global_rows, baseline.race.micro_rows) == (16, 4)
    assert (random.race.global_rows, random.race.micro_rows) == (64, 32)
    assert baseline.recipe.optimizer.lr_scale == 1 and "optimizer.lr_scale" not in baseline.values
    assert random.recipe.optimizer.lr_scale == random.values["optimizer.lr_scale"] == 2
    assert random.race.rows_of("random_tokens") == (64, 32), "what is told to a trial is applied once"
    tuned = replace(spec, values={"optimizer.lr_scale": 0.5}, batch_lr_rule="linear")
    assert [tuned.recipe(name).optimizer.lr_scale for name in tuned.recipes] == [0.5, 2.0]
    assert replace(spec, batch_lr_rule="none").recipe("random_tokens").optimizer.lr_scale == 1
    assert replace(spec, batches={"baseline": ArmBatch(2)}).rows_of("baseline") == (2, 2)


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ({"random_token": {}}, r"batches\.random_token: no such recipe in the race; did you mean 'random_tokens'"),
        ({"baseline": {"rows": 3}}, r"unknown key 'batches\.baseline\.rows'"),
        ({"baseline": {"global_rows": 0}}, r"batches\.baseline: global_rows = 0; accepted: 1 or more"),
        ({"baseline": {"micro_rows": 17}}, r"batches\.baseline: micro_rows = 17; accepted: 1 to global_rows = 16"),
        ({"baseline": {"global_rows": "many"}}, r"batches\.baseline\.global_rows = 'many'"),
    ],
)
def test_mistakes_in_batches_are_named(batches: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RaceSpec.from_plain(SPEC.to_plain() | {"batches": batches})


def test_micro_batches_of_an_arm_are_checked_with_its_recipe() -> None:
    rows = {"kind": "hardest_rows", "keep": 0.25, "layers": 1}
    spec = replace(SPEC, arms={"baseline": {"rows": rows}}, batches={"baseline": ArmBatch(16, 8)})
    spec.check()
    with pytest.raises(ValueError, match=r"recipe 'baseline': keep = 0\.25 of a micro-batch of 2 rows"):
        replace(spec, batches={"baseline": ArmBatch(16, 2)}).check()


def test_sizes_after_memory_ran_out() -> None:
    assert list(smaller_sizes(AllRows(), 8, 16)) == [4, 3, 2, 1]
    assert list(smaller_sizes(HardestRows(keep=0.25), 12, 12)) == [4]
    assert list(smaller_sizes(HardestRows(keep=0.25), 4, 16)) == list(smaller_sizes(AllRows(), 1, 1)) == []


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(SPEC.data, tmp_path_factory)


def test_arms_of_other_batches_warm_up_on_the_same_tokens_of_one_order(data_folder: Path, tmp_path: Path) -> None:
    spec = replace(SPEC, batches={"random_tokens": ArmBatch(16, 8)}, batch_lr_rule="sqrt", global_rows=8)
    rates, orders = [], []
    for trial in plan_trials(spec, tmp_path):
        folder = tmp_path / trial.trial_id
        orders.append(run_race(trial.placed(folder, data_folder))["order"])
        steps = [row for row in rows_of(folder, "step") if row["fraction"] < 0.6]
        rates.append({row["tokens_seen"]: row["train/learning_rate"] for row in steps})
    small, large = rates
    both = sorted(small.keys() & large.keys())
    assert len(both) >= 2 and both[0] < 3000 < both[-1], "before and after the end of the warm-up"
    for tokens in both:
        assert large[tokens] == pytest.approx(2**0.5 * small[tokens], rel=1e-12)
    assert small[both[-1]] == 3e-3 and small[both[0]] == pytest.approx(3e-3 * both[0] / 3000)
    assert orders[0].items() <= orders[1].items() and len(orders[0]) == 1 and len(orders[1]) == 2


def test_what_a_curriculum_never_keeps_need_not_fit() -> None:
    setting = Setting(CPU, 4, 32, 100)
    at_once = Curriculum(target_at=0.0)
    assert RandomTokens(0.25, curriculum=at_once).build(0, setting).levels() == (0.25,)
    assert RandomTokens(0.25, curriculum=replace(at_once, full_from=0.9)).build(0, setting).levels() == (0.25, 1.0)
    assert RandomTokens(0.25, curriculum=replace(at_once, full_every=8)).build(0, setting).levels() == (0.25, 1.0)
    assert RandomTokens(0.25).build(0, setting).levels()[-1] == 1.0


# The search


# Peaks in MiB of so many rows, of which `most` are the last that fit in 1000.
PEAKS: dict[str, Callable[[int, int], float]] = {
    "in proportion": lambda size, most: 1000 * size / (most + 0.5),
    "above what is always there": lambda size, most: 700 + 300 * size / (most + 0.5),
    "with a jump": lambda size, most: 1000 * size / (most + 0.5) - (200 if size < most / 2 else 0),
    "an allocator that takes what there is": lambda size, most: min(990.0, 3000 * size / (most + 0.5)),
    "of no use": lambda size, most: 500.0,
}


@pytest.mark.parametrize("most", [0, 1, 2, 3, 5, 8, 13, 31, 60, 64, 99])
@pytest.mark.parametrize("sizes", [range(1, 65), (1, 2, 4, 8, 16, 32, 64), (4, 8, 12, 24, 60), (3,)])
@pytest.mark.parametrize("peaks", PEAKS)
def test_the_largest_size_is_found_by_trying_few(peaks: str, sizes: range | tuple[int, ...], most: int) -> None:
    tried: list[int] = []

    def peak(size: int) -> float | None:
        tried.append(size)
        return PEAKS[peaks](size, most) if size <= most else None

    found, best = largest(sizes, peak, 1000.0), max((size for size in sizes if size <= most), default=None)
    assert found == best or (found is not None and best is not None and 0 <= best - found <= CLOSE * best)
    assert len(tried) == len(set(tried)) <= 2 * len(sizes).bit_length() + 1 and set(tried) <= set(sizes)
    assert sum(size > most for size in tried) <= len(sizes).bit_length()


@pytest.mark.parametrize("most", [4, 22, 57, 300])
@pytest.mark.parametrize("peaks", ["in proportion", "above what is always there"])
def test_peaks_that_grow_evenly_are_met_at_once(peaks: str, most: int) -> None:
    tried: list[int] = []

    def peak(size: int) -> float | None:
        tried.append(size)
        return PEAKS[peaks](size, most) if size <= most else None

    assert largest(range(1, 4097), peak, 1000.0) == most
    assert tried == [1, 2, most, most + 1]


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


class Memory:
    """Stands in for the processes: rows of a recipe fit up to a number, longer tries up to a smaller one."""

    def __init__(self, most: dict[str, int], lasting: dict[str, int] | None = None) -> None:
        self.most, self.lasting, self.asked, self.written = most, lasting or {}, list[Trial](), list[bool]()

    def __call__(self, trial: Trial, limit_mib: float, writes: bool) -> Answer:
        self.asked.append(trial)
        self.written.append(writes)
        name, rows = trial.recipe.name, trial.race.micro_rows
        most = self.most[name] if trial.race.budget_seconds == 2 else self.lasting.get(name, self.most[name])
        return Answer(rows <= most, limit_mib * min(1.0, rows / (most + 0.5)), "" if rows <= most else "no memory")


def calibrate(spec: RaceSpec, memory: Memory, file: Path, settings: Settings, again: bool = False) -> dict[str, Any]:
    calibration = Calibration(spec, settings, CPU, file, file.parent, memory, lambda text: None)
    return {name: calibration.arm(name, again) for name in spec.recipes}


SETTINGS = Settings(memory_mib=1000.0, starts=3, verify_steps=30)


def test_what_is_found_is_verified_kept_and_raced(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    memory = Memory({"baseline": 6, "random_tokens": 40}, lasting={"baseline": 3})
    arms = calibrate(SPEC, memory, file, SETTINGS)
    assert [(arm["micro_rows"], arm["global_rows"], arm["limited"]) for arm in arms.values()] == [
        (2, 16, True),
        (16, 16, False),
    ]
    tries = arms["baseline"]["tries"]
    assert [(t["micro_rows"], t["steps"], t["fits"]) for t in tries] == [
        *((size, 2, size <= 6) for size in (1, 2, 4, 8)),
        (4, 30, False),
        (1, 30, True),
        *[(2, 30, True)] * 3,
    ]
    assert all(t["limit_mib"] == 950 and t["global_rows"] == 16 for t in tries) and tries[3]["message"] == "no memory"
    assert memory.written[: len(tries)] == [t["steps"] == 30 for t in tries]
    trial = memory.asked[0]
    assert trial.race.step_seconds == 1 and trial.race.budget_seconds == 2 and trial.race.micro_rows == 1
    write_calibrated(SPEC, notes(SETTINGS, arms), arms, tmp_path / "calibrated.toml")
    text = (tmp_path / "calibrated.toml").read_text()
    assert "# baseline: 2 rows fit, 543 MiB at the peak of 950, 16 rows a step" in text
    assert "# random_tokens: 16 rows fit, and no more were of use" in text
    race = load_race(str(tmp_path / "calibrated.toml"))
    assert race == replace(calibrated(SPEC, arms), name="small") and race.rows_of("baseline") == (16, 2)


def test_what_is_known_is_not_tried_again(tmp_path: Path) -> None:
    file, most = tmp_path / "calibration.json", {"baseline": 6, "random_tokens": 40}
    first = calibrate(SPEC, Memory(most), file, SETTINGS)
    nothing = Memory(most)
    assert calibrate(SPEC, nothing, file, SETTINGS) == first and not nothing.asked
    # A rate changes nothing here, but who knows of every value? Only what is asked anew is tried anew.
    other = replace(SPEC, arms={"random_tokens": {"tokens.keep": 0.5}})
    one = Memory(most)
    calibrate(other, one, file, SETTINGS)
    assert {trial.recipe.name for trial in one.asked} == {"random_tokens"}
    for changed in (replace(SETTINGS, head_room=0.1), replace(SETTINGS, memory_mib=900.0)):
        calibrate(SPEC, everything := Memory(most), file, changed)
        assert {trial.recipe.name for trial in everything.asked} == {"baseline", "random_tokens"}
    calibrate(SPEC, once_more := Memory(most), file, changed, again=True)
    assert once_more.asked


@pytest.mark.parametrize("what", ["device_info", "versions"])
def test_what_another_device_or_version_found_is_tried_again(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, most = tmp_path / "calibration.json", {"baseline": 6, "random_tokens": 40}
    calibrate(SPEC, Memory(most), file, SETTINGS)
    monkeypatch.setattr(f"cggr_ray.calibration.{what}", lambda *_: {"name": "another"})
    calibrate(SPEC, everything := Memory(most), file, SETTINGS)
    assert {trial.recipe.name for trial in everything.asked} == {"baseline", "random_tokens"}


class StoppedError(Exception):
    pass


def test_an_interrupted_calibration_goes_on(tmp_path: Path) -> None:
    most, lasting = {"baseline": 6, "random_tokens": 40}, {"baseline": 3}
    whole = Memory(most, lasting)
    arms = calibrate(SPEC, whole, tmp_path / "whole.json", SETTINGS)
    asked = []
    # Fewer tries a process than an arm takes.
    for _ in range(len(whole.asked)):
        memory = Memory(most, lasting)

        def stops(trial: Trial, limit_mib: float, writes: bool, memory: Memory = memory) -> Answer:
            if len(memory.asked) == 3:
                raise StoppedError
            return memory(trial, limit_mib, writes)

        calibration = Calibration(SPEC, SETTINGS, CPU, tmp_path / "parts.json", tmp_path, stops, lambda text: None)
        try:
            found = {name: calibration.arm(name, again=False) for name in SPEC.recipes}
            break
        except StoppedError:
            continue
        finally:
            asked += memory.asked
    assert [trial.trial_id for trial in asked] == [trial.trial_id for trial in whole.asked] and len(asked) > 6
    for name, arm in found.items():
        without = [[{k: v for k, v in t.items() if k != "seconds"} for t in a["tries"]] for a in (arm, arms[name])]
        assert without[0] == without[1] and arm["micro_rows"] == arms[name]["micro_rows"]


def test_what_fails_at_every_size_is_not_tried_at_every_size(tmp_path: Path) -> None:
    memory = Memory({"baseline": 16, "random_tokens": 16}, lasting={"baseline": 0})
    arms = calibrate(SPEC, memory, tmp_path / "calibration.json", SETTINGS)
    assert [t["micro_rows"] for t in arms["baseline"]["tries"] if t["steps"] == 30] == [16, 1]
    assert arms["baseline"]["micro_rows"] is None and arms["random_tokens"]["micro_rows"] == 16


def test_a_step_grows_to_its_micro_batch(tmp_path: Path) -> None:
    settings = replace(SETTINGS, scale_batch=True, starts=1)
    arms = calibrate(SPEC, Memory({"baseline": 6, "random_tokens": 40}), tmp_path / "calibration.json", settings)
    spec = replace(calibrated(SPEC, arms), batch_lr_rule="linear")
    assert spec.rows_of("baseline") == (16, 4) and spec.rows_of("random_tokens") == (40, 40)
    assert spec.recipe("random_tokens").optimizer.lr_scale == 2.5
    assert all(t["global_rows"] == max(16, t["micro_rows"]) for arm in arms.values() for t in arm["tries"])


def test_a_control_takes_its_part_of_the_baseline_s_grown_step(tmp_path: Path) -> None:
    settings = replace(SETTINGS, scale_batch=True, starts=1)
    spec = replace(SPEC, recipes=("baseline", "fewer_rows", "random_tokens"))
    memory = Memory({"baseline": 40, "fewer_rows": 40, "random_tokens": 50})
    arms = calibrate(spec, memory, tmp_path / "calibration.json", settings)
    grown = replace(calibrated(spec, arms), batch_lr_rule="linear")
    assert [grown.rows_of(name) for name in grown.recipes] == [(40, 40), (40, 20), (50, 50)]
    assert [trial.race.global_rows for trial in plan_trials(grown, tmp_path)] == [40, 40, 50]
    assert [grown.recipe(name).optimizer.lr_scale for name in grown.recipes] == [2.5, 2.5, 3.125]
    told = replace(spec, batches={"fewer_rows": ArmBatch(8, 2)})
    assert calibrate(told, memory, tmp_path / "told.json", settings)["fewer_rows"]["global_rows"] == 8


def test_nothing_fits(tmp_path: Path) -> None:
    arms = calibrate(SPEC, Memory({"baseline": 0, "random_tokens": 4}), tmp_path / "calibration.json", SETTINGS)
    assert arms["baseline"]["micro_rows"] is None and len(arms["baseline"]["tries"]) == 1
    assert notes(SETTINGS, arms)[1] == "baseline: no micro-batch fits"
    assert calibrated(SPEC, arms).batches == {"random_tokens": ArmBatch(16, 4)}


# Real tries

# MiB that no try here needs.
PLENTY = 100_000.0
NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."),
)


def test_what_says_that_memory_ran_out() -> None:
    assert all(map(is_out_of_memory, NO_MEMORY))
    assert not is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE"))
    assert not is_out_of_memory(ValueError(str(NO_MEMORY[1])))


@pytest.mark.parametrize("writer", ["save", "save_model"])
def test_a_try_that_verifies_writes_what_a_run_writes(
    writer: str, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint and a kept model: where memory runs out in writing one, the rows do not fit."""
    asked = Evaluation(tasks=(Generated(questions=1, max_new_tokens=2),), rows=1)
    spec = replace(SPEC, recipes=("baseline",), global_rows=1, micro_rows=1)
    race = trial_spec(spec, "baseline", 1, 1, 1, verifies=False)
    (trial,) = plan_trials(race, tmp_path)
    if writer == "save_model":
        trial = replace(trial, race=trial_spec(replace(spec, evaluation=asked), "baseline", 1, 1, 1, verifies=True))
    trial = trial.placed(tmp_path / "try", data_folder)

    def fails(*arguments: Any) -> None:
        raise NO_MEMORY[2]

    with monkeypatch.context() as patched:
        patched.setattr(f"cggr_ray.checkpoint.{writer}", fails)
        answer, searching = (SmallRun(trial, writes).fits(PLENTY) for writes in (True, False))
    assert searching.fits and not answer.fits and "CUBLAS_STATUS_ALLOC_FAILED" in answer.message


@pytest.mark.parametrize("error", [RuntimeError, ImportError])
def test_a_thread_or_a_library_that_finds_no_room_is_want_of_memory(
    error: type[Exception], data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trial,) = plan_trials(trial_spec(replace(SPEC, recipes=("baseline",)), "baseline", 1, 1, 1, False), tmp_path)
    said = {
        RuntimeError: "can't start new thread",
        ImportError: "/usr/lib/_lsprof.so: failed to map segment from shared object",
    }

    def fails(text: str) -> Callable[..., None]:
        def fail(*arguments: Any) -> None:
            raise error(text)

        return fail

    with monkeypatch.context() as patched:
        patched.setattr("cggr_ray.checkpoint.save", fails(said[error]))
        answer = SmallRun(trial.placed(tmp_path / "try", data_folder), True).fits(PLENTY)
        assert (answer.fits, answer.message) == (False, said[error])
        patched.setattr("cggr_ray.checkpoint.save", fails("a mistake"))
        with pytest.raises(error, match="a mistake"):
            SmallRun(trial.placed(tmp_path / "again", data_folder), True).fits(PLENTY)


def test_a_try_keeps_what_it_writes_in_its_own_folder(data_folder: Path, tmp_path: Path) -> None:
    spec = replace(SPEC, recipes=("baseline",), save_model=True)
    (trial,) = plan_trials(trial_spec(spec, "baseline", 1, 1, 1, verifies=False), tmp_path)
    assert SmallRun(trial.placed(tmp_path / "try", data_folder), True).fits(PLENTY).fits
    assert [path.name for path in tmp_path.iterdir()] == ["try"]
    assert (tmp_path / "try" / "model" / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "try" / "checkpoints").iterdir()] == ["step_00000001"]


# Each in a process of its own


def tried(folder: Path, data_folder: Path, rows: int) -> Trial:
    spec = replace(SPEC, recipes=("baseline",), global_rows=rows, micro_rows=rows, budget_seconds=2.0)
    return plan_trials(spec, folder)[0].placed(folder, data_folder)


@pytest.mark.slow
def test_a_real_limit_is_run_into_and_nothing_is_left(data_folder: Path, tmp_path: Path) -> None:
    small = ask(tried(tmp_path, data_folder, 2), 600.0, True)
    assert small.fits and 200 < small.peak_mib < 600 and small.message == ""
    large = ask(tried(tmp_path, data_folder, 128), 600.0, True)
    assert not large.fits and "can't allocate memory" in large.message and large.peak_mib < 620
    # Less than the libraries take: nothing fits, and that is an answer too.
    nothing = ask(tried(tmp_path, data_folder, 1), 100.0, True)
    assert not nothing.fits and nothing.message
    assert list(tmp_path.iterdir()) == []


def test_the_limit_is_lifted_where_memory_ran_out() -> None:
    with pytest.raises(MemoryError), limit(torch.device("cpu"), 1.0):
        bytearray(2**28)
    assert len(bytearray(2**28)) == 2**28


@pytest.mark.slow
def test_any_other_error_is_shown(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exit code 1, and not for want of memory:\n(.|\n)*FileNotFoundError"):
        ask(tried(tmp_path, tmp_path / "nothing", 2), 2000.0, False)
