"""cggr-ray evaluate: answers tasks with the models that runs kept at their milestones.

Adds a milestone row a kept model to <run>/evaluation/late.jsonl, which readers merge into the run's own rows by step:
the later value of a measure counts. No file of the run is changed but the samples of the tasks that are answered again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from cggr_ray.codec import from_plain, read_json, read_toml, to_plain
from cggr_ray.data.dataset import DataSpec
from cggr_ray.data.tokenizer import load_tokenizer
from cggr_ray.device import pick_device
from cggr_ray.evaluation.suite import Evaluation, Suite
from cggr_ray.evaluation.task import Task
from cggr_ray.files import write_whole
from cggr_ray.models.presets import ModelSpec
from cggr_ray.paths import tasks_beside
from cggr_ray.saying import Say
from cggr_ray.schema import (
    EVALUATION_FOLDER,
    KIND,
    LATE_FILE,
    MILESTONE_FILE,
    MILESTONES_FOLDER,
    RUN_FILE,
    RUNS_FOLDER,
)
from cggr_ray.telemetry.console import terminal
from cggr_ray.telemetry.jsonl import plain


def evaluate(folder: Path, tasks: Path | None, rows: int | None, device: str) -> None:
    """Evaluates every kept model of a run, or of all runs of a race, and prints what was found.

    Raises:
        ValueError: there is no kept model, or no task, or one that cannot be asked or compared; before any is.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"--rows {rows}; accepted: at least 1")
    where, console = pick_device(device), terminal()
    disable_progress_bar()
    kept = [(run, specified(run, tasks, rows), models) for run in run_folders(folder) if (models := kept_models(run))]
    if not kept:
        raise ValueError(f"{str(folder)!r} has kept no model; accepted: a run, or a race, with evaluation.keep_models")
    if (folder / RUN_FILE).is_file():
        check_alone(kept[0][1], folder)
    for _, spec, models in kept:
        for model in models:
            spec.asked(load_tokenizer(model), ModelSpec(folder=str(model)).config())
    for run, spec, models in kept:
        for model in models:
            found = evaluate_model(run, model, spec, where, console.print)
            ends = ("_low", "_high")
            shown = ", ".join(
                f"{name.partition('/')[2]} {found[name]:.4g}" for name in found if not name.endswith(ends)
            )
            console.print(f"{run.name} {model.name}: {shown}", highlight=False, soft_wrap=True)


def evaluate_model(run: Path, folder: Path, spec: Evaluation, device: torch.device, say: Say) -> dict[str, float]:
    """Answers the tasks with one kept model, and adds the row."""
    tokenizer, source = load_tokenizer(folder), ModelSpec(folder=str(folder))
    model = source.build(None, 0, device, source.config().dtype)
    found = Suite(spec, tokenizer, model.config, run, say).run(model, folder.name)
    add_row(run / EVALUATION_FOLDER / LATE_FILE, read_json(folder / MILESTONE_FILE) | found)
    return found


def add_row(path: Path, values: dict[str, Any]) -> None:
    """One more milestone row; the file has all of it or none."""
    before = path.read_text() if path.is_file() else ""
    write_whole(path, before + json.dumps(plain({KIND: "milestone", **values}), allow_nan=False) + "\n")


def run_folders(folder: Path) -> Sequence[Path]:
    """The run itself, or all runs of a race."""
    if (folder / RUN_FILE).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"{RUNS_FOLDER}/*/{RUN_FILE}"))
    if not found:
        raise ValueError(f"{str(folder)!r} holds no run; accepted: the folder of a run or of a race")
    return found


def kept_models(run: Path) -> Sequence[Path]:
    """The folders of a run's kept models, in order of time."""
    return sorted(path.parent for path in (run / MILESTONES_FOLDER).glob(f"[!.]*/{MILESTONE_FILE}"))


def specified(run: Path, tasks: Path | None, rows: int | None) -> Evaluation:
    """The [evaluation] of a TOML file, or else of the run's own race; `rows` replaces its own.

    Raises:
        ValueError: there is no such table, it is not one, or the run was trained on what it asks.
    """
    trained = own_race(run)
    name = tasks or run / RUN_FILE
    if not name.is_file():
        raise ValueError(f"tasks file {str(name)!r} does not exist; accepted: a .toml file with an [evaluation]")
    try:
        table = tasks_of(name) if tasks else trained.get("evaluation")
        if table is None:
            raise ValueError("no evaluation; accepted: --tasks with a .toml file that has an [evaluation]")
        spec = Evaluation.from_plain(table)
        if tasks is None and len(run.resolve().parents) > 1:
            spec = spec.kept_in(run.resolve().parents[1])
        spec.check_sources(from_plain(DataSpec, trained["data"]).sources if "data" in trained else ())
        return spec if rows is None else replace(spec, rows=rows)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def own_race(run: Path) -> dict[str, Any]:
    """The race of a run as plain data, empty where the run does not say."""
    spec: dict[str, Any] = read_json(run / RUN_FILE).get("spec", {})
    return spec


def check_alone(spec: Evaluation, run: Path) -> None:
    """Raises ValueError where a task has the name of one that the other runs of the race have answered with other
    settings: both would be one measure."""
    asked = own_race(run).get("evaluation")
    others = {task.name: settings(task) for task in Evaluation.from_plain(asked).tasks} if asked else {}
    for task in spec.tasks:
        if others.get(task.name, settings(task)) != settings(task):
            raise ValueError(f"task {task.name!r} has other settings than the race's of this name; accepted: another "
                             "name, or the race's folder, so that all of its runs are asked")  # fmt: skip


def settings(task: Task) -> Any:
    """All of a task but where its questions lie, which may have been moved."""
    return {**to_plain(task), "path": None}


def tasks_of(path: Path) -> Any:
    table = read_toml(path).get("evaluation")
    tasks_beside(path.parent, table)
    return table
