"""Selective training: how much is kept, by which score, selection, router and plan, when, and how the ratio moves."""

from __future__ import annotations

from typing import Any

from search_spaces.baseline import learning_rates
from search_spaces.domains import Choice, Domains, Uniform

SCORES = ("entropy", "entropy_confidence", "margin", "loss", "combined", "combined_rank", "gnorm", "surprise")
SELECTIONS = ("topk", "stratified", "stratified_top", "sequence_aware")
SENSITIVITIES = (0.25, 0.5, 1.0)
DETACH = ("const", "live")
# Routers that score before the forward is over, after fewer layers than the smallest preset has, with the scores that
# they know: a probe and the losses of the last epoch know the loss alone.
EARLY = (
    {"kind": "truncated_router", "layers": 2},
    {"kind": "truncated_router", "layers": 3},
    {"kind": "tuned_lens", "layers": 2},
    {"kind": "probe", "layers": 2},
    {"kind": "probe", "layers": 3},
    {"kind": "stale_scores"},
)


def cggr() -> Domains:
    """Only valid combinations: the model's own scores go with `after`, `two_pass` and `dense`, an early router with
    `before`; importance sampling goes with `gnorm` and weights 1/pi, whose gradient is exact under `dense` alone;
    `fixed_quota` is `topk` without a dynamic threshold, so it is not a choice of its own."""
    return {
        **learning_rates(),
        "tokens": Choice((*own_choices(), *early_choices(), *unbiased_choices() * 4)),
        "tokens.keep": Uniform(0.25, 0.75),
        "tokens.num_strata": Choice((2, 4, 8)),
        "tokens.detach": Choice(DETACH),
        "tokens.curriculum.full_until": Uniform(0.0, 0.4),
        "tokens.curriculum.target_at": Uniform(0.4, 0.6),
        "tokens.curriculum.full_from": Uniform(0.8, 1.0),
    }


def own_choices() -> list[dict[str, Any]]:
    """By the model's own scores; some with a ratio that moves with its confidence."""
    plain = [
        {"kind": "selected_tokens", "score": score, "selection": selection, "plan": plan}
        for score in SCORES
        for selection in SELECTIONS
        for plan in ("after", "two_pass", "dense")
    ]
    dynamic = [{"rule": rule, "sensitivity": s} for rule in ("corrected", "upstream") for s in SENSITIVITIES]
    moving = [
        {"kind": "selected_tokens", "score": "combined", "selection": selection, "plan": "after", "dynamic": rule}
        for selection in SELECTIONS
        for rule in dynamic
    ]
    return plain + moving


def early_choices() -> list[dict[str, Any]]:
    """By a router that scores early."""
    return [
        {"kind": "selected_tokens", "score": score, "selection": selection, "plan": "before", "router": router}
        for router in EARLY
        for score in (SCORES if router["kind"] in ("truncated_router", "tuned_lens") else ("loss",))
        for selection in SELECTIONS
    ]


def unbiased_choices() -> list[dict[str, Any]]:
    """Drawn at random and weighed by 1/pi."""
    return [
        {
            "kind": "selected_tokens",
            "score": "gnorm",
            "selection": selection,
            "weights": "inverse_probability",
            "plan": plan,
        }
        for selection in ("importance", "stratified")
        for plan in ("dense", "after")
    ]
