"""What the benchmarks run: a real trial of a shape, set up as a race sets it up, on generated problems; and what they
measure it against: the loss as anybody writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cggr_ray.benchmarks.rows import Shape
from cggr_ray.data.dataset import DataSpec, prepare
from cggr_ray.data.sources import Problems
from cggr_ray.loop import Run
from cggr_ray.models.presets import PRESETS, ModelSpec
from cggr_ray.progress import Progress
from cggr_ray.race import RaceSpec, plan_trials
from cggr_ray.workers import ALONE, Workers

# Long enough that no schedule ends and no milestone comes while a benchmark runs.
BUDGET_SECONDS = 1e6
# Behind every warm-up.
NOW = Progress(step=1, train_seconds=1.0, budget_seconds=BUDGET_SECONDS, tokens_seen=10**9)


def check_model(shape: Shape) -> None:
    """Raises ValueError for a shape whose model is no preset."""
    ModelSpec(preset=shape.model)


def prepared_data(shape: Shape, folder: Path) -> tuple[DataSpec, Path]:
    """Generated problems in rows of the shape, and the folder where they are."""
    spec = DataSpec(sources=(Problems(count=20_000),), row_tokens=shape.positions, val_documents=50)
    where = folder / f"data-{shape.positions}"
    prepare(spec, where)
    return spec, where


def prepared_run(
    shape: Shape,
    device: str,
    folder: Path,
    recipe: str = "baseline",
    workers: Workers = ALONE,
    values: Mapping[str, Any] | None = None,
) -> Run:
    """A run of `recipe` with `values` at its first step: model with the preset's own vocabulary, loader running, warm.
    Every worker trains the rows of the shape."""
    data, data_folder = prepared_data(shape, folder)
    spec = RaceSpec(
        name="bench",
        recipes=(recipe,),
        budget_seconds=BUDGET_SECONDS,
        global_rows=workers.size * shape.rows,
        micro_rows=shape.rows,
        workers=workers.size,
        milestones=(1.0,),
        model=ModelSpec(preset=shape.model, vocab_size=PRESETS[shape.model].vocabulary),
        data=data,
        device="cpu" if device == "cpu" else "auto",
        checkpoint_every_seconds=BUDGET_SECONDS,
        values=dict(values or {}),
    )
    trial = plan_trials(spec, folder)[0]
    name = "-".join([str(shape), recipe, str(workers.size), *sorted(values or {})]).replace("/", "-")
    run = Run(trial.placed(folder / "runs" / name, data_folder), lambda row: None, workers=workers)
    run.prepare()
    return run


def tail_loss(norm: nn.Module, hidden_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy of whole logits, from the last layer's output."""
    logits = norm(hidden_BTD) @ head_VD.mT
    return F.cross_entropy(logits.flatten(0, 1).float(), labels_BT.flatten())
