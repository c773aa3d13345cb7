"""Runs that are asked to end, that find another in their folder, or whose disk is full say so, and go on later."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of all cases: a process that may mount a disk of its own, where the system lets one have that."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    may = subprocess.run([*alone, "true"], capture_output=True, check=False).returncode == 0
    script, folder = Path(__file__).with_name("interrupted.py"), tmp_path_factory.mktemp("interrupted")
    command = [*(alone if may else []), sys.executable, str(script), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CGGR_RAY_COMMIT": "tested"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cases: dict[str, Any] = json.loads(done.stdout)
    return cases


@pytest.mark.parametrize(
    ("case", "code", "saved"),
    [("SIGTERM 0", 143, None), ("SIGTERM 5", 143, "step_00000005"), ("SIGINT 3", 130, "step_00000003")],
)
def test_a_signal_ends_a_run_with_a_checkpoint_of_that_step(
    found: dict[str, Any], case: str, code: int, saved: str | None
) -> None:
    assert found[case] == {"code": code, "saved": saved, "same": True}


def test_a_second_signal_ends_it_at_once(found: dict[str, Any]) -> None:
    assert found["second signal"] == -signal.SIGTERM


def test_a_second_writer_is_refused_until_the_first_is_gone(found: dict[str, Any]) -> None:
    case = found["writers"]
    assert f"process {case['holder']} on " in case["refused"]
    assert "accepted: one run at a time in a folder" in case["refused"]
    assert case["same"] and case["waited"] < 60


@pytest.mark.parametrize("when", ["at once", "first file", "second file"])
def test_a_full_disk_stops_a_run_and_takes_nothing_of_what_it_saved(found: dict[str, Any], when: str) -> None:
    case = found.get(f"full {when}")
    if case is None:
        pytest.skip("no tmpfs can be mounted here")
    assert "No space left on device: the run in " in case["said"] and "what it saved before is whole" in case["said"]
    assert (case["newest"], case["damage"]) == ("step_00000004", "")
    assert case["kept"] == ["step_00000002", "step_00000004"]
    assert case["same"]
