"""Population-based training (arXiv:1711.09846), a generation at a time: the worst go on with the weights of the best.

All trials of the sweep are the population. Each stops at every `interval` of its budget, with a checkpoint; when all
have come so far, those in the lowest `quantile` take weights, optimizer, place in the data and values of one in the
highest at random, and move its numbers. What is a part or a size stays the donor's: its weights were made for it. So do
the numbers where, moved, they make no recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import numpy as np
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from cggr_ray.codec import Plain
from cggr_ray.schema import TRAIN_SECONDS, VAL_LOSS
from search_spaces.domains import Domains
from trainables.history import Drawn
from trainables.schedulers import Exploit, own_id, reached_of


@dataclass(frozen=True)
class Population(Plain):
    """Population-based training over all trials, which take turns where there is no room for all of them."""

    IS_PART: ClassVar[bool] = True
    KIND: ClassVar[str] = "pbt"
    parks: ClassVar[bool] = True

    interval: float = 0.125
    quantile: float = 0.25
    factors: tuple[float, ...] = (0.8, 1.25)

    def __post_init__(self) -> None:
        if not 0 < self.interval < 1:
            raise ValueError(f"interval = {self.interval}; accepted: a fraction of the budget in (0, 1)")
        if not 0 < self.quantile <= 0.5:
            raise ValueError(f"quantile = {self.quantile}; accepted: a fraction of the population in (0, 0.5]")
        if not self.factors or not all(0 < factor < inf for factor in self.factors):
            raise ValueError(f"factors = {list(self.factors)}; accepted: positive, finite numbers, at least one")

    @property
    def milestones(self) -> tuple[float, ...]:
        count = round(1 / self.interval)
        return tuple(at for number in range(1, count + 1) if (at := number * self.interval) < 1)

    def build(self, budget_seconds: float) -> TrialScheduler:
        return Generations(budget_seconds, self.milestones)

    def generation(self, trials: Sequence[Drawn], budget_seconds: float) -> int:
        """The number of intervals that all trials have come to; a slow step may take one beyond."""
        reached = {reached_of(trial.last, budget_seconds, self.milestones) for trial in trials if not trial.ended}
        return min(reached, default=0)

    def exploits(self, trials: Sequence[Drawn], generation: int, domains: Domains, seed: int) -> list[Exploit]:
        ranked = sorted((t for t in trials if not t.ended), key=lambda trial: (trial.last[VAL_LOSS], trial.number))
        count = max(1, int(len(ranked) * self.quantile)) if len(ranked) > 1 else 0
        best, worst = ranked[:count], ranked[len(ranked) - count :]
        return [self._exploit(trial, best, generation, domains, seed) for trial in worst]

    def _exploit(self, trial: Drawn, best: Sequence[Drawn], generation: int, domains: Domains, seed: int) -> Exploit:
        random = np.random.default_rng((seed, generation, trial.number))
        donor = best[int(random.integers(len(best)))]
        factors = {key: self.factors[int(random.integers(len(self.factors)))] for key in domains}
        moved = {key: domain.moved(donor.values[key], factors[key]) for key, domain in domains.items()}
        return Exploit(trial.trial_id, donor.trial_id, moved)


class Generations(FIFOScheduler):
    """Stops a trial at every interval that it comes to, from where a later generation takes it up. A validation beyond
    none is the end of a trial that has diverged."""

    def __init__(self, budget_seconds: float, milestones: Sequence[float]) -> None:
        super().__init__()
        self._budget_seconds, self._milestones = budget_seconds, milestones
        self._reached: dict[str, int] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        if VAL_LOSS not in result or result[TRAIN_SECONDS] >= self._budget_seconds:
            return TrialScheduler.CONTINUE
        trial_id, reached = own_id(trial), reached_of(result, self._budget_seconds, self._milestones)
        if reached <= self._reached.get(trial_id, 0):
            return TrialScheduler.CONTINUE
        self._reached[trial_id] = reached
        return TrialScheduler.STOP
