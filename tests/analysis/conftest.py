"""A writer of synthetic run folders, in the form that `cggr_ray.schema` describes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from written_rows import lines, milestone, step_row

LEDGERS = ("train", "data_wait", "evaluation", "checkpoint", "reporting", "warm_up", "set_up", "idle")


def write_run(
    race_folder: Path,
    recipe: str,
    seed: int,
    rows: list[dict[str, Any]],
    summary: dict[str, Any] | None = None,
    **described: Any,
) -> Path:
    """One run folder; `summary` overrides keys of a finished one, and None leaves the run unfinished."""
    trial = recipe.replace("/", "_") + f"-{seed}"
    folder = race_folder / "runs" / trial
    folder.mkdir(parents=True)
    run = {"trial_id": trial, "recipe": recipe, "seed": seed, "data_seed": seed, **described}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text(lines(rows))
    if summary is not None:
        ended = {"trial_id": trial, "recipe": recipe, "seed": seed, "status": "finished", "steps": 20}
        ended |= {"train_seconds": 20.0, "budget_seconds": 20.0, "wall_seconds": 40.0, "peak_memory_mib": 512.0}
        ended |= {"tokens_seen": rows[-1]["tokens_seen"] if rows else 0, "overrun_seconds": 0.25}
        ended |= {"last_step_seconds": 0.5, "ledgers": dict.fromkeys(LEDGERS, 5.0), "message": ""}
        (folder / "summary.json").write_text(json.dumps(ended | summary))
    return folder


def write_pair_race(folder: Path, seeds: tuple[int, ...] = (0, 1)) -> Path:
    """`baseline` and `quick` over two seeds with hand-written curves; quick sees half the tokens."""
    losses = {("baseline", 0): (4, 3, 2), ("quick", 0): (4, 2.5, 1.5), ("baseline", 1): (4, 3.2, 2.2)}
    losses |= {("quick", 1): (4, 2.2, 1.9)}
    for (recipe, seed), (start, middle, end) in losses.items():
        if seed not in seeds:
            continue
        half = 1000 if recipe == "baseline" else 500
        rows = [milestone(0, 0, 0, start), milestone(10, 10, half, middle), milestone(20, 20, 2 * half, end)]
        rows += [step_row(step, **{"train/tokens_per_sec": 100.0, "train/learning_rate": 0.02}) for step in (10, 20)]
        marks = {"8": f"a{seed}", "16": f"b{seed}"} if recipe == "baseline" else {"8": f"a{seed}"}
        described = {"row_tokens": 128, "global_rows": 16, "model": {"name": "tiny", "parameters": 1234567}}
        described |= {"device": {"name": "Test GPU"}, "versions": {"torch": "2.12.0"}, "values": {}}
        write_run(folder, recipe, seed, rows, {"order": marks, "tokens_seen": 2 * half}, **described)
    spec = {"name": "pair", "recipes": ["baseline", "quick"], "baseline": "baseline", "budget_seconds": 20}
    spec |= {"seeds": list(seeds), "spec": {"data": "maths"}, "trials": [f"{r}-{s}" for r, s in losses if s in seeds]}
    (folder / "race.json").write_text(json.dumps(spec))
    return folder


def active_row(step: int, seconds: float, active: int, relevance: list[float | None] | None = None) -> dict[str, Any]:
    """A step in which so many layers learn; one with relevance is a probe."""
    probe = {"updates/probe": 1.0, "updates/relevance": relevance} if relevance else {"updates/probe": 0.0}
    return step_row(step, train_seconds=seconds, **{"updates/active_layers": float(active)}, **probe)


@pytest.fixture
def pair_race(tmp_path: Path) -> Path:
    return write_pair_race(tmp_path / "pair")


@pytest.fixture
def one_seed_race(tmp_path: Path) -> Path:
    return write_pair_race(tmp_path / "one_seed", seeds=(0,))


@pytest.fixture
def resting_race(tmp_path: Path) -> Path:
    """`baseline` with four layers that learn, `suffix` over two seeds with some that rest, `static` with two."""
    folder = tmp_path / "resting"
    first = [active_row(1, 1.0, 4, [1.0, 1.0, 1.0, 1.0]), active_row(2, 1.5, 4), active_row(3, 2.0, 2)]
    first += [active_row(4, 2.25, 2), active_row(5, 3.25, 4, [0.0, 1.0, 2.0, 5.0]), active_row(6, 3.75, 3)]
    first += [active_row(7, 4.5, 4), active_row(8, 4.75, 2), active_row(9, 5.5, 4), active_row(10, 6.0, 4)]
    # Rows that stand for several steps, the first of them a probe without a figure for one layer.
    second = [active_row(1, 1.0, 4, [1.0, None, 1.0, 1.0]), active_row(4, 3.0, 2), active_row(8, 5.0, 2)]
    write_run(folder, "suffix", 1, second, {})
    write_run(folder, "suffix", 0, first, {})
    for recipe, active in (("baseline", 4), ("static", 2)):
        write_run(folder, recipe, 0, [active_row(step, step / 2, active) for step in (1, 2, 3)], {})
    return folder


@pytest.fixture
def learning_row() -> Callable[..., dict[str, Any]]:
    return active_row


@pytest.fixture
def run_writer() -> Callable[..., Path]:
    return write_run


@pytest.fixture
def milestone_row() -> Callable[..., dict[str, Any]]:
    return milestone


@pytest.fixture
def logged_step() -> Callable[..., dict[str, Any]]:
    return step_row
