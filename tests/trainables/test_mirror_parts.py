"""What a sweep takes from its mirror, and what the end of a trial says whose last upload failed; without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faulty_filesystem import Faulty, quick  # noqa: F401 - quick is used by every test
from simulated_sweep import BUDGET, spec_of

from cggr_ray import checkpoint
from cggr_ray.data.dataset import prepare
from cggr_ray.data.sources import Problems
from cggr_ray.mirror import Mirror
from cggr_ray.race import RaceSpec, plan_trials
from cggr_ray.schema import UNMIRRORED
from trainables.driver import Rows
from trainables.history import History
from trainables.sweep import Sweep
from trainables.worker import run


def mirror_of(folder: Path) -> Mirror:
    return Mirror(folder / "sweep", f"faulty://{folder}/disk")


def save(disk: Path, step: int, **state: Any) -> None:
    at = disk / "runs" / "t0000" / "checkpoints" / f"step_{step:08d}"
    at.mkdir(parents=True)
    (at / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT, **state}))
    checkpoint.seal(at)


def milestone(step: int, fraction: float) -> str:
    row = {"kind": "milestone", "step": step, "train_seconds": fraction * BUDGET, "tokens_seen": step, "val/loss": step}
    return json.dumps(row) + "\n"


def test_a_sweep_knows_what_a_trial_did_on_a_machine_that_is_gone(tmp_path: Path) -> None:
    """Milestones up to its checkpoint in the mirror count: the trial will not go through them again."""
    folder, disk = tmp_path / "sweep", tmp_path / "disk"
    folder.mkdir()
    with History(folder, lambda: 0.0) as history:
        history.drawn({"optimizer.matrix.lr": 0.001})
    save(disk, 5)
    (disk / "runs" / "t0000" / "metrics.jsonl").write_text(milestone(5, 0.5) + milestone(9, 1.0))
    mirror = mirror_of(tmp_path)
    mirror.fetch_runs()
    with History(folder, lambda: 0.0) as history:
        Sweep(spec_of(scheduler="none"), folder, history, mirror)
        assert [result["val/loss"] for result in history.trials["t0000"].results] == [5]
    (disk / "runs" / "t0000" / "summary.json").write_text(
        json.dumps({"status": "finished", "message": "", "val/loss": 9.0, "train_seconds": BUDGET})
    )
    mirror.fetch_runs()
    with History(folder, lambda: 0.0) as history:
        Sweep(spec_of(scheduler="none"), folder, history, mirror)
        assert history.trials["t0000"].status == "finished"
        assert [result["val/loss"] for result in history.trials["t0000"].results] == [5, 9]
    assert not (disk / "runs" / "t0000" / "checkpoints").exists()


def test_a_checkpoint_of_another_version_in_the_mirror_is_refused_before_anything_starts(tmp_path: Path) -> None:
    folder, disk = tmp_path / "sweep", tmp_path / "disk"
    folder.mkdir()
    with History(folder, lambda: 0.0) as history:
        history.drawn({"optimizer.matrix.lr": 0.001})
    save(disk, 5, format=checkpoint.FORMAT + 1)
    with History(folder, lambda: 0.0) as history, pytest.raises(ValueError, match=r"format = 3; accepted: 2"):
        Sweep(spec_of(scheduler="none"), folder, history, mirror_of(tmp_path))


def test_a_trial_whose_last_upload_failed_says_so_in_its_last_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = RaceSpec.from_plain(
        {
            **{"recipes": ["baseline"], "budget_seconds": 3.0, "step_seconds": 1.0, "global_rows": 2, "micro_rows": 2},
            **{"milestones": [], "device": "cpu", "mirror": f"faulty://{tmp_path}/disk"},
            "data": {"row_tokens": 64, "val_documents": 4, "sources": [{"kind": "problems", "count": 200}]},
        }
    )
    assert isinstance(spec.data.sources[0], Problems)
    (trial,) = plan_trials(spec, tmp_path / "race")
    prepare(spec.data, Path(trial.data_folder))
    (tmp_path / "disk").mkdir()

    def fail(operation: str, path: str) -> None:
        if operation == "write":
            raise LookupError("no route")

    Faulty.does = staticmethod(fail)
    rows: list[dict[str, Any]] = []
    run({"trial": trial.to_plain()}, rows.append)
    assert json.loads((Path(trial.folder) / "summary.json").read_text())["status"] == "finished"
    last = rows[-1]
    assert last["trial"] == trial.trial_id and "LookupError: no route" in last[UNMIRRORED]
    assert all(UNMIRRORED not in row for row in rows[:-1])

    caplog.clear()
    shown: list[dict[str, Any]] = []
    callback, tune_trial = Rows(shown.append), SimpleNamespace()
    for row in rows:
        callback.on_trial_result(0, [], tune_trial, row)  # type: ignore[arg-type]
    assert shown == rows[:-1]
    (said,) = [record.message for record in caplog.records]
    assert said.startswith(f"{trial.trial_id}: its last upload has failed") and "no route" in said
