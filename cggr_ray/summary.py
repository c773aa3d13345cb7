"""A run's summary: what `schema` says of it, but for the wall clock, which is read when all else is written."""

from __future__ import annotations

import math

from cggr_ray.counts import NOT_FINITE_LIMIT, Counts
from cggr_ray.data.dataset import PreparedData
from cggr_ray.data.loader import Loader
from cggr_ray.learner import Learner
from cggr_ray.milestones import Milestones
from cggr_ray.race import Trial
from cggr_ray.recorder import Position
from cggr_ray.schema import VAL_LOSS
from cggr_ray.telemetry.gpu import MIB
from cggr_ray.telemetry.tracker import Row


def summarise(
    trial: Trial,
    diverged: bool,
    final: Row,
    counts: Counts,
    at: Position,
    last_step_seconds: float,
    learner: Learner,
    milestones: Milestones,
    data: PreparedData,
    loader: Loader,
) -> Row:
    """The summary of a run that stands at `at`, its end, where `final` was measured. Values may be not finite.

    Args:
        diverged: by its gradients; a run whose last validation loss is not finite has diverged too.
    """
    message = f"{NOT_FINITE_LIMIT} steps without a finite gradient" if diverged else ""
    if not (message or math.isfinite(final[VAL_LOSS])):
        message = "the last validation loss is not finite"
    budget, adapter = trial.race.budget_seconds, learner.adapter
    kept = adapter.cache
    return {
        "trial_id": trial.trial_id,
        "recipe": trial.recipe.name,
        "seed": trial.seed,
        "status": "diverged" if message else "finished",
        "steps": at.step,
        "tokens_seen": at.tokens_seen,
        "labelled_tokens": counts.labelled,
        "epochs": _epochs(data, loader),
        "budget_seconds": budget,
        "train_seconds": at.train_seconds,
        "overrun_seconds": max(0.0, at.train_seconds - budget),
        "last_step_seconds": last_step_seconds,
        **final,
        "best_val_loss": milestones.best,
        "last_good": milestones.last_good,
        "skipped_steps": counts.skipped,
        "peak_memory_mib": milestones.peak_bytes() / MIB if adapter.device.type == "cuda" else None,
        "parameters": learner.parameters,
        "micro_rows": counts.micro_rows,
        "out_of_memory": counts.out_of_memory,
        "order": loader.marks,
        **({"activation_cache": {"hits": kept.hits, "misses": kept.misses}} if kept is not None else {}),
        "message": message,
    }


def _epochs(data: PreparedData, loader: Loader) -> dict[str, float]:
    """How often every source was read. By an order of its own: the loader's is read ahead of training."""
    passes = data.order().epochs(loader.at)
    return {source.name: passed for source, passed in zip(data.spec.sources, passes, strict=True)}
