"""The E3 suite: which tokens ahead are predicted, how many positions Collider keeps, what the optimizer's state is."""

from __future__ import annotations

from itertools import product
from typing import Any

from search_spaces.domains import Choice, Domains, LogUniform, Uniform

MUON = {"kind": "muon", "lr": 0.02, "scale": "keller", "orthogonalise": "newton_schulz", "weight_decay": 0.01}
FORMATS = ({"kind": "float32"}, {"kind": "int8_blockwise"})
RANKS, REFRESHES, FULL_RANKS = (64, 128, 256), (50, 200, 800), (0.0, 0.125)
# Forms that a forward of kept rows can serve, and their weights.
HEADS, SHARED = (0.05, 0.1, 0.2, 0.4), ([0.5], [0.5, 0.25], [0.25, 0.125])


def e3() -> Domains:
    """Around the recipe e3/full. Collider keeps rows, so of the forms of multi-token prediction those remain that need
    no others; gradients are projected early where there is a projection whose bias is not corrected. Of the learning
    rates one is of what is no hidden matrix, the other scales all."""
    return {
        "tokens": Choice(tuple({"kind": "collider", "mode": mode} for mode in ("quantile", "upstream"))),
        "tokens.keep": Uniform(0.4, 0.9),
        "objective": Choice(tuple(objectives())),
        "optimizer": Choice(tuple(optimizers())),
        "optimizer.rest.lr": LogUniform(3e-4, 1e-2),
        "optimizer.lr_scale": LogUniform(0.1, 3.0),
    }


def objectives() -> list[dict[str, Any]]:
    forms: list[dict[str, Any]] = [{"kind": "heads", "num_heads": n, "weight": w} for n in (1, 2, 4) for w in HEADS]
    ends = {1: [2 / 3], 2: [1 / 3, 2 / 3]}
    forms += [{"kind": "shared_logits", "weights": w, "phase_ends": ends[len(w)]} for w in SHARED]
    return [{"kind": "next_token"}, *({"kind": "multi_token", "form": form} for form in forms)]


def optimizers() -> list[dict[str, Any]]:
    """Muon, or GaLore around it, with state of either format, and AdamW with the same."""
    found = list[dict[str, Any]]()
    for state in FORMATS:
        shared: dict[str, Any] = {
            "kind": "optimizer",
            "rest": {"kind": "adamw", "state": state},
            "schedule": {"kind": "wsd", "decay_start": 0.8, "floor": 0.1},
        }
        rule = MUON | {"state": state}
        found.append(shared | {"matrix": rule})
        for rank, refresh, part in product(RANKS, REFRESHES, FULL_RANKS):
            matrix = {"kind": "galore", "rule": rule, "rank": rank, "refresh_every": refresh, "basis": state}
            found.append(shared | {"matrix": matrix | {"full_rank": part}, "project_early": not part})
    return found
