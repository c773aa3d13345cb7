"""Dynamic suffix: by which relevance the depth is chosen, how freely it moves, how often it is measured, and when."""

from __future__ import annotations

from itertools import product
from typing import Any

from search_spaces.baseline import learning_rates
from search_spaces.domains import Choice, Domains, Uniform

RELEVANCES = ("gradient_norm", "saliency", "fisher", "decrease")
# Steps between probes: fixed, and the bounds between which it adapts.
FIXED, FIRST, SHORTEST, LONGEST = (10, 25, 50, 100), (25, 50), (5, 10, 25), (100, 200)
WINDOWS, MEAN_CHANGES, VARIATIONS = (20, 50), (0.02, 0.05), (0.10, 0.20)
# How far the loss of the probes moves, up or down, before the limits do.
MOVES, LIMIT_BETAS = (0.01, 0.02, 0.05), (0.8, 0.9)
# Where the recovery begins; at 1 there is none.
FULL_FROM = (0.8, 0.85, 0.9, 0.95, 1.0)


def suffix() -> Domains:
    """Around the recipe dynamic_suffix. Every layer learns up to a point before that from which the recovery may start;
    half of the draws have no gate of a steady loss, and half no moving limits."""
    return {
        **learning_rates(),
        "updates.relevance": Choice(RELEVANCES),
        "updates.beta": Choice((0.0, 0.5, 0.8, 0.9, 0.95)),
        "updates.threshold": Uniform(0.5, 0.95),
        "updates.smallest": Choice((0.125, 0.25, 0.5)),
        "updates.levels": Choice((2, 3, 4, 6, 8)),
        "updates.hysteresis": Choice((1, 2, 3)),
        "updates.full_until": Uniform(0.0, 0.4),
        "updates.full_from": Choice(FULL_FROM),
        "updates.cadence": Choice(tuple(cadences())),
        "updates.stability": Choice(tuple(none_or(stabilities()))),
        "updates.limits": Choice(tuple(none_or(limits()))),
    }


def cadences() -> list[dict[str, int]]:
    bounds = [(every, every, every) for every in FIXED] + list(product(FIRST, SHORTEST, LONGEST))
    return [{"first": first, "shortest": shortest, "longest": longest} for first, shortest, longest in bounds]


def stabilities() -> list[dict[str, Any]]:
    return [
        {"window": window, "mean_change": change, "variation": variation}
        for window, change, variation in product(WINDOWS, MEAN_CHANGES, VARIATIONS)
    ]


def limits() -> list[dict[str, Any]]:
    return [{"upper": 1 + move, "lower": 1 - move, "beta": beta} for move, beta in product(MOVES, LIMIT_BETAS)]


def none_or(tables: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """None as likely as all of the tables together."""
    return [None] * len(tables) + tables
