"""Learning rates of full training: what every arm is tuned with before it is compared."""

from __future__ import annotations

from typing import Any

from ray import tune


def learning_rates() -> dict[str, Any]:
    """Matrices and the rest apart: Muon's scale makes its rate comparable to AdamW's, not equal to it."""
    return {
        "optimizer.matrix.lr": tune.loguniform(5e-4, 2e-2),
        "optimizer.rest.lr": tune.loguniform(5e-4, 2e-2),
    }


def baseline() -> dict[str, Any]:
    """Learning rates and the end of the stable phase."""
    return {**learning_rates(), "optimizer.schedule.decay_start": tune.uniform(0.2, 0.8)}
