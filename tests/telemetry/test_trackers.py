from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cggr_ray.telemetry.guarded import Guarded
from cggr_ray.telemetry.jsonl import JsonlTracker, plain
from cggr_ray.telemetry.tracker import open_trackers, scalars

HISTOGRAM = {"edges": [-1.0, 0.0, 1.0], "counts": [3.0, 4.5]}
ROWS: list[dict[str, Any]] = [
    {
        "kind": "step",
        "step": step,
        "train_seconds": step / 2,
        "train/tokens_per_sec": 100.0 * step,
        "train/grad_norm": 1.5 if step < 3 else math.nan,
        "router/difficulty_score_dist": HISTOGRAM,
        "train/token_loss_dist": HISTOGRAM,
        "data/order_hash": "ab12",
        "updates/relevance": [0.5, 0.25 * step],
        "router/expert_usage": [4.0, 0.0, 1.0 * step],
    }
    for step in (1, 2, 3)
]
RUN = {"race": "demo", "trial_id": "baseline-s0", "seed": 0, "parts": {"tokens": {"kind": "all_tokens"}}}


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_appended_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    for row in ROWS:
        tracker = JsonlTracker(tmp_path)
        tracker.log(row)
        tracker.finish({})
    assert read(tmp_path) == [*ROWS[:2], {**ROWS[2], "train/grad_norm": None}]


def test_null_reaches_into_tables_and_lists() -> None:
    value = {"a": math.inf, "b": {"c": -math.inf, "d": [1.0, math.nan, {"e": math.nan}]}, "f": "nan", "g": 3}
    assert plain(value) == {"a": None, "b": {"c": None, "d": [1.0, None, {"e": None}]}, "f": "nan", "g": 3}


@pytest.mark.parametrize("torn", ['{"step": 2, "tr', "x", '{"step": 2}'])
def test_a_torn_last_line_is_cut(tmp_path: Path, torn: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + torn)
    JsonlTracker(tmp_path).log({"step": 5})
    assert read(tmp_path) == [{"step": 1}, {"step": 5}]


def test_whole_lines_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for content in ("", '{"step": 1}\n', '{"step": 1}\n{"step": 2}\n'):
        path.write_text(content)
        JsonlTracker(tmp_path)
        assert path.read_text() == content


def test_lists_become_scalars_and_nothing_else_changes() -> None:
    row = {"step": 3, "a/list": [1.5, 2], "hash": "ab", "scores": HISTOGRAM, "none": None, "empty": []}
    rest = {"step": 3, "hash": "ab", "scores": HISTOGRAM, "none": None}
    assert scalars(row) == rest | {"a/list/00": 1.5, "a/list/01": 2}
    assert list(scalars({"r": list(range(101))}))[9::91] == ["r/09", "r/100"]


def test_jsonl_alone_unless_more_is_asked_for(tmp_path: Path) -> None:
    assert [type(t).__name__ for t in open_trackers(tmp_path, RUN, "off", "p", tensorboard=False)] == ["JsonlTracker"]
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_files_can_be_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, tracker = open_trackers(tmp_path, RUN, "off", "p", tensorboard=True)
    for row in ROWS:
        tracker.log(row)
    tracker.finish({"steps": 3})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = {"train_seconds", "train/tokens_per_sec", "train/grad_norm"}
    lists = {"updates/relevance/00", "updates/relevance/01", *(f"router/expert_usage/0{i}" for i in range(3))}
    assert set(events.Tags()["scalars"]) == names | lists
    assert set(events.Tags()["histograms"]) == {"router/difficulty_score_dist", "train/token_loss_dist"}
    (last,) = events.Histograms("router/difficulty_score_dist")
    assert last.step == 3 and last.histogram_value.bucket == HISTOGRAM["counts"]
    assert last.histogram_value.bucket_limit == HISTOGRAM["edges"][1:] and last.histogram_value.num == 7.5
    assert last.histogram_value.sum == 3 * -0.5 + 4.5 * 0.5 and last.histogram_value.sum_squares == 7.5 * 0.25
    found = [(e.step, e.value) for e in events.Scalars("train/tokens_per_sec")]
    assert found == [(1, 100.0), (2, 200.0), (3, 300.0)]
    assert [e.value for e in events.Scalars("updates/relevance/01")] == [0.25, 0.5, 0.75]


def test_tensorboard_has_every_step_once_after_a_process_was_killed(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for rows in (ROWS, [{"kind": "resumed", "step": 1}, *ROWS[1:]]):
        _, tracker = open_trackers(tmp_path, RUN, "off", "p", tensorboard=True)
        for row in rows:
            tracker.log(row)
        tracker.finish({})
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    for name in ("train/tokens_per_sec", "updates/relevance/00"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3]
    assert [event.step for event in events.Histograms("train/token_loss_dist")] == [1, 2, 3]


def with_wandb(folder: Path, script: str, **environment: str) -> str:
    """Runs a script with a W&B client of its own, without any of this machine's credentials; returns what it prints."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(folder)}
    header = (
        "import json, logging, os, sys, time\nfrom pathlib import Path\nlogging.basicConfig(stream=sys.stdout)\n"
        "from cggr_ray.telemetry import wandb as ours\nfrom cggr_ray.telemetry.tracker import open_trackers\n"
    )
    given = f"FOLDER, RUN, ROWS = Path({str(folder)!r}), {RUN!r}, {ROWS[:2]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", header + given + script],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wandb_offline_writes_a_run_folder(tmp_path: Path) -> None:
    with_wandb(
        tmp_path,
        """
_, tracker = open_trackers(FOLDER, RUN, "offline", "p", False)
tracker.log({"kind": "resumed", "step": 0})
for row in ROWS:
    tracker.log(row)
tracker.finish({"steps": 2, "val/loss": 1.25})
""",
    )
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-demo-baseline-s0-*.wandb")
    content = run.read_bytes()
    names = ("train/tokens_per_sec", "train/grad_norm", "router/difficulty_score_dist", "val/loss", "train_seconds")
    for name in (*names, "train/token_loss_dist", "updates/relevance/00", "updates/relevance/01"):
        assert name.encode() in content
    # Every histogram under its own name, that of the experts too.
    assert b'"histogram"' in content and b"router/expert_usage/00" not in content
    for name, value in (("values", b"[4,0,2]"), ("bins", b"[-0.5,0.5,1.5,2.5]")):
        assert re.search(rb"router/expert_usage.{2}" + name.encode() + rb".{3}" + re.escape(value), content, re.DOTALL)
    assert b"all_tokens" in content


def test_a_resumed_run_has_one_wandb_id_and_the_same_trial_of_another_race_has_another(tmp_path: Path) -> None:
    with_wandb(
        tmp_path,
        """
for name in ("one", "other", "one"):
    (FOLDER / name).mkdir(exist_ok=True)
    _, tracker = open_trackers(FOLDER / name, RUN, "offline", "p", False)
    tracker.finish({})
""",
    )
    one, other = ({file.name for file in tmp_path.glob(f"{name}/wandb/*/run-*.wandb")} for name in ("one", "other"))
    assert len(one) == len(other) == 1 and one != other


ONLINE = """
ours.WAIT_SECONDS = 1
start = time.monotonic()
_, tracker = open_trackers(FOLDER, RUN, "online", "p", False)
print(json.dumps(time.monotonic() - start))
tracker.log(ROWS[0])
tracker.finish({})
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "x" * 40},
        {"WANDB_BASE_URL": "http://127.0.0.1:9"},
        {"WANDB_BASE_URL": "no address"},
    ],
    ids=["no_server", "no_key", "no_address"],
)
def test_a_run_goes_on_when_wandb_cannot_be_reached(tmp_path: Path, environment: dict[str, str]) -> None:
    *said, seconds = with_wandb(tmp_path, ONLINE, **environment).splitlines()
    assert len([line for line in said if "W&B has failed" in line]) == 1
    assert json.loads(seconds) < 30, "the client's own patience is 90 s"


SERVER = """
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Server(BaseHTTPRequestHandler):
    stalled = False
    def log_message(self, *_): pass
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        while Server.stalled:
            time.sleep(0.1)
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        bucket = {"id": "x", "name": RUN["trial_id"], "displayName": "n", "config": "{}", "project": project}
        data = {"model": None, "upsertBucket": {"bucket": bucket, "inserted": True}}
        answer = json.dumps({"data": data if b"RunResumeStatus" in body or b"UpsertBucket" in body else {}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
    do_GET = do_POST

server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "x" * 40}
ours.WAIT_SECONDS = 2
_, tracker = open_trackers(FOLDER, RUN, "online", "p", False)
tracker.log(ROWS[0])
"""
STALLED = "Server.stalled = True\n"
GONE = """
import signal
for stat in Path("/proc").glob("[0-9]*/stat"):
    pid, name, _, parent = stat.read_text().split()[:4]
    if name.startswith("(wandb") and int(parent) == os.getpid():
        os.kill(int(pid), signal.SIGKILL)
time.sleep(0.3)
"""
END = """
start = time.monotonic()
tracker.log(ROWS[1])
tracker.log(ROWS[1])
tracker.finish({"steps": 2})
print(json.dumps(time.monotonic() - start), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the client's process in /proc")
@pytest.mark.parametrize("failure", [STALLED, GONE], ids=["server_stalls", "client_process_dies"])
def test_a_run_goes_on_when_wandb_fails_later(tmp_path: Path, failure: str) -> None:
    *said, seconds = with_wandb(tmp_path, SERVER + failure + END).splitlines()
    assert len([line for line in said if "W&B has failed" in line]) <= 1
    assert json.loads(seconds) < 30, "the client's own patience is 90 s"


FOREIGN = [OSError(28, "No space left on device"), RuntimeError("x"), KeyError("x"), TypeError("x"), AssertionError()]


class Failing:
    """A tracker that counts how often it is asked, and raises from one of its methods."""

    def __init__(self, where: str, error: BaseException) -> None:
        self.where, self.error, self.asked = where, error, 0

    def opened(self) -> Failing:
        self._ask("open")
        return self

    def log(self, row: dict[str, Any]) -> None:
        self._ask("log")

    def finish(self, summary: dict[str, Any]) -> None:
        self._ask("finish")

    def _ask(self, method: str) -> None:
        self.asked += 1
        if method == self.where:
            raise self.error


@pytest.mark.parametrize("error", FOREIGN, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(("where", "asked"), [("open", 1), ("log", 2), ("finish", 4)])
def test_what_a_foreign_tracker_raises_is_said_once_and_it_is_asked_nothing_more(
    where: str, asked: int, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Failing(where, error)
    guarded = Guarded("X", tracker.opened)
    guarded.log(ROWS[0])
    guarded.log(ROWS[1])
    guarded.finish({})
    guarded.finish({})
    assert tracker.asked == asked
    assert [record.message for record in caplog.records] == [f"X has failed, the run goes on without it: {error!r}"]


def test_memory_that_runs_out_and_ctrl_c_are_not_kept_from_a_run() -> None:
    for error in (MemoryError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            Guarded("X", Failing("open", error()).opened)
