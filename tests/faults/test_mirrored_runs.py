"""Runs whose mirror fails, tears, waits or is killed in the middle: what is in it always goes on to the same end."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from faulty_filesystem import Faulty, nothing, quick  # noqa: F401 - quick is used by every test
from runs import STEPS, STEPS_BETWEEN, in_a_child, outcome, trial_in, warm

from cggr_ray import copying, run_mirror
from cggr_ray.loop import run_race
from cggr_ray.mirror import Mirror
from cggr_ray.race import Trial
from cggr_ray.remote import RemoteError, open_remote
from cggr_ray.run_mirror import Mirroring, mirrored
from cggr_ray.stopping import StoppedError
from cggr_ray.workers import ALONE, Workers

PATIENCE = 20.0
Stop = Callable[[], bool]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared") / "data"


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves that has no mirror and was never interrupted."""
    try:
        return outcome(warm(trial_in(tmp_path_factory.mktemp("whole") / "run", data)))
    finally:
        logging.disable(logging.NOTSET)  # for the tests after this one in the same process


@pytest.fixture(autouse=True)
def quicker(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811 - the fixture, asked for first
    """Shorter waits still: runs end within seconds."""
    monkeypatch.setattr(copying, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(copying, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(run_mirror, "STOP_SECONDS", 0.01)


class Place:
    """A mirror, and the machines that have a run in it: each a folder of its own."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data, self.disk = folder, data, folder / "disk"
        self.run = self.disk / "runs" / "run"
        trial = self.trial("first", data)
        with Mirror(folder, trial.race.mirror or "") as mirror:
            shutil.copytree(data, folder / "data")
            mirror.send_data()

    def trial(self, machine: str, data: Path | None = None, **changes: Any) -> Trial:
        folder = self.folder / machine
        changes = {"mirror": f"faulty://{self.disk}", **changes}
        return trial_in(folder / "runs" / "run", data or folder / "data", **changes)

    def saved(self) -> list[str]:
        """Checkpoints there that are as their manifest says, by hashes that are taken here."""
        return sorted(path.parent.name for path in self.run.glob("checkpoints/*/manifest.json") if is_whole(path))


def is_whole(manifest: Path) -> bool:
    for name, fingerprint in json.loads(manifest.read_bytes()).items():
        content = (manifest.parent / name).read_bytes() if (manifest.parent / name).is_file() else b""
        if fingerprint != f"{len(content)} bytes, sha256 {sha256(content).hexdigest()}":
            return False
    return True


@pytest.fixture
def place(tmp_path: Path, data: Path, expected: dict[str, Any]) -> Place:
    return Place(tmp_path, data)


def run(trial: Trial, stop: Stop = lambda: False) -> Mirroring:
    """What a worker of Ray does with a trial."""
    with mirrored(trial, ALONE) as mirror:
        run_race(trial, stop=lambda: stop() or mirror.asks_to_stop())
    return mirror


def after_uploads(place: Place, trial: Trial, end_at: int | None = None) -> Stop:
    """Asked before every step: waits until the newest checkpoint is in the mirror; ends the run before a step."""
    asked = itertools.count(-1)  # the first time is before the run begins

    def stop() -> bool:
        newest = max((path.name for path in Path(trial.folder).glob("checkpoints/step_*")), default=None)
        deadline = time.monotonic() + PATIENCE
        while newest is not None and newest not in place.saved():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return next(asked) == end_at

    return stop


def resumed(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["kind"] == "resumed"]


def test_a_run_that_was_stopped_goes_on_on_a_machine_that_has_nothing(place: Place, expected: dict[str, Any]) -> None:
    """By the last upload alone: none came before, and the data come from the mirror too."""
    first, second = place.trial("first"), place.trial("second")
    with pytest.raises(StoppedError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "LOOK_SECONDS", 60.0)
        run(first, before_step(5))
    shutil.rmtree(place.folder / "first")
    assert place.saved()[-1] == "step_00000005"
    run(second)
    assert outcome(Path(second.folder)) == expected and resumed(Path(second.folder)) == [5]
    prepared = {path.relative_to(place.data): path.read_bytes() for path in place.data.rglob("*.*") if path.is_file()}
    del prepared[Path("run.lock")]
    assert {name: (place.folder / "second" / "data" / name).read_bytes() for name in prepared} == prepared
    left = {path.relative_to(place.run).as_posix() for path in place.run.rglob("*") if path.is_file()}
    assert {"summary.json", "metrics.jsonl", "model/model.safetensors"} <= left
    assert not any(name.startswith("checkpoints") or name == "run.lock" for name in left)
    assert (place.run / "summary.json").read_bytes() == (Path(second.folder) / "summary.json").read_bytes()


def before_step(end_at: int) -> Stop:
    asked = itertools.count(-1)
    return lambda: next(asked) == end_at


def test_a_finished_run_is_fetched_and_not_run_again(place: Place, expected: dict[str, Any]) -> None:
    run(place.trial("first"))
    shutil.rmtree(place.folder / "first")
    second = place.trial("second")
    with mirrored(second, ALONE):
        steps = itertools.count()
        run_race(second, stop=lambda: bool(next(steps)))  # would be asked before the run begins
    assert next(steps) == 0
    assert json.loads((Path(second.folder) / "summary.json").read_text())["steps"] == STEPS


@pytest.mark.parametrize("at", range(3, 63, 6))
def test_a_process_that_is_killed_in_an_upload_leaves_what_goes_on(
    place: Place, expected: dict[str, Any], at: int
) -> None:
    """At the n-th event of its filesystem: before an operation, or in the middle of a write. Its disk is lost too."""
    first, second = place.trial("first"), place.trial("second")

    def body() -> None:
        count = itertools.count()

        def kill(operation: str, path: str) -> None:
            if operation not in ("read", "list") and next(count) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        Faulty.does = staticmethod(kill)
        run(first, after_uploads(place, first))

    ended = in_a_child(body)
    shutil.rmtree(place.folder / "first")
    saved = place.saved()
    assert ended == -signal.SIGKILL and len(saved) <= 3
    run(second)
    assert outcome(Path(second.folder)) == expected
    if saved:
        assert resumed(Path(second.folder)) == [int(saved[-1].removeprefix("step_"))]
    assert place.saved() == [] and not (place.run / "checkpoints").exists()


def test_there_is_always_a_whole_checkpoint_once_there_was_one(place: Place) -> None:
    """Whatever is written or removed: looked for before every operation, and at most three are kept. What has a
    manifest is whole: what is torn does not even look like a checkpoint."""
    seen: list[int] = []
    torn: list[str] = []

    def look(operation: str, path: str) -> None:
        if (place.run / "summary.json").is_file():
            return
        seen.append(len(place.saved()))
        torn.extend(
            {path.parent.name for path in place.run.glob("checkpoints/*/manifest.json")}.difference(place.saved())
        )

    Faulty.does = staticmethod(look)
    trial = place.trial("first", checkpoint_every_seconds=0.5)
    run(trial, after_uploads(place, trial))
    first = next(n for n, count in enumerate(seen) if count)
    assert min(seen[first:]) >= 1 and max(seen) == 3 and torn == []


@pytest.mark.parametrize("broken", ["write", "half", "move", "remove", "list"])
def test_uploads_that_fail_do_not_touch_the_run_which_says_so_at_its_end(
    place: Place, expected: dict[str, Any], broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    trial = place.trial("first")
    with mirrored(trial, ALONE) as mirror:

        def fail(operation: str, path: str) -> None:
            if operation == broken and "/runs/" in path:
                raise LookupError(f"no route to {operation}")  # as of a library with errors of its own

        Faulty.does = staticmethod(fail)
        run_race(trial, stop=lambda: time.sleep(0.03) is not None)
    assert outcome(Path(trial.folder)) == expected
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    if broken == "list":  # only asked at the beginning
        assert mirror.failure is None and warnings == []
        return
    assert mirror.failure is not None and f"no route to {broken}" in mirror.failure
    assert len(warnings) == 2, warnings
    assert "an upload to faulty://" in warnings[0] and "what runs goes on" in warnings[0]
    assert "the last upload has failed" in warnings[1]
    assert broken == "remove" or not (place.run / "summary.json").exists()
    Faulty.does = staticmethod(nothing)
    assert run(trial).failure is None
    assert (place.run / "summary.json").read_bytes() == (Path(trial.folder) / "summary.json").read_bytes()


def test_an_upload_that_fails_now_and_then_is_made_good(place: Place, expected: dict[str, Any]) -> None:
    counts = itertools.count()

    def every_third(operation: str, path: str) -> None:
        if operation in ("write", "half") and next(counts) % 3 == 0:
            raise OSError("timed out")

    trial = place.trial("first")
    with mirrored(trial, ALONE) as mirror:
        Faulty.does = staticmethod(every_third)
        run_race(trial, stop=after_uploads(place, trial))
        Faulty.does = staticmethod(nothing)
    assert mirror.failure is None and outcome(Path(trial.folder)) == expected
    assert (place.run / "summary.json").is_file() and (place.run / "model" / "model.safetensors").is_file()


def test_a_checkpoint_that_the_run_removes_while_it_is_sent_arrives_whole(place: Place) -> None:
    """Uploads that are slower than checkpoints would else never come to an end."""
    trial = place.trial("first")
    begun, arrived = list[str](), list[str]()

    def slow(operation: str, path: str) -> None:
        where = Path(path)
        if operation == "write" and where.parts[-3:-2] == ("checkpoints",) and where.name == "model.safetensors":
            begun.append(where.parts[-2])
            if len(begun) == 1:
                deadline = time.monotonic() + PATIENCE
                while (Path(trial.folder) / "checkpoints" / begun[0]).exists():
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
        if operation == "remove" and place.saved():
            arrived.extend(place.saved())

    def wait_for_the_first() -> bool:
        deadline = time.monotonic() + PATIENCE
        while list(Path(trial.folder).glob("checkpoints/step_*")) and not begun:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return False

    with mirrored(trial, ALONE):
        Faulty.does = staticmethod(slow)
        run_race(trial, stop=wait_for_the_first)
    assert begun[0] == f"step_{STEPS_BETWEEN:08d}" and begun[0] in arrived


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_checkpoint_there_is_not_used(
    place: Place, expected: dict[str, Any], damaged: int, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = place.trial("first"), place.trial("second")
    with pytest.raises(StoppedError):
        run(first, after_uploads(place, first, end_at=5))
    shutil.rmtree(place.folder / "first")
    saved = place.saved()
    assert saved == ["step_00000004", "step_00000005"]
    for name in saved[-damaged:]:
        file = place.run / "checkpoints" / name / "optimizer.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    run(second)
    assert outcome(Path(second.folder)) == expected
    assert resumed(Path(second.folder)) == ([4] if damaged == 1 else [])
    warnings = [record.message for record in caplog.records if "damaged" in record.message]
    assert [
        name for name in reversed(saved) if any(f"{name} in its mirror is damaged" in said for said in warnings)
    ] == (saved[::-1][:damaged])


def test_what_is_newer_here_is_kept(place: Place, expected: dict[str, Any]) -> None:
    trial = place.trial("first")
    with pytest.raises(StoppedError):
        run(trial, after_uploads(place, trial, end_at=3))
    with pytest.raises(StoppedError):  # goes on without its mirror
        run_race(trial, stop=before_step(3))
    assert place.saved()[-1] == "step_00000003"
    run(trial)
    assert outcome(Path(trial.folder)) == expected and resumed(Path(trial.folder)) == [3, 6]


def test_a_run_of_another_recipe_there_is_not_gone_on_with(place: Place, expected: dict[str, Any]) -> None:
    other, trial = place.trial("other", recipe="baseline"), place.trial("first")
    with pytest.raises(StoppedError):
        run(other, after_uploads(place, other, end_at=5))
    run(trial)
    assert outcome(Path(trial.folder)) == expected and resumed(Path(trial.folder)) == []


def test_a_run_there_is_gone_on_with_whatever_words_its_recipe_is_described_in(
    place: Place, expected: dict[str, Any]
) -> None:
    """And where an older version began it, which had fewer settings."""
    first, trial = place.trial("first"), place.trial("second")
    with pytest.raises(StoppedError):
        run(first, after_uploads(place, first, end_at=5))
    record = json.loads((place.run / "run.json").read_text())
    del record["parts"]["execution"]["prefetch"]
    (place.run / "run.json").write_text(json.dumps(record))
    run(replace(trial, recipe=replace(trial.recipe, description="in other words")))
    assert outcome(Path(trial.folder)) == expected and resumed(Path(trial.folder)) == [5]


def test_checkpoints_may_go_while_they_are_looked_for(tmp_path: Path) -> None:
    """At its end a run removes them, folder and all, and the thread that sends them may be looking."""
    ended, checkpoints = threading.Event(), tmp_path / "checkpoints"

    def come_and_go() -> None:
        while not ended.is_set():
            checkpoints.mkdir()
            checkpoints.rmdir()

    mirror, run = run_mirror.RunMirror(tmp_path, open_remote("memory://race")), threading.Thread(target=come_and_go)
    run.start()
    try:
        assert all(mirror._newest() is None for _ in range(20_000))
    finally:
        ended.set()
        run.join()


def test_workers_of_a_machine_fetch_one_after_the_other_however_long_it_takes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one longer than the others would wait for a stranger."""
    trial, met, fetched = place.trial("second"), Barrier(2), list[int]()
    fetch = run_mirror.RunMirror.fetch
    monkeypatch.setattr(run_mirror, "WAIT_SECONDS", 0.02)

    class One(Workers):
        size = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def reason(self, own: str | None) -> str | None:
            met.wait(PATIENCE)
            return own

    def slow(mirror: run_mirror.RunMirror, trial: Trial) -> None:
        fetch(mirror, trial)
        if not fetched:
            time.sleep(0.3)
        fetched.append(local.rank)

    def begin(rank: int) -> None:
        local.rank = rank
        with mirrored(trial, One(rank)):
            pass

    local = threading.local()
    monkeypatch.setattr(run_mirror.RunMirror, "fetch", slow)
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(begin, rank) for rank in (1, 0)]:
            done.result()
    assert fetched == [0, 1]


def test_a_mirror_that_does_not_answer_stops_a_run_before_it_begins(place: Place) -> None:
    """Nobody knows where it stands: begun again, it would take the place of what is there."""

    def fail(operation: str, path: str) -> None:
        raise PermissionError("denied")

    Faulty.does = staticmethod(fail)
    trial = place.trial("first")
    with pytest.raises(RemoteError, match="PermissionError: denied"):
        run(trial)
    assert not (Path(trial.folder) / "metrics.jsonl").exists()


def test_a_request_to_end_comes_through_the_mirror(place: Place) -> None:
    trial = place.trial("first")

    def ask() -> bool:
        if list(Path(trial.folder).glob("checkpoints/step_*")):
            (place.disk / "stop").touch()
            time.sleep(0.1)
        return False

    with pytest.raises(StoppedError):
        run(trial, ask)
    saved = max(path.name for path in Path(trial.folder).glob("checkpoints/step_*"))
    assert place.saved()[-1] == saved and int(saved.removeprefix("step_")) < STEPS


def test_data_do_not_leave_their_folder(place: Place) -> None:
    manifest = place.disk / "data" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"../../stolen": "0 bytes"}))
    with pytest.raises(RemoteError, match="names files outside of its folder"):
        run(place.trial("first"))


def test_data_that_are_not_what_was_sent_are_refused(place: Place) -> None:
    file = next((place.disk / "data").rglob("tokens.npy"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RemoteError, match=r"tokens.npy is not what was written"):
        run(place.trial("first"))
    assert not (place.folder / "first" / "data" / "ready.json").exists()
