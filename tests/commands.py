"""Commands of the project in processes of their own: started as from a shell, watched, and looked for afterwards."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
from pathlib import Path

import trainables

# Seconds for Ray to start, on a machine that is busy with other tests.
PATIENCE = 300
SECONDS_TO_END = 15
MARK = "CGGR_RAY_TESTED_COMMAND"


def shell(**more: str) -> dict[str, str]:
    """The environment of a command: what this process has set for Ray must not help."""
    own = {name: value for name, value in os.environ.items() if name not in trainables.SETTINGS}
    return own | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | more


def started(*arguments: object, environment: dict[str, str]) -> subprocess.Popen[str]:
    """The leader of a process group, as a shell's job is."""
    command = [sys.executable, "-m", "cggr_ray.cli", *map(str, arguments)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    )
    # Where a test has failed in the middle, it is still there.
    atexit.register(process.kill)
    return process


def until_saved(process: subprocess.Popen[str], run: Path, after: int = 0) -> None:
    """Waits for a checkpoint of a run beyond a step; fails where the process ends before."""
    deadline = time.monotonic() + PATIENCE
    while max(saved_steps(run), default=0) <= after:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def saved_steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*")]


def left_behind(mark: str) -> list[str]:
    """Command lines of processes that go on running with this value of MARK; on a busy machine one takes a few seconds
    to end."""
    deadline = time.monotonic() + SECONDS_TO_END
    while (found := running(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def running(mark: str) -> list[str]:
    return list(processes(mark).values())


def processes(mark: str) -> dict[int, str]:
    """Command lines by the id of the process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found[int(path.parent.name)] = path.with_name("cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found
