"""Learning rates of full training: what every arm is tuned with before it is compared."""

from __future__ import annotations

from search_spaces.domains import Domains, LogUniform, Uniform


def learning_rates() -> Domains:
    """Matrices and the rest apart: Muon's scale makes its rate comparable to AdamW's, not equal to it."""
    return {
        "optimizer.matrix.lr": LogUniform(5e-4, 2e-2),
        "optimizer.rest.lr": LogUniform(5e-4, 2e-2),
    }


def baseline() -> Domains:
    """Learning rates and the end of the stable phase."""
    return {**learning_rates(), "optimizer.schedule.decay_start": Uniform(0.2, 0.8)}
