"""What a local Ray session offers to others: nothing beyond this machine, and nothing without its token."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import MARK, PATIENCE, left_behind, running, shell, started
from small_races import write_race
from typer.testing import CliRunner

import trainables
from cggr_ray.cli import app
from trainables.cluster import check_reached, cluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, urllib.error, urllib.request
from trainables.cluster import cluster
import psutil
from ray._private import worker

with cluster(None, dashboard=True):
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        if process != own and os.getpgid(process.pid) == os.getpgrp():
            print("shares the group", process.name())
        for socket in process.net_connections("inet"):
            if socket.status == psutil.CONN_LISTEN:
                print("listens", socket.laddr.ip.removeprefix("::ffff:"))
    try:
        urllib.request.urlopen(f"http://{worker._global_node.webui_url}/api/v0/actors", timeout=20)
        print("open")
    except urllib.error.HTTPError as error:
        print("dashboard says", error.code)
"""


def test_the_authentication_mode_is_set_and_not_left_to_ray() -> None:
    assert trainables.SETTINGS["RAY_AUTH_MODE"] == "token"
    assert trainables.SETTINGS["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    script = "import trainables, os; print(os.environ['RAY_AUTH_MODE'])"
    for before, after in (({}, "token"), ({"RAY_AUTH_MODE": "disabled"}, "disabled")):
        plain = {name: value for name, value in os.environ.items() if name not in trainables.SETTINGS}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=plain | before, cwd=ROOT
        )
        assert done.stdout.strip() == after, done.stderr


def test_ray_is_started_in_one_place_which_says_where() -> None:
    starts = []
    for package in ("cggr_ray", "trainables", "search_spaces", "analysis"):
        for path in (ROOT / package).rglob("*.py"):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            starts += [(path.name, call) for call in calls if ast.unparse(call.func) in ("ray.init", "init")]
    assert {name for name, _ in starts} == {"cluster.py"}
    assert all("address" in {keyword.arg for keyword in call.keywords} for _, call in starts)


def test_an_address_where_no_cluster_runs_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 10.1.2.3:99\nand much advice")

    monkeypatch.setattr("ray.init", fails)
    monkeypatch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    said = r"^address '10\.1\.2\.3:99': .*; accepted: auto or host:port[^\n]*$"
    with pytest.raises(ValueError, match=said), cluster("10.1.2.3:99"):
        pass


@pytest.mark.parametrize(
    "command",
    [
        ["race", "cpu", "--device", "cpu"],
        ["sweep", "baseline", "--race", "cpu", "--device", "cpu"],
        ["tune", "mine.toml"],
    ],
)
def test_an_address_where_nothing_listens_is_refused_before_anything_is_made(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray itself would ask there for a quarter of an hour."""

    def asked(**_: object) -> None:
        raise AssertionError("Ray was asked")

    monkeypatch.setattr("ray.init", asked)
    monkeypatch.chdir(tmp_path)
    values = 'values = [{ "optimizer.lr_scale" = 1.0 }]'
    Path("mine.toml").write_text(f'device = "cpu"\n[tuning]\nseconds = 1\nseed = 7\n{values}\n')
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
    for address in (f"127.0.0.1:{port}", "nowhere.invalid:6379", "ray://127.0.0.1:10001", "head"):
        error = CliRunner().invoke(app, [*command, "--address", address]).exception
        assert isinstance(error, ValueError), error
        assert str(error).startswith(f"address {address!r}") and "accepted: auto or host:port" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_an_address_where_something_listens_is_tried() -> None:
    with socket.create_server(("", 0)) as there:
        check_reached(f"127.0.0.1:{there.getsockname()[1]}")


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_session_listens_on_loopback_alone_and_asks_for_its_token(tmp_path: Path) -> None:
    own = {name: value for name, value in os.environ.items() if name not in trainables.SETTINGS}
    # An address in the environment is another's cluster: without --address none is joined.
    environment = own | {"HOME": str(tmp_path), "RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": str(ROOT)}
    # As the leader of a session, which cannot leave its process group.
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
        start_new_session=True,
    )
    lines = done.stdout.splitlines()
    assert not [line for line in lines if line.startswith("shares")], "a signal to its group would be for Ray's too"
    assert "dashboard says 401" in lines, done.stdout + done.stderr[-2000:]
    listens = [line.split()[1] for line in lines if line.startswith("listens")]
    assert len(listens) >= 5 and set(listens) <= {"127.0.0.1", "::1"}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_ray_starts_leaves_nothing_of_it_behind(number: signal.Signals, tmp_path: Path) -> None:
    environment = shell(**{MARK: str(tmp_path)})
    race = started("race", write_race(tmp_path, budget=5), "--out", tmp_path / "race", environment=environment)
    deadline = time.monotonic() + PATIENCE
    while not any("raylet/raylet" in command for command in running(str(tmp_path))):
        assert time.monotonic() < deadline and race.poll() is None, race.communicate()[0]
        time.sleep(0.01)
    # To its process group, as a terminal sends Ctrl-C and a shell's `kill %1` SIGTERM.
    os.killpg(race.pid, number)
    output, _ = race.communicate(timeout=PATIENCE)
    assert race.returncode == 128 + number, output
    assert output.splitlines()[-1] == f"stopped by {number.name} before anything ran; --resume goes on"
    assert left_behind(str(tmp_path)) == []
