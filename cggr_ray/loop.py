"""run_race: one trial from its specification to its summary, inside a wall-clock budget. Knows nothing of Ray.

The trial's folder is its only memory: called again on a folder with a checkpoint, it goes on from there, clock and all.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from cggr_ray import checkpoint
from cggr_ray.batches import smaller_sizes
from cggr_ray.clock import RaceClock, ReplayClock, SteppedClock, no_device
from cggr_ray.compiling import never_eager
from cggr_ray.data.batch import Batch
from cggr_ray.data.dataset import open_data
from cggr_ray.data.loader import Loader
from cggr_ray.description import description
from cggr_ray.evaluation.reference import reference_nll
from cggr_ray.files import write_whole
from cggr_ray.flight import Flight
from cggr_ray.learner import Learner
from cggr_ray.milestones import Milestones
from cggr_ray.models.adapter import Adapter
from cggr_ray.models.prefix_cache import PrefixCache
from cggr_ray.out_of_memory import FAILURES, LostStepError, first_line, is_out_of_memory
from cggr_ray.progress import Budget, Progress, ProgressFile
from cggr_ray.race import Trial
from cggr_ray.recorder import Position, Recorder, Report
from cggr_ray.schema import (
    GRAD_NORM,
    METRICS_FILE,
    PROGRESS_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    Status,
)
from cggr_ray.telemetry.gpu import MIB
from cggr_ray.telemetry.jsonl import plain
from cggr_ray.telemetry.tracker import Row, open_trackers
from cggr_ray.warmup import warm_up

# Near the end the host waits for every step, so that none starts that the budget does not cover.
STEPS_NEAR_THE_END = 4
# Consecutive steps without a finite gradient after which a run has diverged.
NOT_FINITE_LIMIT = 20
# A part that learns from measurements gets them two steps late, in flight or not, so that a resumed run sees the same.
OBSERVE_DELAY = 2
# Beside the run's own files, while it runs: what a cache of activations does not hold on the device.
ACTIVATIONS_FILE = "activations.bin"

log = logging.getLogger(__name__)


def run_race(trial: Trial, report: Report = lambda row: None, replay: ReplayClock | None = None) -> Row:
    """Runs a trial to the end of its budget, or from its last checkpoint to there; returns the summary.

    Args:
        report: called a few dozen times with the newest row, and at milestones; off the budget.
        replay: the clock of a recorded run, in place of a real one; every step has a row then.
    """
    done = Path(trial.folder) / SUMMARY_FILE
    if done.is_file():
        summary: Row = json.loads(done.read_text())
        return summary
    return Run(trial, report, replay).complete()


def pick_device(wanted: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda', and no GPU is visible; accepted: cpu, auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


class Run:
    """One running trial."""

    def __init__(self, trial: Trial, report: Report, replay: ReplayClock | None = None) -> None:
        self.trial, self.spec, self.report, self.replay = trial, trial.race, report, replay
        self.folder = Path(trial.folder)
        self.budget = Budget(self.spec.budget_seconds)
        self.device = pick_device(self.spec.device)
        never_eager()
        self._started, self._wall_before = time.time(), 0.0
        fixed = self.spec.step_seconds
        synchronise = torch.cuda.synchronize if self.device.type == "cuda" else no_device
        self.clock = replay or (RaceClock(synchronise) if fixed is None else SteppedClock(fixed))
        self.step, self.rows_trained, self.labelled, self.not_finite, self.out_of_memory = 0, 0, 0, 0, 0
        self.last_step_seconds = math.inf
        self.delayed: deque[tuple[Row, Row]] = deque()

    def complete(self) -> Row:
        """The whole run; returns its summary."""
        try:
            self.prepare()
            with self.loader:
                status = self._train()
                with self.clock.ledger("evaluation"):
                    final = self._evaluate(1.0)
                with self.clock.ledger("reporting"):
                    return self._finish(status, final)
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
            undone.pop_all()

    def _warm_up(self) -> str | None:
        """Why it could not be ended, where memory ran out; then nothing has changed."""
        try:
            warm_up(self.learner, self.milestones.heldout, self.data.order(), self.rows_per_step, self.micro_rows)
        except FAILURES as error:
            if isinstance(error, LostStepError) or not is_out_of_memory(error):
                raise
            return first_line(error)
        return None

    def _set_up(self) -> None:
        spec, recipe = self.spec, self.trial.recipe
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = open_data(spec.data, Path(self.trial.data_folder))
        vocabulary = spec.model.vocabulary(len(self.data.tokenizer))
        dtype = recipe.execution.dtype(self.device)
        reference = None
        if recipe.reference is not None:
            where = Path(self.trial.data_folder)
            reference = reference_nll(
                recipe.reference, self.data, where, spec.micro_rows, self.device, dtype, self._say
            )
        model = spec.model.build(vocabulary, self.trial.seed, self.device, dtype)
        adapter = Adapter(model, recipe.execution.gradient_checkpointing)
        self._say(adapter.execution_note)
        if (kept := recipe.execution.activation_cache) is not None:
            if any(p is adapter.head_VD for p in adapter.family.input_parameters()):
                raise ValueError("activation_cache with a tied head; accepted: an embedding that rests")
            file, width = self.folder / ACTIVATIONS_FILE, adapter.head_VD.shape[1]
            adapter.cache = PrefixCache(kept, self.data.num_positions, width, dtype, self.device, file)
        self.learner = Learner(recipe, adapter, self.trial.seed, self.data.num_positions, reference)
        order = self.data.order()
        self.milestones = Milestones(spec, self.data, order, adapter, self.folder, self._say)
        self.rows_per_step = recipe.rows.rows_per_step(spec.global_rows)
        self.micro_rows = min(spec.micro_rows, self.rows_per_step)
        found = checkpoint.latest(self.folder)
        state = self._restore(found) if found else None
        if self.out_of_memory:
            self.milestones.resize(self.micro_rows)
        at = state["loader"] if state else None
        self.loader = Loader(order, self.rows_per_step, self.micro_rows, self.device, at, recipe.execution.prefetch)
        self.flight = Flight(self.device)
        run = description(self.trial, adapter, self.rows_per_step)
        write_whole(self.folder / RUN_FILE, json.dumps(run, indent=1))
        had_rows = (self.folder / METRICS_FILE).is_file()
        trackers = open_trackers(self.folder, run, spec.wandb, spec.wandb_project, spec.tensorboard)
        start = self._position()
        began = ProgressFile(self.folder / PROGRESS_FILE, self.step)
        budget, every_step = self.budget, self.replay is not None
        name = self.trial.trial_id
        self.recorder = Recorder(name, trackers, self.report, budget, self.device, start, began, every_step)
        self._saved_at = start.train_seconds
        # Without a checkpoint, rows that a killed process left belong to no run: it begins again at step 0.
        if state or had_rows:
            self.recorder.resumed(start)

    def _say(self, text: str) -> None:
        log.info("%s: %s", self.trial.trial_id, text)

    def _restore(self, folder: Path) -> Row:
        """Everything that a checkpoint holds; the ledgers of this process are added to those of the earlier ones."""
        state = checkpoint.load(folder, self.learner)
        self._say(f"goes on from step {state['step']}")
        self.step, self.rows_trained, self.labelled = state["step"], state["rows_trained"], state["labelled"]
        self.micro_rows, self.out_of_memory = state["micro_rows"], state["out_of_memory"]
        self.not_finite = state["not_finite"]
        self.milestones.load_state_dict(state["milestones"])
        self.delayed = deque((values, progress) for values, progress in state["delayed"])
        self._wall_before = state["wall_seconds"]
        now = self.clock.ledgers
        self.clock.restore({name: seconds + now[name] for name, seconds in state["ledgers"].items()})
        return state

    def _train(self) -> Status:
        used = self.clock.train_seconds
        while not self.budget.spent(used) and self.not_finite < NOT_FINITE_LIMIT:
            used = self.advance(used)
        diverged = self.not_finite >= NOT_FINITE_LIMIT
        self.clock.switch("idle")
        self._land(all_steps=True)
        return "diverged" if diverged else "finished"

    def advance(self, used: float) -> float:
        """One step from `used` train seconds, and what is due after it; returns the train seconds then."""
        self.clock.switch("data_wait")
        batch = self.loader.next()
        self.clock.switch("train")
        progress = Progress(self.step, used, self.budget.seconds, self.loader.tokens_seen)
        self.flight.push(self.learner.step(batch, progress, smaller=self._smaller))
        self.step += 1
        self.rows_trained += batch.rows
        self.labelled += batch.labelled
        self.clock.tick()
        near_end = self.budget.seconds - used < STEPS_NEAR_THE_END * self.last_step_seconds
        self._land(all_steps=near_end)
        now = self.clock.train_seconds
        self.last_step_seconds = now - used
        return now if self.budget.spent(now) else self._off_the_budget(now)

    def _smaller(self, reason: str) -> Batch:
        """After memory ran out: the rows of the step in micro-batches of half as many, as for the rest of the run.

        Raises:
            torch.OutOfMemoryError: the recipe cannot be run with smaller ones.
        """
        before, part = self.micro_rows, self.trial.recipe.rows
        sizes = smaller_sizes(part, before, self.rows_per_step)
        if not sizes:
            raise torch.OutOfMemoryError(f"out of memory with micro-batches of {before} rows, and {part} cannot be run "
                                         f"with smaller ones: {reason}")  # fmt: skip
        self.micro_rows = after = sizes[0]
        self.out_of_memory += 1
        self._say(f"out of memory, micro-batches of {after} rows from here on: {reason}")
        self.recorder.out_of_memory(self._position(), after, reason)
        self.milestones.resize(after)
        return self.loader.smaller(after)

    def _land(self, all_steps: bool) -> None:
        """Takes in finished steps: rows for the recorder, the count of bad gradients, measurements for the parts."""
        for finished in self.flight.land(all_steps):
            self.not_finite = 0 if math.isfinite(finished.values[GRAD_NORM]) else self.not_finite + 1
            self.delayed.append((finished.values, asdict(finished.progress)))
            self.recorder.step(finished, self._position(), self.loader.marks)
        while self.delayed and self.step - self.delayed[0][1]["step"] >= OBSERVE_DELAY:
            values, progress = self.delayed.popleft()
            self.learner.observe(values, Progress(**progress))

    def _off_the_budget(self, used: float) -> float:
        """Milestones, reports and checkpoints that are due; returns the train seconds after them."""
        if self.milestones.due(used / self.budget.seconds):
            with self.clock.ledger("evaluation"):
                self._evaluate(used / self.budget.seconds)
            if self.spec.evaluation is not None:
                with self.clock.ledger("checkpoint"):
                    self._save()
        if self.recorder.report_due(used):
            with self.clock.ledger("reporting"):
                self._land(all_steps=True)
                self.recorder.report(self._position())
        if used - self._saved_at >= self.spec.checkpoint_every_seconds:
            with self.clock.ledger("checkpoint"):
                self._save()
        return self.clock.train_seconds

    def _evaluate(self, fraction: float) -> Row:
        self._land(all_steps=True)
        name, values = self.milestones.ask(fraction)
        with self.clock.ledger("reporting"):
            where = self.recorder.milestone(self._position(), fraction, values)
        with self.clock.ledger("checkpoint"):
            self.milestones.keep(name, where)
        return values

    def _save(self) -> None:
        self._land(all_steps=True)
        self.recorder.flush()
        self._saved_at = self.clock.train_seconds
        state = {
            "rows_trained": self.rows_trained,
            "labelled": self.labelled,
            "not_finite": self.not_finite,
            "micro_rows": self.micro_rows,
            "out_of_memory": self.out_of_memory,
            "milestones": self.milestones.state_dict(),
            "delayed": [[plain(values), progress] for values, progress in self.delayed],
            "wall_seconds": self._wall(),
            "ledgers": self.clock.ledgers,
            "loader": self.loader.state_dict(),
        }
        checkpoint.save(self.folder, self.step, self.learner, state)

    def _finish(self, status: Status, final: Row) -> Row:
        if self.spec.save_model:
            self.milestones.save_model(self.folder / "model", {})
        at = self._position()
        cuda, kept = self.device.type == "cuda", self.learner.adapter.cache
        summary: Row = {
            "trial_id": self.trial.trial_id,
            "recipe": self.trial.recipe.name,
            "seed": self.trial.seed,
            "status": status,
            "steps": self.step,
            "tokens_seen": at.tokens_seen,
            "labelled_tokens": self.labelled,
            "epochs": self._epochs(),
            "budget_seconds": self.budget.seconds,
            "train_seconds": at.train_seconds,
            "overrun_seconds": at.train_seconds - self.budget.seconds,
            "last_step_seconds": self.last_step_seconds,
            **final,
            "best_val_loss": self.milestones.best,
            "peak_memory_mib": self.milestones.peak_bytes() / MIB if cuda else None,
            "parameters": self.learner.parameters,
            "micro_rows": self.micro_rows,
            "out_of_memory": self.out_of_memory,
            "order": self.loader.marks,
            **({"activation_cache": {"hits": kept.hits, "misses": kept.misses}} if kept is not None else {}),
            "message": "" if status == "finished" else f"{NOT_FINITE_LIMIT} steps without a finite gradient",
        }
        self.recorder.finish(summary)
        summary |= {"wall_seconds": self._wall(), "ledgers": self.clock.ledgers}
        write_whole(self.folder / SUMMARY_FILE, json.dumps(plain(summary), indent=1))
        checkpoint.remove_all(self.folder)
        return summary

    def _epochs(self) -> dict[str, float]:
        """How often every source was read. By an order of its own: the loader's is read ahead of training."""
        passes = self.data.order().epochs(self.loader.at)
        return {source.name: passed for source, passed in zip(self.spec.data.sources, passes, strict=True)}

    def _position(self) -> Position:
        ledgers = self.clock.ledgers
        tokens = self.loader.tokens_seen
        return Position(
            self.step, self.rows_trained, tokens, self.clock.train_seconds, self._wall(), ledgers["data_wait"]
        )

    def _wall(self) -> float:
        return self._wall_before + time.time() - self._started
