"""SIGKILL at many moments of a run's life, inside its saves too: it goes on, and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.slow]

RECIPES = ("cggr_loss", "galore")
SECONDS = 7200


@pytest.mark.timeout(SECONDS)
def test_a_run_that_is_killed_anywhere_ends_as_one_that_is_not(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    points = request.config.getoption("--fault-points")
    command = [sys.executable, str(Path(__file__).with_name("kill_many.py")), str(tmp_path), str(points), *RECIPES]
    # Without git: a try is to cost what its steps cost.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CGGR_RAY_COMMIT": "tested"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    print(f"\nkilled {found['tried']} times: survived {found['survived']}, silent corruptions {found['corrupted']}, "
          f"repeated at most {found['repeated']} steps, checkpoints {found['interval']} steps apart")  # fmt: skip
    assert found["tried"] >= points * 9 // 10
    assert found["survived"] == found["tried"] and found["corrupted"] == 0
    assert 0 < found["repeated"] <= found["interval"]
