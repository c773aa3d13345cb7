"""Two Ray nodes on one machine run a sweep; one is killed with all its processes, and the sweep ends complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import pytest
from small_races import write_race

import trainables
from trainables.history import read_events

pytestmark = [pytest.mark.slow, pytest.mark.ray]
# A node is given up after some missed beats; in seconds, as tests cannot wait for a minute.
BEATS = {"initial_delay_ms": 0, "period_ms": 500, "timeout_ms": 1000, "failure_threshold": 3}
NODES = """
import sys, time
from ray.cluster_utils import Cluster
arguments = dict(num_cpus=1, include_dashboard=False, object_store_memory=80 << 20)
cluster = Cluster(initialize_head=True, head_node_args=arguments)
lost = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
pids = [process.process.pid for kind in lost.all_processes.values() for process in kind]
print(cluster.address, *pids, flush=True)
if sys.stdin.readline():
    # Reaped at once: to its workers a zombie looks alive, and they would live on.
    for process in (process for kind in lost.all_processes.values() for process in kind):
        process.process.kill()
        process.process.wait()
    sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def environment() -> dict[str, str]:
    beats = {f"RAY_health_check_{name}": str(value) for name, value in BEATS.items()}
    # What this process has set for Ray keeps a session to one machine.
    own = {name: value for name, value in os.environ.items() if name not in trainables.SETTINGS}
    return {**own, **beats, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Nodes:
    """A cluster of two, and the processes of the one that is not its head."""

    address: str
    pids: list[int]
    script: TextIO

    def lose(self) -> None:
        self.script.write("now\n")
        self.script.flush()


@pytest.fixture
def nodes(environment: dict[str, str]) -> Iterator[Nodes]:
    command = [sys.executable, "-c", NODES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as ray:
        assert ray.stdin is not None and ray.stdout is not None
        address, *pids = ray.stdout.readline().split()
        yield Nodes(address, [int(pid) for pid in pids], cast(TextIO, ray.stdin))
        ray.stdin.close()


def test_a_lost_node_costs_no_trial(nodes: Nodes, environment: dict[str, str], tmp_path: Path) -> None:
    spec = write_race(tmp_path, budget=3, more="step_seconds = 0.05\ncheckpoint_every_seconds = 0.2")
    folder = tmp_path / "sweep"
    command = [sys.executable, "-m", "cggr_ray.cli", "sweep", "baseline", "--race", str(spec), "--out", str(folder),
               "--trials", "3", "--scheduler", "none", "--address", nodes.address]  # fmt: skip
    sweep = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    deadline = time.time() + 250
    try:
        while not (there := runs_of(folder, nodes.pids)):
            assert time.time() < deadline and sweep.poll() is None
            time.sleep(0.1)
        nodes.lose()
        output, _ = sweep.communicate(timeout=250)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, output[-3000:]

    events = read_events(folder / "sweep.jsonl")[0]
    ends = {event["trial_id"]: event["status"] for event in events if event["kind"] == "end"}
    assert ends == dict.fromkeys(("t0000", "t0001", "t0002"), "finished")
    assert sum(event["kind"] == "end" for event in events) == 3
    rows = [json.loads(line) for line in (folder / "runs" / there / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] > 0 for row in rows if row["kind"] == "resumed"] == [True]


def runs_of(folder: Path, pids: list[int]) -> str | None:
    """A run with a checkpoint whose process belongs to a node: an ancestor of it is one of its processes."""
    for run in folder.glob("runs/*"):
        if (run / "run.json").is_file() and list(run.glob("checkpoints/step_*")):
            described: dict[str, Any] = json.loads((run / "run.json").read_text())
            if parent_of(described["process"]["pid"]) in pids:
                return run.name
    return None


def parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return None
