"""Whether a micro-batch fits: real tries under a real limit, what they write, and what is no want of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TWO_ARMS, prepared

from cggr_ray.calibration import trial_spec
from cggr_ray.evaluation.generated import Generated
from cggr_ray.evaluation.suite import Evaluation
from cggr_ray.fits import SmallRun, ask, limit
from cggr_ray.learner import Learner
from cggr_ray.out_of_memory import is_out_of_memory
from cggr_ray.race import Trial, plan_trials

# MiB that no try here needs.
PLENTY = 100_000.0
NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."),
)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(TWO_ARMS.data, tmp_path_factory)


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
    spec = replace(TWO_ARMS, recipes=("baseline",), global_rows=1, micro_rows=1)
    race = trial_spec(spec, "baseline", 1, 1, 1, verifies=False)
    (trial,) = plan_trials(race, tmp_path)
    if writer == "save_model":
        trial = replace(trial, race=trial_spec(replace(spec, evaluation=asked), "baseline", 1, 1, 1, verifies=True))
    trial = trial.placed(tmp_path / "try", data_folder)

    def fails(*arguments: Any) -> None:
        raise NO_MEMORY[2]

    with monkeypatch.context() as patched:
        patched.setattr(f"cggr_ray.checkpoint.{writer}", fails)
        answer, searching = (SmallRun(trial, writes, writes).fits(PLENTY) for writes in (True, False))
    assert searching.fits and not answer.fits and "CUBLAS_STATUS_ALLOC_FAILED" in answer.message


@pytest.mark.parametrize("error", [RuntimeError, ImportError])
def test_a_thread_or_a_library_that_finds_no_room_is_want_of_memory(
    error: type[Exception], data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trial,) = plan_trials(trial_spec(replace(TWO_ARMS, recipes=("baseline",)), "baseline", 1, 1, 1, False), tmp_path)
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
        answer = SmallRun(trial.placed(tmp_path / "try", data_folder), True, True).fits(PLENTY)
        assert (answer.fits, answer.message) == (False, said[error])
        patched.setattr("cggr_ray.checkpoint.save", fails("a mistake"))
        with pytest.raises(error, match="a mistake"):
            SmallRun(trial.placed(tmp_path / "again", data_folder), True, True).fits(PLENTY)


def test_a_search_takes_the_fullest_steps_and_what_verifies_all(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a recipe that keeps fewer and fewer positions; a search takes no step beyond the warm-up."""
    spec = replace(TWO_ARMS, recipes=("cggr_loss",))
    (trial,) = plan_trials(trial_spec(spec, "cggr_loss", 1, 1, 2, False), tmp_path)
    seen: dict[bool, list[Any]] = {}
    rehearse, step = Learner.rehearse, Learner.step
    for verifies, found in [(False, seen.setdefault(False, [])), (True, seen.setdefault(True, []))]:
        with monkeypatch.context() as patched:
            patched.setattr(Learner, "rehearse", lambda *args, f=found: f.append(args[-1].tokens) or rehearse(*args))
            patched.setattr(Learner, "step", lambda *args, f=found, **more: f.append("step") or step(*args, **more))
            assert SmallRun(trial.placed(tmp_path / f"{verifies}", data_folder), verifies, False).fits(PLENTY).fits
    assert seen[False] == [1.0, 1.0]
    assert sorted({*seen[True]} - {"step"}) == [0.25, 0.4375, 0.625, 0.8125, 1.0] and seen[True][-2:] == ["step"] * 2


def test_a_try_keeps_what_it_writes_in_its_own_folder(data_folder: Path, tmp_path: Path) -> None:
    spec = replace(TWO_ARMS, recipes=("baseline",), save_model=True)
    (trial,) = plan_trials(trial_spec(spec, "baseline", 1, 1, 1, verifies=False), tmp_path)
    assert SmallRun(trial.placed(tmp_path / "try", data_folder), True, True).fits(PLENTY).fits
    assert [path.name for path in tmp_path.iterdir()] == ["try"]
    assert (tmp_path / "try" / "model" / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "try" / "checkpoints").iterdir()] == ["step_00000001"]


def test_a_batch_took_no_more_than_the_whole(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where more of a library is mapped after it, which a resident size is said without."""
    sizes = count(400.0, -1.0)
    monkeypatch.setattr("cggr_ray.fits.peak_mib", lambda device: next(sizes))
    (trial,) = plan_trials(trial_spec(replace(TWO_ARMS, recipes=("baseline",)), "baseline", 1, 1, 1, False), tmp_path)
    answer = SmallRun(trial.placed(tmp_path / "try", data_folder), False, False).fits(PLENTY)
    assert answer.fits and 0 < answer.batch_mib <= answer.peak_mib


# Each in a process of its own


def tried(folder: Path, data_folder: Path, rows: int) -> Trial:
    spec = replace(TWO_ARMS, recipes=("baseline",), global_rows=rows, micro_rows=rows, budget_seconds=2.0)
    return plan_trials(spec, folder)[0].placed(folder, data_folder)


@pytest.mark.slow
def test_a_real_limit_is_run_into_and_nothing_is_left(data_folder: Path, tmp_path: Path) -> None:
    small = ask(tried(tmp_path, data_folder, 2), 600.0, True, True)
    assert small.fits and 200 < small.batch_mib <= small.peak_mib < 600 and small.message == ""
    large = ask(tried(tmp_path, data_folder, 128), 600.0, True, True)
    assert not large.fits and "can't allocate memory" in large.message and large.peak_mib < 620
    # Less than the libraries take: nothing fits, and that is an answer too.
    nothing = ask(tried(tmp_path, data_folder, 1), 100.0, True, True)
    assert not nothing.fits and nothing.message
    assert list(tmp_path.iterdir()) == []


def test_the_limit_is_lifted_where_memory_ran_out() -> None:
    with pytest.raises(MemoryError), limit(torch.device("cpu"), 1.0):
        bytearray(2**28)
    assert len(bytearray(2**28)) == 2**28


@pytest.mark.slow
def test_any_other_error_is_shown(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exit code 1, and not for want of memory:\n(.|\n)*FileNotFoundError"):
        ask(tried(tmp_path, tmp_path / "nothing", 2), 2000.0, True, False)
