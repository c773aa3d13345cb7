"""The course of a sweep: what runs next, and what became of it. Knows nothing of Ray.

Every step of it is in the sweep's history before anything follows from it, so a sweep that is taken up again goes on as
if nothing had been: what has ended is left alone, what ran goes on in its folder, what waited waits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cggr_ray import checkpoint
from cggr_ray.adoption import adopt
from cggr_ray.mirror import NO_MIRROR, Unmirrored
from cggr_ray.race import RaceSpec, Trial
from cggr_ray.schema import (
    DATA_FOLDER,
    GPU_MEMORY_PEAK,
    KIND,
    METRICS_FILE,
    PEAK_MEMORY,
    RUNS_FOLDER,
    STEP,
    SUMMARY_FILE,
    TRAIN_SECONDS,
    VAL_LOSS,
)
from cggr_ray.telemetry.tracker import Row
from trainables.algorithms import new_draw
from trainables.history import Drawn, History
from trainables.settings import SweepSpec

log = logging.getLogger(__name__)

# So many trials in a row that die before their first report die of the machine, not of their values.
DEAD_IN_A_ROW = 5


class Sweep:
    """Hands out trials and takes in what they report.

    Args:
        history: of this sweep, empty or read again; what happened on disk and is missing in it is added.
        mirror: of this sweep, where trials on other machines leave what they did.
    Raises:
        ValueError: another version of this project wrote the checkpoint of a trial that has not ended.
    """

    def __init__(self, spec: SweepSpec, folder: Path, history: History, mirror: Unmirrored = NO_MIRROR) -> None:
        self.spec, self.folder, self.history, self._mirror = spec, folder, history, mirror
        self.race = sweep_race(spec)
        self._search, self._scheduler = spec.search, spec.search.scheduler
        self.running: set[str] = set()
        self._seconds: dict[str, float] = {}
        self._cut: set[str] = set()
        self._left: set[str] = set()
        self._used_up = self._interrupted = False
        self._dead = 0
        for trial in self.open:
            self._catch_up(trial)
        for trial in history.trials.values():
            self._seconds[trial.trial_id] = (trial.end or trial.last).get(TRAIN_SECONDS) or 0.0

    @property
    def open(self) -> list[Drawn]:
        """Trials that have not ended."""
        return [trial for trial in self.history.trials.values() if not trial.ended]

    @property
    def complete(self) -> bool:
        """Whether nothing is left to run: every trial has ended, and no other is to be drawn."""
        return not self.open and (self._drawn_all() or self.over())

    @property
    def most_runs(self) -> int:
        """How often a trial is handed out at most: once, or once a generation."""
        return self._search.trials * (len(self.race.milestones) + 1 if self._scheduler.parks else 1)

    def trial(self, drawn: Drawn) -> Trial:
        """The trial to run. Raises ValueError where its values make no recipe for this race."""
        return sweep_trial(self.spec, self.race, drawn.values, drawn.trial_id, self.folder)

    def run_folder(self, trial_id: str) -> Path:
        return self.folder / RUNS_FOLDER / trial_id

    def next(self) -> Drawn | None:
        """A trial that is to run now: one that waits, or a new draw; None where there is none."""
        if self._interrupted:
            return None
        if self.over():
            for trial in self._waiting():
                self._end(trial.trial_id, "cut", {}, "the sweep's own budget was used up")
            return None
        self._go_into_generation()
        for trial in self._waiting():
            if self._reached(trial) <= self.history.generation or not self._scheduler.parks:
                self.running.add(trial.trial_id)
                return trial
        return self._draw()

    def over(self) -> bool:
        """Whether the sweep's own budget is used up."""
        total, wall = self._search.total_seconds, self._search.wall_seconds
        used = sum(self._seconds.values())
        return (total is not None and used >= total) or (wall is not None and self.history.wall_seconds() >= wall)

    def cuts(self, row: Mapping[str, Any]) -> bool:
        """Whether the trial of this report is to stop, as the sweep's budget is used up and its own is not."""
        self._count(row)
        if row.get(TRAIN_SECONDS, self.race.budget_seconds) >= self.race.budget_seconds or not self.over():
            return False
        self._cut.add(row["trial"])
        return True

    def report(self, row: Mapping[str, Any]) -> None:
        """Takes in a report of a running trial. A validation that was seen before a kill is not taken in twice."""
        trial = self.history.trials[row["trial"]]
        self._count(row)
        if row.get(VAL_LOSS) is not None and self._place(row) > self._reached(trial):
            self.history.result(trial.trial_id, row)

    def ended(self, trial_id: str, last: Mapping[str, Any], stopped: bool) -> None:
        """A trial has returned, or the scheduler has `stopped` it; `last` is its last report.

        One that has returned without a summary was interrupted: it goes on when the sweep is taken up again.
        """
        self.running.discard(trial_id)
        row = {**last, PEAK_MEMORY: last.get(PEAK_MEMORY, last.get(GPU_MEMORY_PEAK))}
        if (summary := self._summary(trial_id)) is not None:
            self._end(trial_id, summary["status"], summary, summary["message"])
        elif last.get("status") == "out_of_memory":
            self._end(trial_id, "out_of_memory", row, last["message"])
        elif last.get("status") == "interrupted":
            # The next one would fare no better.
            self._left.add(trial_id)
            self._interrupted = True
            log.warning("%s: %s", trial_id, last["message"])
        elif trial_id in self._cut:
            self._end(trial_id, "cut", row, "the sweep's own budget was used up")
        elif not stopped:
            self._left.add(trial_id)
        elif not self._scheduler.parks:
            self._end(trial_id, "stopped", row, "by the scheduler")

    def failed(self, trial_id: str, message: str) -> None:
        """A trial has died more often than it is started again. Its checkpoints stay, for who looks for the cause.

        After DEAD_IN_A_ROW that have not reported, nothing more is begun: the next ones would fare no better.
        """
        self.running.discard(trial_id)
        self.history.end(trial_id, "failed", self._used(trial_id), message)
        self._dead = self._dead + 1 if not self._seconds.get(trial_id) else 0
        if self._dead == DEAD_IN_A_ROW:
            self._interrupted = True
            log.warning("%d trials in a row have died before their first report, of: %s; the sweep ends here, and "
                        "--resume goes on with it", self._dead, message)  # fmt: skip

    def stopped_before(self, trial_ids: set[str]) -> None:
        """Ends those that the scheduler had stopped when the sweep was interrupted."""
        for trial in self.open:
            if trial.trial_id in trial_ids and not self._scheduler.parks:
                self._end(trial.trial_id, "stopped", {}, "by the scheduler")

    def tidy(self) -> None:
        """Removes what a worker that was stopped had yet to write."""
        for trial in self.history.trials.values():
            if trial.ended and trial.status != "failed":
                self._remove_checkpoints(trial.trial_id)

    def _end(self, trial_id: str, status: Any, row: Row, message: str) -> None:
        self.history.end(trial_id, status, self._used(trial_id) | row, message)
        self._remove_checkpoints(trial_id)

    def _used(self, trial_id: str) -> Row:
        """What a trial has used of the sweep's budget, where its end does not say."""
        return {TRAIN_SECONDS: self._seconds.get(trial_id)}

    def _remove_checkpoints(self, trial_id: str) -> None:
        checkpoint.remove_all(self.run_folder(trial_id))
        self._mirror.remove_checkpoints(trial_id)

    def _count(self, row: Mapping[str, Any]) -> None:
        if TRAIN_SECONDS in row:
            self._seconds[row["trial"]] = row[TRAIN_SECONDS]
            self._dead = 0

    def _waiting(self) -> list[Drawn]:
        return [trial for trial in self.open if trial.trial_id not in self.running | self._left]

    def _draw(self) -> Drawn | None:
        history, search = self.history, self._search
        while not self._drawn_all():
            values = new_draw(search.algorithm, self.spec.domains, list(history.trials.values()), search.seed)
            if values is None:
                self._used_up = True
                return None
            trial = history.drawn(values)
            try:
                self.trial(trial)
            except ValueError as error:
                history.end(trial.trial_id, "failed", {}, str(error))
                continue
            self.running.add(trial.trial_id)
            return trial
        return None

    def _drawn_all(self) -> bool:
        return self._used_up or len(self.history.trials) >= self._search.trials

    def _go_into_generation(self) -> None:
        """Where a whole population waits: the worst take over from the best, and all go on."""
        if self.running or not self._drawn_all():
            return
        generation = self._scheduler.generation(self.open, self.race.budget_seconds)
        if generation <= self.history.generation:
            return
        search = self._search
        for trial_id, donor, values in self._scheduler.exploits(self.open, generation, self.spec.domains, search.seed):
            known = generation in self.history.trials[trial_id].exploits
            if not known and adopt(self.run_folder(donor), self.run_folder(trial_id)):
                self.history.exploit(trial_id, donor, generation, self._possible(values, donor))
        self.history.begun(generation)

    def _possible(self, values: dict[str, Any], donor: str) -> dict[str, Any]:
        """Values that were moved, or the donor's as they are: moved each by itself, they may make no recipe."""
        try:
            sweep_trial(self.spec, self.race, values, donor, self.folder)
        except ValueError:
            return self.history.trials[donor].values
        return values

    def _place(self, row: Mapping[str, Any]) -> int:
        """The number of milestones, the end among them, that a row is at or beyond."""
        fraction = row[TRAIN_SECONDS] / self.race.budget_seconds
        return sum(fraction >= milestone for milestone in (*self.race.milestones, 1.0))

    def _reached(self, trial: Drawn) -> int:
        return self._place(trial.last) if trial.last else 0

    def _summary(self, trial_id: str) -> Row | None:
        file = self.run_folder(trial_id) / SUMMARY_FILE
        if not file.is_file():
            self._mirror.fetch_run(trial_id)
        return json.loads(file.read_text()) if file.is_file() else None

    def _catch_up(self, trial: Drawn) -> None:
        """What a trial did after the sweep's process had died, as far as it will not do it again.

        Raises:
            ValueError: it cannot go on, as another version wrote its checkpoint; here that ends no trial.
        """
        summary, saved = self._summary(trial.trial_id), checkpoint.newest(self.run_folder(trial.trial_id))[0]
        if summary is None and saved is not None:
            checkpoint.read_state(saved)
        done = max(checkpoint.step_of(saved) if saved else 0, self._mirror.newest_step(trial.trial_id))
        for row in self._milestones(trial.trial_id):
            if (summary is not None or row[STEP] <= done) and self._place(row) > self._reached(trial):
                self.history.result(trial.trial_id, row)
        if summary is not None:
            self._end(trial.trial_id, summary["status"], summary, summary["message"])

    def _milestones(self, trial_id: str) -> list[Row]:
        """Validations that the weights of its last checkpoint, or of its end, went through, and later ones."""
        file, kept = self.run_folder(trial_id) / METRICS_FILE, list[Row]()
        for row in map(json.loads, file.read_bytes().split(b"\n")[:-1] if file.is_file() else []):
            if row[KIND] == "resumed":
                kept = [earlier for earlier in kept if earlier[STEP] <= row[STEP]]
            elif row[KIND] == "milestone" and row.get(VAL_LOSS) is not None:
                kept.append(row)
        return kept


def sweep_race(spec: SweepSpec) -> RaceSpec:
    """The race of the trials: with a validation wherever the scheduler decides."""
    return replace(spec.race, milestones=spec.search.scheduler.milestones or spec.race.milestones)


def sweep_trial(spec: SweepSpec, race: RaceSpec, values: Mapping[str, Any], trial_id: str, folder: Path) -> Trial:
    """The trial of one draw.

    Raises:
        ValueError: the values make no recipe, or one that does not fit the model or the micro-batch.
    """
    name, seed = spec.recipe, race.seeds[0]
    changed = race.with_arms({name: values})
    changed.check()
    where, data = (folder / RUNS_FOLDER / trial_id).resolve(), (folder / DATA_FOLDER).resolve()
    return Trial(
        trial_id=trial_id,
        recipe=changed.recipe(name),
        seed=seed,
        race=changed.of_arm(name, seed),
        folder=str(where),
        data_folder=str(data),
        values=changed.changes(name),
        gpus_per_trial=spec.search.gpus_per_trial,
    )
