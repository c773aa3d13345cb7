"""Metrics files as columns against the same files read line by line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.frames import objects, read_race

Writer = Callable[..., Path]
RowMaker = Callable[..., dict[str, Any]]
HISTOGRAM = {"edges": [0.0, 0.5, 1.0], "counts": [3, 4]}


def survivors(path: Path) -> list[dict[str, Any]]:
    """The rows that the final weights went through, by hand."""
    kept: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        kept = [r for r in kept if r["step"] <= row["step"]] if row["kind"] == "resumed" else [*kept, row]
    return kept


def test_columns_hold_what_the_lines_say(
    tmp_path: Path, run_writer: Writer, logged_step: RowMaker, milestone_row: RowMaker
) -> None:
    draw, folders = np.random.default_rng(0), []
    for seed in range(4):
        rows: list[dict[str, Any]] = []
        for step in range(1, 60):
            metrics = {"train/loss": None if step == 3 else float(draw.normal()), "train/grad_norm": step % 7}
            metrics |= {"router/difficulty_score_dist": HISTOGRAM} if step % 2 and seed else {}
            metrics |= {"updates/relevance": [1.0, None, step / 3]} if step % 10 == 0 else {}
            metrics |= {"data/order_hash": f"{step:016x}"} if step % 5 == 0 else {}
            rows.append(logged_step(step, **metrics))
            rows += [milestone_row(step, step / 3, 100 * step, 5 / step)] if step % 20 == 0 else []
            rows += [{"kind": "resumed", "step": step - 4, "message": "torn"}] if step in (15, 37) and seed == 2 else []
        folders.append(run_writer(tmp_path, "quick", seed, rows, {}))
    race = read_race(tmp_path)
    for seed, folder in enumerate(folders):
        truth = survivors(folder / "metrics.jsonl")
        for kind, frame in (("step", race.steps), ("milestone", race.milestones)):
            own = frame[frame["seed"] == seed]
            expected = [row for row in truth if row["kind"] == kind]
            assert len(own) == len(expected)
            for name in {key for row in expected for key in row} - {"kind"}:
                wanted = [row.get(name) for row in expected]
                found = [None if isinstance(v, float) and math.isnan(v) else v for v in objects(own[name])]
                assert found == wanted, name
    assert race.runs["resumes"].tolist() == [0, 0, 2, 0]
    assert "message" not in {*race.steps.columns, *race.milestones.columns}
    assert "val/loss" not in race.steps.columns and "train/loss" not in race.milestones.columns


def test_whole_numbers_in_one_run_and_fractions_in_another_are_one_column(
    tmp_path: Path, run_writer: Writer, logged_step: RowMaker
) -> None:
    for seed, value in enumerate((1, 2.5, None)):
        run_writer(tmp_path, "quick", seed, [logged_step(1, **{"train/loss": value})], {})
    losses = read_race(tmp_path).steps["train/loss"]
    assert losses.dtype == float and losses.tolist()[:2] == [1.0, 2.5] and math.isnan(losses[2])


def test_a_key_with_words_and_numbers_is_named(tmp_path: Path, run_writer: Writer, logged_step: RowMaker) -> None:
    rows = [logged_step(1, **{"train/loss": 1.0}), logged_step(2, **{"train/loss": "high"})]
    folder = run_writer(tmp_path, "quick", 0, rows, {})
    with pytest.raises(ValueError, match=r"metrics\.jsonl: .*train/loss.*; accepted: values of one type") as error:
        read_race(tmp_path)
    assert str(folder) in str(error.value)


def test_two_objects_in_one_line_are_refused(tmp_path: Path, run_writer: Writer, logged_step: RowMaker) -> None:
    folder = run_writer(tmp_path, "quick", 0, [])
    (folder / "metrics.jsonl").write_text(" ".join(json.dumps(logged_step(step)) for step in (1, 2)) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not JSON"):
        read_race(tmp_path)


def test_many_runs_are_read_whole_and_without_torch_or_ray(
    tmp_path: Path, run_writer: Writer, logged_step: RowMaker
) -> None:
    for seed in range(60):
        run_writer(tmp_path, "quick", seed, [logged_step(s, **{"train/loss": seed + s / 100}) for s in range(50)], {})
    script = (
        "import sys\nfrom analysis import read_race\n"
        f"steps = read_race({str(tmp_path)!r}).steps\n"
        "print(len(steps), steps.groupby('trial_id').size().eq(50).all(), round(steps['train/loss'].sum(), 2))\n"
        "print({'torch', 'ray', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root)
    total = sum(seed + step / 100 for seed in range(60) for step in range(50))
    assert done.stdout.split("\n")[:2] == [f"3000 True {round(total, 2)}", "set()"], done.stderr
