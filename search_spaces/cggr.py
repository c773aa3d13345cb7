"""The selective loss: how much is kept, by which score and selection, when, and how the ratio moves."""

from __future__ import annotations

from typing import Any

from ray import tune

from search_spaces.baseline import learning_rates

SCORES = ("entropy", "entropy_confidence", "margin", "loss", "combined", "gnorm", "surprise")
SELECTIONS = ("topk", "stratified", "sequence_aware")
SENSITIVITIES = (0.25, 0.5, 1.0)


def cggr() -> dict[str, Any]:
    """Only valid combinations: importance sampling goes with `gnorm` and weights 1/pi; `fixed_quota` is `topk` without
    a dynamic threshold, so it is not a choice of its own."""
    plain = [{"kind": "selected_tokens", "score": s, "selection": c} for s in SCORES for c in SELECTIONS]
    unbiased = [
        {"kind": "selected_tokens", "score": "gnorm", "selection": c, "weights": "inverse_probability"}
        for c in ("importance", "stratified")
    ]
    dynamic = [{"rule": rule, "sensitivity": s} for rule in ("corrected", "upstream") for s in SENSITIVITIES]
    return {
        **learning_rates(),
        "tokens": tune.choice(plain + unbiased * 3),
        "tokens.keep": tune.uniform(0.25, 0.75),
        "tokens.num_strata": tune.choice([2, 4, 8]),
        "tokens.curriculum.full_until": tune.uniform(0.0, 0.4),
        "tokens.curriculum.target_at": tune.uniform(0.4, 0.6),
        "tokens.curriculum.full_from": tune.uniform(0.8, 1.0),
        "tokens.dynamic": tune.choice([None] * len(dynamic) + dynamic),
    }
