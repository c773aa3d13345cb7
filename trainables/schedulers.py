"""Schedulers: which trials go on after a validation, on the budget's own clock. Their settings, and Ray's side of them.

What a scheduler knows follows from the results alone, in their order, and from the numbers of the trials: fed with the
events of a sweep it stands where it stood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from cggr_ray.codec import Plain
from cggr_ray.schema import KIND, TRAIN_SECONDS, VAL_LOSS
from search_spaces.domains import Domains
from trainables.history import Drawn, number_of


class Named(NamedTuple):
    """A trial, for a scheduler: Tune has ids of its own, which a sweep that is taken up again would not see again."""

    trial_id: str


class Scheduler(Protocol):
    """Settings of a scheduler. `parks`: a trial that it stops goes on later, from its checkpoint."""

    parks: ClassVar[bool]

    @property
    def milestones(self) -> tuple[float, ...]:
        """The fractions of the budget where it decides, the end left out; empty where it never does."""

    def build(self, budget_seconds: float) -> TrialScheduler:
        """The scheduler before the first trial."""

    def generation(self, trials: Sequence[Drawn], budget_seconds: float) -> int:
        """The generation that all `trials` wait for, 0 where there is none: then nobody waits."""

    def exploits(self, trials: Sequence[Drawn], generation: int, domains: Domains, seed: int) -> list[Exploit]:
        """Who goes into a generation with the weights of another."""


class Exploit(NamedTuple):
    """The trial goes on with the donor's weights, and with `values`."""

    trial_id: str
    donor: str
    values: dict[str, Any]


class Alone:
    """Trials that do not wait for each other."""

    IS_PART: ClassVar[bool] = True
    parks: ClassVar[bool] = False

    def generation(self, trials: Sequence[Drawn], budget_seconds: float) -> int:
        return 0

    def exploits(self, trials: Sequence[Drawn], generation: int, domains: Domains, seed: int) -> list[Exploit]:
        return []


@dataclass(frozen=True)
class Unstopped(Alone, Plain):
    """First in, first out; every trial has its whole budget."""

    KIND: ClassVar[str] = "none"

    @property
    def milestones(self) -> tuple[float, ...]:
        return ()

    def build(self, budget_seconds: float) -> TrialScheduler:
        return FIFOScheduler()


@dataclass(frozen=True)
class HyperBand(Alone, Plain):
    """Asynchronous HyperBand: brackets of successive halving, the first with its rungs from `first_rung` of the budget,
    each next one from `reduction` times that; after a rung one of `reduction` trials goes on."""

    KIND: ClassVar[str] = "hyperband"

    first_rung: float = 0.125
    reduction: float = 2.0
    brackets: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.first_rung < 1:
            raise ValueError(f"first_rung = {self.first_rung}; accepted: a fraction of the budget in (0, 1)")
        if not 1 < self.reduction < inf:
            raise ValueError(f"reduction = {self.reduction}; accepted: a finite number above 1")
        if not 1 <= self.brackets <= len(self.milestones):
            raise ValueError(f"brackets = {self.brackets}; accepted: 1 to the number of rungs, "
                             f"{len(self.milestones)}")  # fmt: skip

    @property
    def milestones(self) -> tuple[float, ...]:
        rungs, at = [], self.first_rung
        while at < 1:
            rungs.append(at)
            at *= self.reduction
        return tuple(rungs)

    def build(self, budget_seconds: float) -> TrialScheduler:
        return Halving(budget_seconds, self.milestones, self.reduction, self.brackets)


@dataclass(frozen=True)
class Asha(HyperBand):
    """Asynchronous successive halving: HyperBand's first bracket alone."""

    KIND: ClassVar[str] = "asha"

    brackets: int = 1


class Halving(AsyncHyperBandScheduler):
    """Ray's, in rungs: a result counts at the last milestone that it is at or beyond, by the fraction that the run
    itself goes by. A trial's bracket follows from its number, and a trial that has used its budget is not stopped any
    more. Only results below the budget are kept in the rungs."""

    def __init__(self, budget_seconds: float, milestones: Sequence[float], reduction: float, brackets: int) -> None:
        super().__init__(
            time_attr=TRAIN_SECONDS,
            metric=VAL_LOSS,
            mode="min",
            # Ray's rungs lie at powers of the reduction. The core stops itself, beyond all of them, at its budget.
            grace_period=1,
            max_t=reduction ** (len(milestones) + 0.5),
            reduction_factor=reduction,
            brackets=brackets,
        )
        self._budget_seconds, self._milestones = budget_seconds, milestones
        sizes = np.array([len(bracket._rungs) for bracket in self._brackets])
        shares = np.exp(sizes - sizes.max())
        self._shares = shares / shares.sum()

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        trial_id = own_id(trial)
        place = np.random.default_rng(number_of(trial_id)).choice(len(self._brackets), p=self._shares)
        self._trial_info[trial_id] = self._brackets[place]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        reached = reached_of(result, self._budget_seconds, self._milestones)
        if reached == 0 or result[TRAIN_SECONDS] >= self._budget_seconds:
            return TrialScheduler.CONTINUE
        at_rung = {**result, TRAIN_SECONDS: self._reduction_factor ** (reached - 1)}
        decision: str = super().on_trial_result(tune_controller, Named(own_id(trial)), at_rung)  # type: ignore[arg-type]
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> None:
        """Its results are known; its end says no more."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Nothing to forget."""


def reached_of(row: Mapping[str, Any], budget_seconds: float, milestones: Sequence[float]) -> int:
    """The number of milestones that a row is at or beyond, 0 for a row without a time."""
    return sum(row.get(TRAIN_SECONDS, 0.0) / budget_seconds >= at for at in milestones)


def own_id(trial: Any) -> str:
    """The sweep's id of a trial of Tune's, or of one by name."""
    return trial.trial_id if isinstance(trial, Named) else trial.config["trial_id"]


def replay(scheduler: TrialScheduler, events: Sequence[Mapping[str, Any]]) -> set[str]:
    """Feeds a new scheduler with the events of a sweep; returns the trials that it has stopped."""
    stopped = set()
    for event in events:
        if event[KIND] == "trial":
            scheduler.on_trial_add(None, Named(event["trial_id"]))  # type: ignore[arg-type]
        elif event[KIND] == "result":
            decision = scheduler.on_trial_result(None, Named(event["trial_id"]), dict(event))  # type: ignore[arg-type]
            if decision == TrialScheduler.STOP:
                stopped.add(event["trial_id"])
    return stopped
