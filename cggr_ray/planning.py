"""`--dry-run`: the plan of a race, from its file alone. Asks no network, and says what is not here yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Column, Table

from cggr_ray.batches import rows_of_worker
from cggr_ray.calibrated import check_calibration
from cggr_ray.evaluation.task import FileTask
from cggr_ray.footprint import activation_bytes, state_bytes
from cggr_ray.hub import TOKENIZER, WEIGHTS, is_cached
from cggr_ray.models.presets import parameter_count
from cggr_ray.race import RaceSpec, Trial, check_rates
from cggr_ray.saying import counted
from cggr_ray.telemetry.console import terminal
from cggr_ray.tried import untuned

GIB = 1 << 30


def check_present(spec: RaceSpec) -> None:
    """Checks all that is here: the recipes against the model, the files of the data, the tasks of an evaluation.

    Raises:
        ValueError: a mistake in what is here. What is not here is no mistake of the plan's.
    """
    if not spec.data.absent_files():
        spec.data.check()
    if spec.model.is_here:
        spec.check()
    elif spec.model.pretrained is not None:
        for name in spec.recipes:
            check_rates(spec.recipe(name))
    check_calibration(spec, None)
    for task in spec.evaluation.tasks if spec.evaluation else ():
        if not isinstance(task, FileTask) or Path(task.path).is_file():
            task.check()


def absent(spec: RaceSpec) -> list[str]:
    """What a race needs and this machine does not have, or may not have."""
    found = spec.data.absent()
    if spec.model.folder is not None and not spec.model.is_here:
        found.append(f"model folder {spec.model.folder}")
    elif not spec.model.is_here:
        found.append(f"model {spec.model.name}: the Hugging Face hub gives it, its layers are not known before")
    elif spec.model.hub is not None and not is_cached(spec.model.hub, WEIGHTS):
        found.append(f"weights of model {spec.model.name}: the Hugging Face hub gives them")
    if (
        spec.model.hub is not None
        and spec.data.tokenizer == spec.model.hub
        and not is_cached(spec.model.hub, TOKENIZER)
    ):
        found.append(f"tokenizer {spec.model.hub}: the Hugging Face hub gives it")
    for task in spec.evaluation.tasks if spec.evaluation else ():
        if isinstance(task, FileTask) and not Path(task.path).is_file():
            found.append(f"questions of {task.name}: {task.path}")
    if spec.device == "cuda" and not torch.cuda.is_available():
        found.append("a GPU")
    return found


def show_plan(spec: RaceSpec, trials: Sequence[Trial]) -> None:
    """Trials, seconds, milestones, tokens a step, an estimate of memory from shapes, and what is not here yet."""
    console = terminal()
    table = Table(Column("trial", overflow="fold"), "train s", "tokens a step", "rows", "micro-batch", "lr scale")
    for trial in trials:
        rows = trial.recipe.rows.rows_per_step(trial.race.global_rows)
        table.add_row(
            trial.trial_id,
            f"{spec.budget_seconds:g}",
            f"{rows * spec.data.row_tokens:,}",
            str(rows),
            str(micro_rows_of(trial)),
            f"{trial.recipe.optimizer.lr_scale:.3g}",
        )
    console.print(table)
    for line in (*_seconds(spec, len(trials)), *_model(spec, trials), *(f"not here: {what}" for what in absent(spec))):
        console.print(line, highlight=False, soft_wrap=True)


def _seconds(spec: RaceSpec, trials: int) -> list[str]:
    at = ", ".join(f"{fraction * spec.budget_seconds:g}" for fraction in sorted({*spec.milestones, 1.0}))
    found = [
        f"{counted(trials, 'trial')}, {trials * spec.budget_seconds:g} train seconds in all, set-up not counted",
        f"milestones after {at} s",
        *([f"{spec.workers} workers a trial, which share the rows of a step"] if spec.workers > 1 else []),
    ]
    if spec.calibration:
        found.append(f"micro-batches calibrated on {spec.calibration.device['name']}")
    if spec.evaluation:
        tasks = ", ".join(f"{task.name} (at most {task.seconds:g} s)" for task in spec.evaluation.tasks)
        found.append(f"asked at every milestone: {tasks}")
    if spec.tuning and (arms := untuned(spec.recipes, spec.arms, spec.tuning.values)):
        times = f"{counted(len(spec.tuning.values), 'value')} x {counted(len(arms), 'recipe')}"
        found.append(f"to be tuned before: {times}, {spec.tuning.seconds:g} s each")
    return found


def _model(spec: RaceSpec, trials: Sequence[Trial]) -> list[str]:
    if not spec.model.is_here:
        return []
    parameters = parameter_count(spec.model.config())
    micro_rows = max(map(micro_rows_of, trials))
    low = state_bytes(parameters)
    high = low + activation_bytes(spec, micro_rows)
    vocabulary = "" if spec.model.pretrained else " with the preset's vocabulary"
    return [
        f"model {spec.model.name}: {parameters:,} parameters{vocabulary}",
        f"memory a worker, estimated from shapes: {low / GIB:.3g} to {high / GIB:.3g} GiB with micro-batches of "
        f"{micro_rows} rows",
    ]


def micro_rows_of(trial: Trial) -> int:
    """Rows of a micro-batch of a trial: no more than a worker has of a step."""
    rows = trial.recipe.rows.rows_per_step(trial.race.global_rows)
    return min(trial.race.micro_rows, rows_of_worker(rows, trial.race.workers))
