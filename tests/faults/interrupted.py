"""Runs that are asked to end, that share a folder or that fill their disk, in children of one warm process.

    python interrupted.py FOLDER

Prints a JSON object: what was found of every case. Where FOLDER can be mounted over by a small tmpfs, the disk that is
full is a real one; else its cases are left out.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runs import in_a_child, outcome, trial_in, warm

from cggr_ray import checkpoint
from cggr_ray.files import DiskFullError
from cggr_ray.lock import InUseError, only_writer
from cggr_ray.loop import run_race
from cggr_ray.race import Trial
from cggr_ray.stopping import StoppedError, signals

DISK_BYTES, PAGE = 24 << 20, 4096
# What is left of the disk when it fills up, in bytes: nothing, or enough for a part of a checkpoint.
ROOM = {"at once": 0, "first file": 4 * PAGE, "second file": 1 << 20}


def at_step(number: int, then: Callable[[], None]) -> Callable[[], bool]:
    """A `Stop` that never asks for the end, but does something before a step."""
    asked = iter(range(1_000_000))

    def stop() -> bool:
        if next(asked) == number + 1:  # the first time is before the run begins
            then()
        return False

    return stop


def signalled(trial: Trial, signum: int, step: int) -> int:
    """The exit code of a process that gets a signal at the beginning of a step."""

    def body() -> None:
        with signals() as asked:
            kill = at_step(step, lambda: os.kill(os.getpid(), signum))
            try:
                run_race(trial, stop=lambda: kill() or asked())
            except StoppedError:
                os._exit(128 + asked.signum)

    return in_a_child(body)


def hasty(trial: Trial) -> int:
    """How a process ends that gets a second signal while the first is a request."""

    def body() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with signals():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        run_race(trial)

    return in_a_child(body)


def two_writers(trial: Trial) -> dict[str, Any]:
    """A second run while the first holds the folder, then once the first is gone by SIGKILL."""
    folder, beginning = Path(trial.folder), trial.folder + ".holds"
    holder = os.fork()
    if holder == 0:
        with only_writer(folder):
            Path(beginning).touch()
            time.sleep(600)
    while not Path(beginning).exists():
        time.sleep(0.01)
    try:
        with only_writer(folder, wait_seconds=0.5):
            refused = ""
    except InUseError as error:
        refused = str(error)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    begun = time.monotonic()
    run_race(trial)
    return {"refused": refused, "holder": holder, "outcome": outcome(folder), "waited": time.monotonic() - begun}


def fill(folder: Path, left: int) -> None:
    """Leaves so many bytes of a disk, or a little less."""
    free = os.statvfs(folder).f_bavail * PAGE - left
    with (folder / "ballast").open("wb") as file:
        file.write(bytes(free))


def full(trial: Trial, disk: Path, left: int) -> dict[str, Any]:
    """A run whose disk fills up before its sixth step, and its going on once there is room."""
    folder = Path(trial.folder)
    try:
        run_race(trial, stop=at_step(5, lambda: fill(disk, left)))
        said = ""
    except DiskFullError as error:
        said = str(error)
    found, damage = checkpoint.newest(folder)
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    (disk / "ballast").unlink()
    run_race(trial)
    return {"said": said, "newest": found and found.name, "damage": damage, "kept": kept,
            "outcome": outcome(folder)}  # fmt: skip


def mounted(disk: Path) -> bool:
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(disk)], check=False)
    return done.returncode == 0


def main(folder: Path) -> dict[str, Any]:
    data, found = folder / "data", dict[str, Any]()
    expected = outcome(warm(trial_in(folder / "whole", data)))
    for signum, step in ((signal.SIGTERM, 0), (signal.SIGTERM, 5), (signal.SIGINT, 3)):
        trial = trial_in(folder / f"signal-{signum}-{step}", data)
        code = signalled(trial, signum, step)
        saved, _ = checkpoint.newest(Path(trial.folder))
        found[f"{signal.Signals(signum).name} {step}"] = {"code": code, "saved": saved and saved.name}
        run_race(trial)
        found[f"{signal.Signals(signum).name} {step}"]["same"] = outcome(Path(trial.folder)) == expected
    found["second signal"] = hasty(trial_in(folder / "hasty", data))
    found["writers"] = two_writers(trial_in(folder / "writers", data))
    found["writers"]["same"] = found["writers"].pop("outcome") == expected
    disk = folder / "disk"
    if mounted(disk):
        for name, left in ROOM.items():
            found[f"full {name}"] = full(trial_in(disk / "run", data), disk, left)
            found[f"full {name}"]["same"] = found[f"full {name}"].pop("outcome") == expected
            shutil.rmtree(disk / "run")
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1])), indent=1))
