"""Races that were never run: frames as `read_race` gives them, drawn from a model of which the truth is known.

Runs of one seed share part of their luck, in loss and in speed, as runs on the same data and the same machine do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from analysis.frames import Race

BUDGET = 60.0
MARKS = (0.25, 0.5, 0.75, 1.0)


def simulated_race(
    rng: np.random.Generator,
    seeds: int,
    arms: int,
    better: float = 0.0,
    slower: float = 0.0,
    scores: bool = False,
) -> Race:
    """A baseline and `arms - 1` others; the last of them ends `better` nats/token lower and reads `slower` tokens."""
    names = ["baseline", *(f"arm{i}" for i in range(1, arms))]
    runs, milestones = [], []
    for seed in range(seeds):
        loss_of_seed, speed_of_seed = rng.normal(0, 0.02), rng.normal(0, 0.02)
        for name in names:
            planted = name == names[-1]
            rate = 1e5 * np.exp(speed_of_seed + rng.normal(0, 0.005)) * (1 - slower * planted)
            level = 2.0 + loss_of_seed + rng.normal(0, 0.01) - better * planted
            identity = {"trial_id": f"{name}-s{seed}", "recipe": name, "seed": seed}
            for number, mark in enumerate(MARKS):
                at = mark * BUDGET
                row = identity | {"step": 100 * (number + 1), "fraction": mark, "train_seconds": at, "wall_seconds": at}
                row |= {"tokens_seen": rate * at, "val/loss": level + 2 * np.exp(-3 * mark) + rng.normal(0, 0.002)}
                if scores:
                    row |= {"eval/sums/accuracy": rng.binomial(200, 0.3 * mark) / 200, "eval/sums/n": 200}
                milestones.append(row)
            ended = {"status": "finished", "steps": 400, "train_seconds": BUDGET, "tokens_seen": rate * BUDGET}
            runs.append(identity | ended | {"peak_memory_mib": 512.0})
    spec = {"baseline": "baseline", "recipes": names, "spec": {"milestones": list(MARKS[:-1])}}
    return Race(Path("simulated"), spec, pd.DataFrame(runs), pd.DataFrame(), pd.DataFrame(milestones))
