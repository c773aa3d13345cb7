"""Search algorithms: the values of draw number n, from the seed, n and what the trials before it have shown.

Nothing else is remembered, so a sweep that is taken up again draws what it would have drawn. A draw that equals an
earlier one is drawn again.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import optuna
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from cggr_ray.codec import Plain
from cggr_ray.schema import PEAK_MEMORY, VAL_LOSS
from search_spaces.domains import Domains
from trainables.history import Drawn

# Draws that equal an earlier one, after which a space counts as used up.
MOST_AGAIN = 200
# Of these, those after which a model that insists is no longer asked.
MODEL_AGAIN = 10

Values = dict[str, Any]


class Algorithm(Protocol):
    def draw(self, domains: Domains, past: Sequence[Drawn], seed: int, again: int) -> Values | None:
        """The values of draw `len(past)`, where `again` draws of it equalled an earlier one; None where there are no
        others."""


@dataclass(frozen=True)
class Random(Plain):
    """Every domain at random, whatever the trials show."""

    IS_PART: ClassVar[bool] = True

    def draw(self, domains: Domains, past: Sequence[Drawn], seed: int, again: int) -> Values | None:
        generator = np.random.default_rng((seed, len(past), again))
        return {key: domain.sample(generator) for key, domain in domains.items()}


@dataclass(frozen=True)
class Grid(Plain):
    """Every combination once, in an order shuffled by the seed; of a range of numbers, `points` of them."""

    IS_PART: ClassVar[bool] = True

    points: int = 5

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"points = {self.points}; accepted: at least 2")

    def draw(self, domains: Domains, past: Sequence[Drawn], seed: int, again: int) -> Values | None:
        grids = {key: domain.grid(self.points) for key, domain in domains.items()}
        size, number = math.prod(map(len, grids.values())), len(past)
        if number >= size or again:
            return None
        # One after the other: those that `random.sample` begins with depend on how many it is asked for.
        generator, order = random.Random(seed), dict[int, None]()
        while len(order) <= number:
            order[generator.randrange(size)] = None
        at = list(order)[number]
        values = {}
        for key, grid in grids.items():
            at, place = divmod(at, len(grid))
            values[key] = grid[place]
        return values


@dataclass(frozen=True)
class Tpe(Plain):
    """Optuna's tree-structured Parzen estimator on the final loss, after `startup` trials at random.

    A trial that was stopped early counts by how many validations it came to, and its loss there. One whose memory did
    not suffice is infeasible by what it asked for, one that diverged is worse than all that were stopped, and one that
    failed says nothing.
    """

    IS_PART: ClassVar[bool] = True
    OBJECTIVES: ClassVar[tuple[str, ...]] = (VAL_LOSS,)

    startup: int = 10

    def __post_init__(self) -> None:
        if self.startup < 1:
            raise ValueError(f"startup = {self.startup}; accepted: at least 1 trial")

    def draw(self, domains: Domains, past: Sequence[Drawn], seed: int, again: int) -> Values | None:
        if again >= MODEL_AGAIN:
            return Random().draw(domains, past, seed, again)
        entropy = int(np.random.SeedSequence((seed, len(past), again)).generate_state(1)[0])
        sampler = TPESampler(n_startup_trials=self.startup, constant_liar=True, seed=entropy)
        study = quiet_study(sampler, len(self.OBJECTIVES))
        study.add_trials([told(trial, domains, self.OBJECTIVES) for trial in past])
        drawn = study.ask({key: domain.distribution() for key, domain in domains.items()}).params
        return {key: domain.decode(drawn[key]) for key, domain in domains.items()}


@dataclass(frozen=True)
class TpeMemory(Tpe):
    """The same on two objectives: the final loss, and the peak of memory, which a GPU has."""

    OBJECTIVES: ClassVar[tuple[str, ...]] = (VAL_LOSS, PEAK_MEMORY)


AnyAlgorithm = Random | Grid | Tpe | TpeMemory


def new_draw(algorithm: Algorithm, domains: Domains, past: Sequence[Drawn], seed: int) -> Values | None:
    """A draw that no earlier one equals; None where the space has no other."""
    known = {text_of(trial.drawn) for trial in past}
    for again in range(MOST_AGAIN):
        values = algorithm.draw(domains, past, seed, again)
        if values is None or text_of(values) not in known:
            return values
    return None


def text_of(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def quiet_study(sampler: TPESampler, objectives: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=sampler, directions=["minimize"] * objectives)


def told(trial: Drawn, domains: Domains, objectives: Sequence[str]) -> FrozenTrial:
    """A trial as Optuna knows it."""
    end = trial.end or {}
    outcome: dict[str, Any] = {"state": TrialState.RUNNING}
    if trial.status == "finished" and end[VAL_LOSS] is not None:
        # On a device that does not say its peak, all are equal in it.
        outcome = {"state": TrialState.COMPLETE, "values": [end[name] or 0.0 for name in objectives]}
    elif trial.status == "out_of_memory":
        asked = {"memory_mib": max(end[PEAK_MEMORY] or 0.0, 1.0)}
        outcome = {"state": TrialState.PRUNED, "constraints": asked}
    elif trial.status == "failed":
        outcome = {"state": TrialState.FAIL}
    elif trial.status is not None:
        # Steps of a stopped trial are read with one objective alone.
        early = trial.status != "diverged" and len(objectives) == 1
        steps = {number: row[VAL_LOSS] for number, row in enumerate(trial.results, 1)} if early else {}
        outcome = {"state": TrialState.PRUNED, "intermediate_values": steps}
    return create_trial(
        params={key: domain.encode(trial.drawn[key]) for key, domain in domains.items()},
        distributions={key: domain.distribution() for key, domain in domains.items()},
        **outcome,
    )
