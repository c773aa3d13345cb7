"""Damage on the disk, foreign trackers and disks that fill up, in the process of the test."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from runs import STEPS_BETWEEN, outcome, trial_in
from small_runs import rows_of

from cggr_ray import checkpoint
from cggr_ray.data.dataset import prepare
from cggr_ray.files import DiskFullError
from cggr_ray.loop import run_race
from cggr_ray.race import Trial
from cggr_ray.stopping import StoppedError

pytestmark = pytest.mark.faults

FILES = ("model", "objective", "optimizer", "router")
ALL_FILES = (*(f"{name}.safetensors" for name in FILES), "state.json", "manifest.json")
NEWEST, BEFORE = "step_00000005", "step_00000004"


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(at: float) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(at * (len(content) - 1))] ^= 4
        path.write_bytes(content)

    flip.__name__ = f"flipped_at_{at}"
    return flip


DAMAGES = (missing, empty, torn, short, flipped(0.0), flipped(0.31), flipped(0.77), flipped(1.0))


def stopped_after(steps: int) -> Callable[[], bool]:
    asked: Iterator[int] = iter(range(1_000_000))
    return lambda: next(asked) > steps  # the first time is before the run begins


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare(trial_in(folder, folder).race.data, folder)
    return folder


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    run_race(trial_in(folder, data))
    return outcome(folder)


@pytest.fixture(scope="module")
def half(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after five steps, with checkpoints of the fourth and the fifth."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.raises(StoppedError, match="stopped after 5 steps"):
        run_race(trial_in(folder, data), stop=stopped_after(5))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [BEFORE, NEWEST]
    return folder


def copied(half: Path, folder: Path, data: Path) -> Trial:
    shutil.copytree(half, folder)
    return trial_in(folder, data)


def last_resumed(folder: Path) -> dict[str, Any]:
    return rows_of(folder, "resumed")[-1]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", ALL_FILES)
def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_taken(
    half: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(half / "checkpoints", tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints" / NEWEST / name)
    found, said = checkpoint.newest(tmp_path)
    assert found == tmp_path / "checkpoints" / BEFORE
    assert f"{NEWEST}: " in said and f"goes on from {BEFORE}" in said
    assert name in said or damage is not missing
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json"])
def test_a_run_goes_on_from_the_checkpoint_before_and_says_so(
    half: Path, data: Path, expected: dict[str, Any], tmp_path: Path, name: str
) -> None:
    trial = copied(half, tmp_path / "run", data)
    flipped(0.5)(tmp_path / "run" / "checkpoints" / NEWEST / name)
    run_race(trial)
    assert outcome(tmp_path / "run") == expected
    row = last_resumed(tmp_path / "run")
    assert row["step"] == 4 and f"{NEWEST}: {name} is not what was written" in row["message"]


def test_a_run_without_a_usable_checkpoint_begins_again_and_says_so(
    half: Path, data: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    trial = copied(half, tmp_path / "run", data)
    for step in (BEFORE, NEWEST):
        torn(tmp_path / "run" / "checkpoints" / step / "model.safetensors")
    run_race(trial)
    assert outcome(tmp_path / "run") == expected
    row = last_resumed(tmp_path / "run")
    assert row["step"] == 0 and row["message"].endswith("begins again")


def test_a_damaged_checkpoint_is_none_of_the_two_that_are_kept(half: Path, data: Path, tmp_path: Path) -> None:
    trial = copied(half, tmp_path / "run", data)
    flipped(0.5)(tmp_path / "run" / "checkpoints" / NEWEST / "model.safetensors")
    (tmp_path / "run" / "checkpoints" / ".step_00000003.partial").mkdir()
    with pytest.raises(StoppedError):
        run_race(trial, stop=stopped_after(STEPS_BETWEEN))
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == [BEFORE, "step_00000006"] and checkpoint.newest(tmp_path / "run")[1] == ""


def test_torn_ends_of_what_is_appended_to_are_cut(
    half: Path, data: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    trial = copied(half, tmp_path / "run", data)
    for name, rest in (("metrics.jsonl", b'{"kind": "step", "st'), ("progress.f64", b"\x01\x02\x03")):
        with (tmp_path / "run" / name).open("ab") as file:
            file.write(rest)
    run_race(trial)
    assert outcome(tmp_path / "run") == expected


@pytest.mark.parametrize("number", [2, 4, 8, 11])
def test_no_room_at_any_flush_leaves_what_was_saved(
    half: Path, data: Path, expected: dict[str, Any], tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json and its folder are flushed by the first two, rows by the next two, then a checkpoint's files."""
    trial, sync, calls = copied(half, tmp_path / "run", data), os.fsync, iter(range(1000))

    def full(descriptor: int) -> None:
        if next(calls) + 1 >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFullError, match="what it saved before is whole"):
            run_race(trial)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [BEFORE, NEWEST]
    assert not list((tmp_path / "run").rglob("*.partial"))
    run_race(trial)
    assert outcome(tmp_path / "run") == expected


@pytest.mark.parametrize("where", ["open", "log", "finish"])
def test_trackers_that_fail_change_nothing_of_a_run(
    where: str, data: Path, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    from cggr_ray.telemetry import tensorboard

    def fails(method: str, error: Exception) -> None:
        if method == where:
            raise error

    class Client:
        """In place of a run of W&B."""

        summary: ClassVar[dict[str, Any]] = {}

        def __init__(self, **_: object) -> None:
            fails("open", wandb.errors.CommError("gone"))

        def define_metric(self, *_: object, **__: object) -> None: ...

        def log(self, row: dict[str, Any]) -> None:
            fails("log", wandb.errors.CommError("gone"))

        def finish(self) -> None:
            fails("finish", wandb.errors.CommError("gone"))

    class Full:
        """In place of our tracker for TensorBoard, on a full disk."""

        def __init__(self, _: Path) -> None:
            self.ask("open")

        def log(self, row: dict[str, Any]) -> None:
            self.ask("log")

        def finish(self, summary: dict[str, Any]) -> None:
            self.ask("finish")

        def ask(self, method: str) -> None:
            fails(method, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    monkeypatch.setattr(wandb, "init", Client)
    monkeypatch.setattr(tensorboard, "TensorBoardTracker", Full)
    run_race(trial_in(tmp_path, data, wandb="online", tensorboard=True))
    # The word that tells this run of W&B from others stays, for when it is resumed.
    shutil.rmtree(tmp_path / "wandb")
    assert outcome(tmp_path) == expected
