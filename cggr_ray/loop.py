"""run_race: one trial from its specification to its summary, inside a wall-clock budget. Knows nothing of Ray.

The trial's folder is its only memory: called again on a folder with a checkpoint, it goes on from there, clock and all.
"""

from __future__ import annotations

import json
import logging
import math
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from cggr_ray import checkpoint
from cggr_ray.assembly import ACTIVATIONS_FILE, build_learner
from cggr_ray.batches import rows_of_worker, smaller_sizes
from cggr_ray.clock import RaceClock, ReplayClock, SteppedClock, WallClock
from cggr_ray.compiling import never_eager
from cggr_ray.counts import Counts
from cggr_ray.data.batch import Batch
from cggr_ray.data.dataset import open_data
from cggr_ray.data.loader import Loader
from cggr_ray.description import check_kind, description, with_earlier
from cggr_ray.device import deterministic, keep_threads, pick_device, timed_event
from cggr_ray.files import flush, room_for, write_whole
from cggr_ray.flight import Delayed, Flight
from cggr_ray.lock import only_writer
from cggr_ray.milestones import Milestones
from cggr_ray.progress import Budget, Progress, ProgressFile
from cggr_ray.race import Trial
from cggr_ray.recorder import Position, Recorder, Report
from cggr_ray.schema import GRAD_NORM, KIND, METRICS_FILE, PROGRESS_FILE, RUN_FILE, SUMMARY_FILE
from cggr_ray.stopping import Stop, StoppedError, never
from cggr_ray.summary import summarise
from cggr_ray.telemetry.jsonl import plain
from cggr_ray.telemetry.tracker import Row, Tracker, open_trackers
from cggr_ray.warmup import try_to_warm_up
from cggr_ray.workers import ALONE, Workers

# Near the end the host waits for every step, so that none starts that the budget does not cover.
STEPS_NEAR_THE_END = 4

log = logging.getLogger(__name__)


def run_race(
    trial: Trial,
    report: Report = lambda row: None,
    replay: ReplayClock | None = None,
    *,
    stop: Stop = never,
    saved: bool = False,
    workers: Workers = ALONE,
) -> Row:
    """Runs a trial to the end of its budget, or from its last checkpoint to there; returns the summary.

    Args:
        report: called a few dozen times with the newest row, and at milestones; off the budget. Every worker calls its
            own, equally often.
        replay: the clock of a recorded run, in place of a real one; every step has a row then.
        stop: asked before every step whether to end with a checkpoint; that of worker 0 counts.
        saved: a milestone before the end is reported once there is a checkpoint of it, from which others may go on.
        workers: as many as the trial asks for, each of which calls this. Worker 0 writes and returns the summary.
    Raises:
        StoppedError: `stop` said so.
        InUseError: another process goes on writing into the folder.
        DiskFullError: there is no room for what is written; the checkpoints stand.
        ValueError: as many workers as the trial asks for are not there.
    """
    folder = Path(trial.folder)
    with room_for(folder), only_writer(folder) if workers.is_first else nullcontext():
        if workers.first((folder / SUMMARY_FILE).is_file()):
            if workers.is_first:
                checkpoint.remove_all(folder)
            summary: Row = json.loads((folder / SUMMARY_FILE).read_text())
            return summary
        if workers.first(stop()):
            raise StoppedError(f"{trial.trial_id}: stopped before it began")
        with deterministic(trial.recipe.execution.deterministic):
            return Run(trial, report, replay, stop=stop, saved=saved, workers=workers).complete()


class Run:
    """One running trial, or one worker of it."""

    def __init__(
        self,
        trial: Trial,
        report: Report,
        replay: ReplayClock | None = None,
        *,
        stop: Stop = never,
        saved: bool = False,
        workers: Workers = ALONE,
    ) -> None:
        spec = trial.race
        if workers.size != spec.workers:
            raise ValueError(f"a trial with workers = {spec.workers} in a group of {workers.size}; accepted: as many")
        self.trial, self.spec, self.replay, self.stop, self.workers = trial, spec, replay, stop, workers
        self._report = report
        self.report = self._report_saved if saved else report
        self.folder = Path(trial.folder)
        self.budget = Budget(spec.budget_seconds)
        self.device = pick_device(spec.device)
        never_eager()
        keep_threads()
        self.wall = WallClock()
        fixed = spec.step_seconds
        cuda = self.device.type == "cuda"
        real = RaceClock(torch.cuda.synchronize, event=timed_event) if cuda else RaceClock()
        self.clock = replay or (real if fixed is None else SteppedClock(fixed))
        self.last_step_seconds = math.inf
        self.delayed = Delayed()

    def complete(self) -> Row:
        """The whole run; returns its summary, which worker 0 alone has."""
        try:
            self.prepare()
            with self.loader:
                diverged = self._train()
                with self.clock.ledger("evaluation"):
                    final = self._evaluate(self._seconds(), end=True)
                with self.clock.ledger("reporting"):
                    return self._finish(diverged, final) if self.workers.is_first else {}
        finally:
            (self.folder / ACTIVATIONS_FILE).unlink(missing_ok=True)

    def prepare(self) -> None:
        """Everything before the first step: set-up, resuming, warm-up."""
        with self.clock.ledger("set_up"):
            self._set_up()
        with self.clock.ledger("warm_up"), ExitStack() as undone:
            undone.push(self.loader)
            while (reason := self._warm_up()) is not None:
                self.learner.release()
                self._smaller(reason)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self.learner.agree()
            undone.pop_all()

    def _warm_up(self) -> str | None:
        """Why it could not be ended, where memory ran out; then nothing has changed."""
        heldout, order, micro_rows = self.milestones.heldout, self.data.order(), self.counts.micro_rows
        return self.workers.reason(try_to_warm_up(self.learner, heldout, order, self.own_rows, micro_rows))

    def _set_up(self) -> None:
        spec, recipe, workers = self.spec, self.trial.recipe, self.workers
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = open_data(spec.data, Path(self.trial.data_folder))
        self.learner = build_learner(self.trial, self.data, self.device, workers, self._say)
        order = self.data.order()
        self.milestones = Milestones(spec, self.data, order, self.learner.adapter, self.folder, self._fewer_at_once)
        self.rows_per_step = recipe.rows.rows_per_step(spec.global_rows)
        self.own_rows = rows_of_worker(self.rows_per_step, workers.size)
        self.counts = Counts(micro_rows=min(spec.micro_rows, self.own_rows))
        found, damage = checkpoint.newest_of_first(self.folder, workers)
        state = self._restore(found) if found else None
        if self.counts.out_of_memory:
            self.milestones.resize(self.counts.micro_rows)
        self.flight = Flight(self.device)
        had_rows = (self.folder / METRICS_FILE).is_file()
        trackers, began = self._files() if workers.is_first else ([], None)
        at, prefetch = state["loader"] if state else None, recipe.execution.prefetch
        self.loader = Loader(order, self.rows_per_step, self.counts.micro_rows, self.device, at, prefetch, workers)
        start, name, budget, every_step = self._position(), self.trial.trial_id, self.budget, self.replay is not None
        self.recorder = Recorder(
            name, trackers, self.report, budget, self.device, self.rows_per_step, start, began, every_step
        )
        self._saved_at, self._saved_step = start.train_seconds, self.counts.step
        # Without a checkpoint, rows that a killed process left belong to no run: it begins again at step 0.
        if state or had_rows:
            self.recorder.resumed(start, damage)
        if workers.is_first:
            checkpoint.remove_newer(self.folder, found)

    def _files(self) -> tuple[list[Tracker], ProgressFile]:
        """Writes what runs, and opens what is written while it does."""
        spec, run = self.spec, description(self.trial, self.learner.adapter, self.rows_per_step)
        if self.counts.step > 0:
            run = with_earlier(run, self.folder / RUN_FILE)
        write_whole(self.folder / RUN_FILE, json.dumps(run, indent=1))
        trackers = open_trackers(self.folder, run, spec.wandb, spec.wandb_project, spec.tensorboard)
        return trackers, ProgressFile(self.folder / PROGRESS_FILE, self.counts.step)

    def _say(self, text: str) -> None:
        log.info("%s: %s", self.trial.trial_id, text)

    def _fewer_at_once(self, text: str) -> None:
        """What a milestone says that found no memory."""
        self._say(text)
        self.recorder.milestone_out_of_memory(self._position(), text)
        self._flush()

    def _restore(self, folder: Path) -> Row:
        """Everything that a checkpoint holds; the ledgers of this process are added to those of the earlier ones."""
        check_kind(self.folder / RUN_FILE, self.device)
        state = checkpoint.load(folder, self.learner)
        self._say(f"goes on from step {state['step']}")
        self.counts = Counts.of_state(state)
        self.milestones.load_state_dict(state["milestones"])
        self.delayed = Delayed(state["delayed"])
        self.wall.restore(state["wall_seconds"])
        now = self.clock.ledgers
        self.clock.restore({name: seconds + now[name] for name, seconds in state["ledgers"].items()})
        return state

    def _train(self) -> bool:
        """Until the budget is used up, or the gradients say that the run has diverged: whether they did."""
        used = self._seconds()
        while not self.budget.spent(used) and not self.counts.diverged:
            self._stop_if_asked()
            used = self.advance(used)
        diverged = self.counts.diverged
        self.clock.switch("idle")
        self._land(all_steps=True)
        return diverged

    def _stop_if_asked(self) -> None:
        if not self.workers.first(self.stop()):
            return
        if self.counts.step > self._saved_step:
            with self.clock.ledger("checkpoint"):
                self._save(self._seconds())
        self.recorder.finish({})
        raise StoppedError(f"{self.trial.trial_id}: stopped after {self.counts.step} steps, can go on from there")

    def advance(self, used: float) -> float:
        """One step from `used` train seconds, and what is due after it; returns the train seconds then."""
        self.clock.switch("data_wait")
        batch = self.loader.next()
        self.clock.switch("train")
        progress = Progress(self.counts.step, used, self.budget.seconds, self.loader.tokens_seen)
        row = self.learner.step(batch, progress, smaller=self._smaller)
        self.counts.stepped(self.loader.labelled)
        self.clock.tick()
        self.flight.push(row, self.clock.mark())
        near_end = self.budget.seconds - used < STEPS_NEAR_THE_END * self.last_step_seconds
        self._land(all_steps=near_end)
        now = self._seconds()
        self.last_step_seconds = now - used
        return now if self.budget.spent(now) else self._off_the_budget(now)

    def _seconds(self) -> float:
        """Train seconds so far, by the clock of worker 0: all workers decide by the same."""
        return self.workers.first(self.clock.train_seconds)

    def _smaller(self, reason: str) -> Batch:
        """After memory ran out: the rows of the step in micro-batches of half as many, as for the rest of the run.

        Raises:
            torch.OutOfMemoryError: the recipe cannot be run with smaller ones.
        """
        before, part = self.counts.micro_rows, self.trial.recipe.rows
        sizes = smaller_sizes(part, before, self.own_rows)
        if not sizes:
            raise torch.OutOfMemoryError(f"out of memory with micro-batches of {before} rows, and {part} cannot be run "
                                         f"with smaller ones: {reason}")  # fmt: skip
        self.counts.micro_rows = after = sizes[0]
        self.counts.out_of_memory += 1
        self._say(f"out of memory, micro-batches of {after} rows from here on: {reason}")
        self.recorder.out_of_memory(self._position(), after, reason)
        self._flush()
        self.milestones.resize(after)
        return self.loader.smaller(after)

    def _flush(self) -> None:
        """Rows at once, where the run may end before they are due, for want of the memory that they speak of."""
        with self.clock.ledger("reporting"):
            self.recorder.flush()

    def _land(self, all_steps: bool) -> None:
        """Takes in finished steps: rows for the recorder, the count of bad gradients, measurements for the parts."""
        for finished in self.flight.land(all_steps):
            self.counts.landed(math.isfinite(finished.values[GRAD_NORM]))
            self.delayed.add(finished)
            self.recorder.step(finished, self._position(), self.loader.marks)
        for values, progress in self.delayed.due(self.counts.step):
            self.learner.observe(values, progress)

    def _off_the_budget(self, used: float) -> float:
        """Milestones, reports and checkpoints that are due; returns the train seconds after them."""
        if asks := self.milestones.due(used / self.budget.seconds):
            with self.clock.ledger("evaluation"):
                self._evaluate(used)
            if self.spec.evaluation is not None:
                with self.clock.ledger("checkpoint"):
                    self._save(used)
        if reports := self.recorder.report_due(used):
            with self.clock.ledger("reporting"):
                self._land(all_steps=True)
                self.recorder.report(used)
        if saves := used - self._saved_at >= self.spec.checkpoint_every_seconds:
            with self.clock.ledger("checkpoint"):
                self._save(used)
        return self._seconds() if asks or reports or saves else used

    def _evaluate(self, used: float, end: bool = False) -> Row:
        """A milestone at so many train seconds. The end of a run is its last one, whatever is left of the budget."""
        self._land(all_steps=True)
        fraction = min(1.0, used / self.budget.seconds)
        name = self.milestones.reach(1.0 if end else fraction)
        values = self.milestones.ask(name, fraction) if self.workers.is_first else {}
        with self.clock.ledger("reporting"):
            where = self.recorder.milestone(self._position(), fraction, values)
        if self.workers.is_first:
            with self.clock.ledger("checkpoint"):
                self.milestones.keep(name, where)
        # The others wait here: a device would not wait for as long as an evaluation may take.
        self.workers.first(fraction)
        return values

    def _save(self, used: float) -> None:
        """A checkpoint at so many train seconds: of worker 0, as which all go on."""
        self._land(all_steps=True)
        self.recorder.flush()
        self._saved_at, self._saved_step = used, self.counts.step
        self.learner.agree()
        if self.workers.is_first:
            # Rows of steps that a checkpoint is beyond are not written again.
            for name in (METRICS_FILE, PROGRESS_FILE):
                flush(self.folder / name)
            checkpoint.save(self.folder, self.counts.step, self.learner, self._state())

    def _state(self) -> Row:
        return {
            **asdict(self.counts),
            "milestones": self.milestones.state_dict(),
            "delayed": self.delayed.state(),
            "wall_seconds": self.wall.seconds,
            "ledgers": self.clock.ledgers,
            "loader": self.loader.state_dict(),
        }

    def _report_saved(self, row: Row) -> None:
        """Reports a row, a milestone's after a checkpoint; the end of the run is its own."""
        if row.get(KIND) == "milestone" and self.milestones.left:
            with self.clock.ledger("checkpoint"):
                self._save(self._seconds())
        self._report(row)

    def _finish(self, diverged: bool, final: Row) -> Row:
        if self.spec.save_model:
            self.milestones.save_model(self.folder / "model", {})
        if self.spec.save_heads and (heads := self.learner.objective.named_parameters()):
            checkpoint.save_heads(self.folder / "heads", heads)
        summary = summarise(
            self.trial, diverged, final, self.counts, self._position(), self.last_step_seconds, self.learner,
            self.milestones, self.data, self.loader,
        )  # fmt: skip
        self.recorder.finish(summary)
        summary |= {"wall_seconds": self.wall.seconds, "ledgers": self.clock.ledgers}
        write_whole(self.folder / SUMMARY_FILE, json.dumps(plain(summary), indent=1))
        checkpoint.remove_all(self.folder)
        return summary

    def _position(self) -> Position:
        counts, tokens, waited = self.counts, self.loader.tokens_seen, self.clock.ledgers["data_wait"]
        return Position(counts.step, tokens, self.clock.train_seconds, self.wall.seconds, waited)
