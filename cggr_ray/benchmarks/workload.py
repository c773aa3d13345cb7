"""What the benchmarks run: a real trial of a shape, set up as a race sets it up, on generated problems."""

from __future__ import annotations

from pathlib import Path

from cggr_ray.benchmarks.rows import Shape
from cggr_ray.data.dataset import DataSpec, prepare
from cggr_ray.data.sources import Problems
from cggr_ray.loop import Run
from cggr_ray.models.presets import PRESETS, ModelSpec
from cggr_ray.progress import Progress
from cggr_ray.race import RaceSpec, plan_trials

# Long enough that no schedule ends and no milestone comes while a benchmark runs.
BUDGET_SECONDS = 1e6
# Behind every warm-up.
NOW = Progress(step=1, train_seconds=1.0, budget_seconds=BUDGET_SECONDS, tokens_seen=10**9)


def prepared_run(shape: Shape, device: str, folder: Path, recipe: str = "baseline") -> Run:
    """A run of `recipe` at its first step: model with the preset's own vocabulary, loader running, warm."""
    spec = RaceSpec(
        name="bench",
        recipes=(recipe,),
        budget_seconds=BUDGET_SECONDS,
        global_rows=shape.rows,
        micro_rows=shape.rows,
        milestones=(1.0,),
        model=ModelSpec(
            preset=shape.model, vocab_size=PRESETS[shape.model].vocabulary if shape.model in PRESETS else None
        ),
        data=DataSpec(sources=(Problems(count=20_000),), row_tokens=shape.positions, val_documents=50),
        device="cpu" if device == "cpu" else "auto",
        checkpoint_every_seconds=BUDGET_SECONDS,
    )
    prepare(spec.data, folder / f"data-{shape.positions}")
    trial = plan_trials(spec, folder)[0]
    where = folder / f"runs/{shape}-{recipe}".replace("/", "-")
    run = Run(trial.placed(where, folder / f"data-{shape.positions}"), lambda row: None)
    run.prepare()
    return run
