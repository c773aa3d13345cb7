"""The mirror of a race or a sweep: what is refused before anything begins, what is sent, and what is fetched."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from faulty_filesystem import Faulty, nothing, quick  # noqa: F401 - quick is used by every test
from test_cli import fails
from typer.testing import CliRunner

from cggr_ray import cli
from cggr_ray.loop import run_race
from cggr_ray.mirror import Mirror
from cggr_ray.race import RaceSpec, Trial, Tuning, load_race
from cggr_ray.remote import RemoteError, check_address, open_remote
from cggr_ray.run_mirror import mirrored
from cggr_ray.tuning import write_tuned
from cggr_ray.workers import ALONE

ROOT = Path(__file__).resolve().parents[1]
RACE = """
recipes = ["baseline", "cggr_loss"]
budget_seconds = 4.0
step_seconds = 1.0
global_rows = 2
micro_rows = 2
milestones = []
device = "cpu"
[data]
row_tokens = 64
val_documents = 4
[[data.sources]]
kind = "jsonl"
name = "mine"
path = "train.jsonl"
"""
SECRET = "hunter2"


@pytest.fixture
def race_file(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    rows = [{"question": f"What is {n} and {n}?", "answer": f"{2 * n}"} for n in range(200)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "race.toml").write_text(RACE)
    return folder / "race.toml"


def runs(monkeypatch: pytest.MonkeyPatch, most: int | None = None, report: bool = False) -> list[str]:
    """Trials run in this process as a worker runs them, at most so many of a command; their ids are collected."""
    if not report:
        monkeypatch.setattr("cggr_ray.commands.finish", lambda *_: None)
    ran: list[str] = []

    def here(trials: Sequence[Trial], *_: Any) -> list[str]:
        for trial in trials[:most]:
            ran.append(trial.trial_id)
            with mirrored(trial, ALONE):
                run_race(trial)
        return [trial.trial_id for trial in trials[most:] if most is not None]

    monkeypatch.setattr("trainables.driver.run_trials", here)
    return ran


def invoke(*arguments: object, code: int = 0) -> str:
    shown = CliRunner().invoke(cli.app, [*map(str, arguments)])
    assert shown.exit_code == code, shown.output + repr(shown.exception)
    return shown.output


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nope://bucket/race", "unknown protocol 'nope'; accepted: PROTOCOL://FOLDER such as s3://bucket/folder"),
        ("/mnt/race", "mirror '/mnt/race'; accepted: PROTOCOL://FOLDER"),
        ("file:///", "mirror 'file:///'; accepted: PROTOCOL://FOLDER"),
        ("simplecache::s3://bucket/race", "accepted: PROTOCOL://FOLDER"),
        ("file://backup/race", "mirror 'file://backup/race' is relative; accepted: a whole path, file:///mnt/folder"),
        ("s3://bucket/race[1]", "mirror 's3://bucket/race[1]' has one of * [, which filesystems take for a pattern"),
        ("http://127.0.0.1:9/race", "'http://127.0.0.1:9/race' does not answer: "),
        (f"s3://key:{SECRET}@bucket/race", "mirror 's3://bucket/race' with a password or a query; accepted"),
        (f"s3://key:{SECRET}/+#?x@bucket/race", "mirror 's3://bucket/race' with a password or a query; accepted"),
        (f"s3://key:a/{SECRET}@bucket/race", "mirror 's3://bucket/race' with a password or a query; accepted"),
        (f"s3://bucket/race?secret={SECRET}", "mirror 's3://bucket/race' with a password or a query; accepted"),
    ],
)
@pytest.mark.parametrize("command", [["race", "cpu"], ["sweep", "baseline", "--race", "cpu"]])
def test_an_address_that_cannot_be_a_mirror_is_refused_and_leaves_nothing(
    command: list[str],
    address: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = fails(monkeypatch, capsys, *command, "--mirror", address)
    assert said in line and SECRET not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")])
def test_a_protocol_whose_package_is_not_installed_names_it(
    protocol: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    with pytest.raises(ValueError, match=rf"{protocol}:// needs {package}, which is not installed; accepted: pip inst"):
        open_remote(f"{protocol}://bucket/race")


def test_a_user_and_an_account_are_no_secrets() -> None:
    for address in ("abfs://container@account.dfs.core.windows.net/race", "sftp://me@host/race"):
        assert check_address(f"{address}/") == address


def test_a_population_has_no_mirror(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("sweep", "baseline", "--race", "cpu", "--scheduler", "pbt", "--mirror", f"file://{tmp_path}/disk")
    said = fails(monkeypatch, capsys, *command)
    assert f"mirror 'file://{tmp_path}/disk' with scheduler 'pbt'" in said and "accepted: another scheduler" in said


def test_what_holds_something_else_is_left_alone(
    race_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ran, disk = runs(monkeypatch), tmp_path / "disk"
    invoke("race", race_file, "--recipes", "baseline", "--out", tmp_path / "one", "--mirror", f"file://{disk}")
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    # The same race again is another one: its runs would be taken for those that are there.
    command = ("race", race_file, "--recipes", "baseline", "--out", tmp_path / "two", "--mirror", f"file://{disk}")
    said = fails(monkeypatch, capsys, *command)
    assert f"holds something else than '{tmp_path}/two'; accepted: an empty one, or --resume file://{disk}" in said
    assert not (tmp_path / "two").exists() and ran == ["baseline-s0"]
    assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("precious")
    assert "holds something else" in fails(monkeypatch, capsys, *command[:-1], f"file://{thesis}")
    assert [path.name for path in thesis.iterdir()] == ["thesis.txt"]


def test_a_race_goes_on_from_its_mirror_alone(race_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the folder, and without the files that it was made from; finished trials are not run again."""
    disk, ran = tmp_path / "disk", runs(monkeypatch, most=1, report=True)
    address = f"file://{disk}"
    invoke("race", race_file, "--out", tmp_path / "one", "--mirror", address, code=1)
    first = tmp_path / "one" / "runs" / ran[0]
    expected = {path.name: path.read_bytes() for path in first.iterdir() if path.name != "run.lock"}
    data = {path.name: path.read_bytes() for path in (tmp_path / "one" / "data").rglob("*.npy")}
    shutil.rmtree(tmp_path / "one")
    shutil.rmtree(race_file.parent)
    invoke("race", "--resume", address, "--out", tmp_path / "two")
    assert ran == ["baseline-s0", "cggr_loss-s0"]
    again = tmp_path / "two" / "runs" / ran[0]
    assert {path.name: path.read_bytes() for path in again.iterdir()} == expected
    assert {path.name: path.read_bytes() for path in (tmp_path / "two" / "data").rglob("*.npy")} == data
    assert (tmp_path / "two" / "report" / "report.html").read_bytes() == (disk / "report" / "report.html").read_bytes()
    for name in ran:
        here, there = (folder / "runs" / name / "summary.json" for folder in (tmp_path / "two", disk))
        assert here.read_bytes() == there.read_bytes()
    # No option is needed: the race knows its mirror.
    assert load_spec(tmp_path / "two").mirror == address
    invoke("race", "--resume", tmp_path / "two")
    assert len(ran) == 2
    assert_report(address, tmp_path)


def load_spec(folder: Path) -> RaceSpec:
    return RaceSpec.from_plain(json.loads((folder / "race.json").read_text())["spec"])


def test_what_is_fetched_goes_into_a_folder_of_its_own(
    race_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs(monkeypatch)
    disk = tmp_path / "my disk"
    invoke("race", race_file, "--recipes", "baseline", "--out", tmp_path / "one", "--mirror", f"file://{disk}")
    monkeypatch.chdir(tmp_path)
    invoke("race", "--resume", f"file://{disk}/")
    assert (tmp_path / "outputs" / "my disk" / "race.json").is_file()
    said = fails(monkeypatch, capsys, "race", "--resume", f"file://{disk}")
    assert "'outputs/my disk' is not empty; accepted: --out with a new folder, or --resume outputs/my disk" in said
    said = fails(monkeypatch, capsys, "race", "--resume", f"file://{disk}", "--out", ".")
    assert "--out ., where this command runs; accepted: --out with a new folder" in said
    assert "--resume with other settings" in fails(monkeypatch, capsys, "race", "cpu", "--resume", f"file://{disk}")
    assert "--resume with other settings" in fails(monkeypatch, capsys, "race", "--out", "x", "--resume", "one")
    assert "holds no sweep; accepted: an address with sweep.json" in (
        fails(monkeypatch, capsys, "sweep", "--resume", f"file://{disk}")
    )
    shutil.copytree(disk, tmp_path / "copy")
    said = fails(monkeypatch, capsys, "race", "--resume", f"file://{tmp_path}/copy")
    assert f"is a copy of 'file://{disk}'; accepted: --resume file://{disk}" in said


def assert_report(address: str, tmp_path: Path) -> None:
    """That of the address is that of the folder, and needs neither torch nor Ray."""
    script = (
        "import sys; from cggr_ray import cli\n"
        f"sys.argv = ['cggr-ray', 'report', '{address}', '--out', '{tmp_path}/report']\n"
        "try: cli.main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print(sorted({'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]" and "cggr_loss" in done.stdout
    reports = (tmp_path / "report", tmp_path / "two" / "report")
    first, second = (folder.joinpath("benchmark_results.md").read_text() for folder in reports)
    assert first == second


def opened(tmp_path: Path, name: str = "race") -> Mirror:
    (tmp_path / name).mkdir(exist_ok=True)
    return Mirror(tmp_path / name, f"faulty://{tmp_path}/disk")


def test_names_that_lead_out_of_a_folder_are_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store takes any text as a name."""
    names = ["runs/a/metrics.jsonl", "runs/../../b", "/etc/c", "runs//etc/d", "runs/./e", ""]
    found = {f"{tmp_path}/disk/{name}": {"size": 1} for name in names}
    monkeypatch.setattr(Faulty, "find", lambda *_, **__: found)
    assert open_remote(f"faulty://{tmp_path}/disk").files() == {"runs/a/metrics.jsonl": 1}


def test_a_request_to_end_and_an_old_failure_are_taken_away_again(tmp_path: Path) -> None:
    disk, failure = tmp_path / "disk", Path("runs") / "a-s0" / "failure.json"
    (tmp_path / "race" / failure).parent.mkdir(parents=True)
    disk.mkdir()
    (disk / "stop").touch()  # of a process that was killed before it could take it away
    (tmp_path / "race" / failure).write_text("{}")
    with opened(tmp_path):
        assert not (disk / "stop").exists() and (disk / failure).read_text() == "{}"
        (tmp_path / "race" / failure).unlink()
        (tmp_path / "race" / "stop").touch()
    assert (disk / "stop").exists() and not (disk / failure).exists()


def test_a_mirror_that_fails_in_the_middle_of_the_first_upload_is_this_folders(tmp_path: Path) -> None:
    """Whatever had been sent until then: else the race would have to begin again with another mirror."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "race" / "evaluation").mkdir(parents=True)
    for name in ("evaluation/questions.jsonl", "race.json"):
        (tmp_path / "race" / name).write_text("{}")
    sent: list[str] = []

    def fail_after(most: int) -> None:
        def fail(operation: str, path: str) -> None:
            if operation == "move" and len(sent) == most:
                raise LookupError("no route")
            if operation == "move":
                sent.append(path)

        sent.clear()
        Faulty.does = staticmethod(fail)

    for most in range(3):
        shutil.rmtree(tmp_path / "disk")
        fail_after(most)
        with pytest.raises(RemoteError, match="no route"), opened(tmp_path):
            pass
        Faulty.does = staticmethod(nothing)
        opened(tmp_path).check()
    with opened(tmp_path):
        assert (tmp_path / "disk" / "race.json").is_file()


def test_a_sweep_that_went_on_elsewhere_is_not_overwritten(tmp_path: Path) -> None:
    with opened(tmp_path):
        events = tmp_path / "race" / "sweep.jsonl"
        events.write_text('{"kind": "session"}\n{"kind": "tri')
    shutil.copytree(tmp_path / "race", tmp_path / "other")
    events.write_text('{"kind": "session"}\n{"kind": "trial"}\n')
    opened(tmp_path).check()
    with opened(tmp_path):
        """What was torn there is whole now."""
    (tmp_path / "other" / "sweep.jsonl").write_text('{"kind": "session"}\n{"kind": "other"}\n')
    with pytest.raises(
        ValueError, match=r"has events that '.*other' has not: its sweep went on elsewhere; accepted: --res"
    ):
        opened(tmp_path, "other").check()


def test_results_are_fetched_where_they_are_further_than_here(tmp_path: Path) -> None:
    run = tmp_path / "disk" / "runs" / "t0000"
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    (run / "checkpoints" / "step_00000001" / "manifest.json").write_text("{}")
    (run / "metrics.jsonl").write_text("12\n34\n")
    here, mirror = tmp_path / "race" / "runs" / "t0000", opened(tmp_path)
    mirror.fetch_runs()
    assert [path.name for path in here.iterdir()] == ["metrics.jsonl"]
    (here / "metrics.jsonl").write_text("12\n34\n56\n")  # a run of this machine, ahead of its last upload
    mirror.fetch_run("t0000")
    assert (here / "metrics.jsonl").read_text() == "12\n34\n56\n"
    (run / "summary.json").write_text('{"status": "finished"}')
    mirror.fetch_run("t0000")
    assert (here / "metrics.jsonl").read_text() == "12\n34\n" and (here / "summary.json").is_file()


def test_results_that_cannot_be_fetched_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(operation: str, path: str) -> None:
        raise LookupError("no route")

    mirror = opened(tmp_path)
    Faulty.does = staticmethod(fail)
    mirror.fetch_runs()
    mirror.remove_checkpoints("t0000")
    assert ["results are not fetched" in record.message for record in caplog.records] == [True, False]
    with pytest.raises(ValueError, match=r"does not answer: .* LookupError: no route; accepted"):
        mirror.check()


def test_a_tuned_race_does_not_write_into_the_mirror_of_its_tuning(tmp_path: Path) -> None:
    tuning = Tuning(seconds=1.0, seed=5, values=({"optimizer.lr_scale": 1.0},))
    write_tuned(RaceSpec(tuning=tuning, mirror="file:///mnt/tuning"), [], tmp_path / "tuned.toml")
    assert load_race(str(tmp_path / "tuned.toml")) == RaceSpec(tuning=tuning)
