"""run_race: one trial from its specification to its summary, inside a wall-clock budget. Knows nothing of Ray.

The trial's folder is its only memory: called again on a folder with a checkpoint, it goes on from there, clock and all.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from cggr_ray import checkpoint
from cggr_ray.clock import RaceClock, SteppedClock, no_device
from cggr_ray.data.dataset import open_data
from cggr_ray.data.loader import Loader
from cggr_ray.environment import fingerprint
from cggr_ray.evaluation.heldout import HeldOut
from cggr_ray.flight import Finished, Flight
from cggr_ray.learner import Learner
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Budget, Progress
from cggr_ray.race import Trial
from cggr_ray.schema import (
    DATA_WAIT_SECONDS,
    FRACTION,
    GRAD_NORM,
    KIND,
    ORDER_HASH,
    ORDER_ROWS,
    RUN_FILE,
    SAMPLES_PER_SEC,
    STEP,
    STEP_SECONDS,
    SUMMARY_FILE,
    TOKENS_PER_SEC,
    TOKENS_SEEN,
    TRAIN_SECONDS,
    VAL_LOSS,
    WALL_SECONDS,
    Status,
)
from cggr_ray.telemetry.gpu import MIB, device_info, device_row
from cggr_ray.telemetry.jsonl import plain
from cggr_ray.telemetry.tracker import Row, open_trackers
from cggr_ray.warmup import warm_up

# Rows over the budget, reports over the budget, and the fewest and most seconds between two reports.
ROWS, REPORTS, REPORT_SECONDS = 1000, 40, (0.5, 10.0)
# Near the end the host waits for every step, so that none starts that the budget does not cover.
STEPS_NEAR_THE_END = 4
# Consecutive steps without a finite gradient after which a run has diverged.
NOT_FINITE_LIMIT = 20
# A part that learns from measurements gets them two steps late, in flight or not, so that a resumed run sees the same.
OBSERVE_DELAY = 2

log = logging.getLogger(__name__)
Report = Callable[[Row], None]


def run_race(trial: Trial, report: Report = lambda row: None) -> Row:
    """Runs a trial to the end of its budget, or from its last checkpoint to there; returns the summary.

    Args:
        report: called a few dozen times with the newest row, off the budget.
    """
    done = Path(trial.folder) / SUMMARY_FILE
    if done.is_file():
        summary: Row = json.loads(done.read_text())
        return summary
    started = time.time()
    return Run(trial, report, started).complete()


def pick_device(wanted: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda', and no GPU is visible; accepted: cpu, auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


class Run:
    """The state of one running trial."""

    def __init__(self, trial: Trial, report: Report, started: float) -> None:
        self.trial, self.spec, self.report = trial, trial.race, report
        self.folder = Path(trial.folder)
        self.budget = Budget(self.spec.budget_seconds)
        self.device = pick_device(self.spec.device)
        synchronise = torch.cuda.synchronize if self.device.type == "cuda" else no_device
        fixed = self.spec.step_seconds
        self.clock = RaceClock(synchronise) if fixed is None else SteppedClock(fixed)
        self._started, self._wall_before = started, 0.0
        self.step, self.rows_trained, self.labelled = 0, 0, 0
        self.milestones = sorted({*self.spec.milestones, 1.0})
        self.best = math.inf
        self.not_finite = 0
        self.delayed: deque[tuple[Row, Row]] = deque()
        self.rows: list[Row] = []
        self._row_mark = self._report_mark = (0, 0, 0.0, 0)
        self._checkpoint_mark = 0.0

    def complete(self) -> Row:
        with self.clock.ledger("set_up"):
            self._set_up()
        with self.clock.ledger("warm_up"):
            warm_up(self.learner, self.heldout, self.data.order(), self.rows_per_step, self.spec.micro_rows)
            self._restart_memory_peak()
        with self.loader:
            status = self._train()
        with self.clock.ledger("reporting"):
            return self._finish(status)

    # Set-up -----------------------------------------------------------------------------------------------------------

    def _set_up(self) -> None:
        spec, recipe = self.spec, self.trial.recipe
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = open_data(spec.data, Path(self.trial.data_folder))
        bf16 = recipe.execution.precision == "bf16" or (recipe.execution.precision == "auto" and self.device.type == "cuda")
        dtype = torch.bfloat16 if bf16 else torch.float32
        vocabulary = None if spec.model.folder else self.data.vocab_size
        model = spec.model.build(vocabulary, self.trial.seed, self.device, dtype)
        adapter = Adapter(model, recipe.execution.gradient_checkpointing)
        log.info("%s: %s", self.trial.trial_id, adapter.execution_note)
        self.learner = Learner(recipe, adapter, self.trial.seed)
        order = self.data.order()
        self.heldout = HeldOut(self.data, order, spec.micro_rows, self.device)
        self.rows_per_step = recipe.rows.rows_per_step(spec.global_rows)
        self._write_run_file(dtype)
        loader_state = self._resume()
        micro_rows = min(spec.micro_rows, self.rows_per_step)
        self.loader = Loader(order, self.rows_per_step, micro_rows, self.device, loader_state)
        self.flight = Flight(self.device)
        run = json.loads((self.folder / RUN_FILE).read_text())
        self.trackers = open_trackers(self.folder, run, spec.wandb, spec.wandb_project, spec.tensorboard)
        if loader_state is not None:
            self._track({KIND: "resumed", STEP: self.step})

    def _resume(self) -> Row | None:
        """Restores the newest checkpoint, if there is one; returns the loader's state."""
        found = checkpoint.latest(self.folder)
        if found is None:
            return None
        state = checkpoint.load(found, self.learner)
        log.info("%s: goes on from step %d", self.trial.trial_id, state["step"])
        self.step, self.rows_trained, self.labelled = state["step"], state["rows_trained"], state["labelled"]
        self.best, self.not_finite, self.milestones = state["best"] or math.inf, state["not_finite"], state["milestones"]
        self.delayed = deque((values, progress) for values, progress in state["delayed"])
        self._wall_before = state["wall_seconds"]
        now = self.clock.ledgers
        self.clock.restore({name: seconds + now[name] for name, seconds in state["ledgers"].items()})
        self._checkpoint_mark = self.clock.train_seconds
        mark = (self.step, state["loader"]["tokens_seen"], self.clock.train_seconds, self.rows_trained)
        self._row_mark = self._report_mark = mark
        loader: Row = state["loader"]
        return loader

    def _write_run_file(self, dtype: torch.dtype) -> None:
        trial, spec = self.trial, self.spec
        values = {**spec.values, **spec.arms.get(trial.recipe.name, {})}
        run = {
            "trial_id": trial.trial_id,
            "recipe": trial.recipe.name,
            "seed": trial.seed,
            "data_seed": spec.data.seed,
            "race": spec.name,
            "values": values,
            "parts": trial.recipe.to_plain(),
            "model": {"name": spec.model.name, "parameters": self.learner.parameters, "dtype": str(dtype)[6:]},
            "device": device_info(self.device),
            "execution": self.learner.adapter.execution_note,
            "versions": fingerprint(),
            "row_tokens": spec.data.row_tokens,
            "global_rows": spec.global_rows,
            "micro_rows": spec.micro_rows,
            "rows_per_step": self.rows_per_step,
        }
        (self.folder / RUN_FILE).write_text(json.dumps(run, indent=1))

    def _restart_memory_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    # Training ---------------------------------------------------------------------------------------------------------

    def _train(self) -> Status:
        last_step_seconds = math.inf
        landed_at = used = self.clock.train_seconds
        self.clock.switch("data_wait")
        while not self.budget.spent(used) and self.not_finite < NOT_FINITE_LIMIT:
            self.clock.switch("data_wait")
            batch = self.loader.next()
            self.clock.switch("train")
            progress = Progress(self.step, used, self.budget.seconds, self.loader.tokens_seen)
            self.flight.push(self.learner.step(batch, progress))
            self.step += 1
            self.rows_trained += batch.rows
            self.labelled += batch.labelled
            self.clock.tick()
            near_end = self.budget.seconds - used < STEPS_NEAR_THE_END * last_step_seconds
            self._land(all_steps=near_end)
            used = self.clock.train_seconds
            last_step_seconds, landed_at = used - landed_at, used
            used = self._off_the_budget(used)
            landed_at = used
        self.last_step_seconds = last_step_seconds
        self.clock.switch("reporting")
        self._land(all_steps=True)
        self._evaluate(final=True)
        self.clock.switch("idle")
        return "finished" if self.not_finite < NOT_FINITE_LIMIT else "diverged"

    def _land(self, all_steps: bool) -> None:
        """Takes in finished steps: rows for the trackers, measurements for the parts, the count of bad gradients."""
        for finished in self.flight.land(all_steps):
            norm = finished.values[GRAD_NORM]
            self.not_finite = 0 if math.isfinite(norm) else self.not_finite + 1
            self.delayed.append((finished.values, asdict(finished.progress)))
            self._collect(finished)
        while self.delayed and self._steps_behind() >= OBSERVE_DELAY:
            values, progress = self.delayed.popleft()
            self.learner.observe(values, Progress(**progress))

    def _steps_behind(self) -> int:
        """How far the oldest value not yet given to the parts lies behind the step to come."""
        return self.step - int(self.delayed[0][1]["step"])

    def _off_the_budget(self, used: float) -> float:
        """Milestones, reports and checkpoints that are due; returns the train seconds after them."""
        if self.budget.spent(used):
            return used
        if used / self.budget.seconds >= self.milestones[0]:
            self._evaluate(final=False)
        shortest, longest = REPORT_SECONDS
        every = min(max(self.budget.seconds / REPORTS, shortest), longest)
        if used - self._report_mark[2] >= every:
            self._report()
        if used - self._checkpoint_mark >= self.spec.checkpoint_every_seconds:
            self._save()
        return self.clock.train_seconds

    def _collect(self, finished: Finished) -> None:
        """Keeps a row in memory where one is due; `_flush` hands it on."""
        seconds = self.clock.train_seconds
        steps, tokens, since, rows = self._row_mark
        if seconds - since < self.budget.seconds / ROWS and finished.progress.step > 0:
            return
        elapsed = max(seconds - since, 1e-9)
        newest_mark = max(self.loader.marks, key=int, default=None)
        order = {ORDER_ROWS: int(newest_mark), ORDER_HASH: self.loader.marks[newest_mark]} if newest_mark else {}
        self._row_mark = (self.step, self.loader.tokens_seen, seconds, self.rows_trained)
        self.rows.append(
            {
                KIND: "step",
                STEP: finished.progress.step + 1,
                FRACTION: finished.progress.fraction,
                TRAIN_SECONDS: seconds,
                WALL_SECONDS: self._wall(),
                TOKENS_SEEN: finished.progress.tokens_seen,
                TOKENS_PER_SEC: (self.loader.tokens_seen - tokens) / elapsed,
                SAMPLES_PER_SEC: (self.rows_trained - rows) / elapsed,
                STEP_SECONDS: elapsed / max(self.step - steps, 1),
                DATA_WAIT_SECONDS: self.clock.ledgers["data_wait"],
                **finished.values,
                **order,
            }
        )

    # Off the budget ---------------------------------------------------------------------------------------------------

    def _evaluate(self, final: bool) -> None:
        with self.clock.ledger("evaluation"):
            self._land(all_steps=True)
            values = self.heldout.evaluate(self.learner.adapter)
        self.best = min(self.best, values[VAL_LOSS])
        fraction = 1.0 if final else self.clock.train_seconds / self.budget.seconds
        self.milestones = [m for m in self.milestones if m > fraction]
        self.final_values = values
        with self.clock.ledger("reporting"):
            self._flush()
            self._track({KIND: "milestone", **self._position(), FRACTION: fraction, **values})

    def _report(self) -> None:
        with self.clock.ledger("reporting"):
            self._land(all_steps=True)
            self._report_mark = (self.step, self.loader.tokens_seen, self.clock.train_seconds, self.rows_trained)
            newest = self.rows[-1] | device_row(self.device) if self.rows else self._position()
            if self.rows:
                self.rows[-1] = newest
            self._flush()
            self.report({"trial_id": self.trial.trial_id, **plain(newest)})

    def _save(self) -> None:
        with self.clock.ledger("checkpoint"):
            self._land(all_steps=True)
            self._flush()
            self._checkpoint_mark = self.clock.train_seconds
            state = {
                "rows_trained": self.rows_trained,
                "labelled": self.labelled,
                "best": None if math.isinf(self.best) else self.best,
                "not_finite": self.not_finite,
                "milestones": self.milestones,
                "delayed": [[plain(values), progress] for values, progress in self.delayed],
                "wall_seconds": self._wall(),
                "ledgers": self.clock.ledgers,
                "loader": self.loader.state_dict(),
            }
            checkpoint.save(self.folder, self.step, self.learner, state)

    def _finish(self, status: Status) -> Row:
        if self.spec.save_model:
            self.learner.adapter.model.save_pretrained(self.folder / "model", safe_serialization=True)
            self.data.tokenizer.save_pretrained(self.folder / "model")
        train_seconds = self.clock.train_seconds
        peak = torch.cuda.max_memory_allocated(self.device) / MIB if self.device.type == "cuda" else None
        summary: Row = {
            "trial_id": self.trial.trial_id,
            "recipe": self.trial.recipe.name,
            "seed": self.trial.seed,
            "status": status,
            "steps": self.step,
            "tokens_seen": self.loader.tokens_seen,
            "labelled_tokens": self.labelled,
            "budget_seconds": self.budget.seconds,
            "train_seconds": train_seconds,
            "overrun_seconds": train_seconds - self.budget.seconds,
            "last_step_seconds": self.last_step_seconds,
            **self.final_values,
            "best_val_loss": self.best,
            "peak_memory_mib": peak,
            "parameters": self.learner.parameters,
            "order": self.loader.marks,
            "message": "" if status == "finished" else f"{NOT_FINITE_LIMIT} steps without a finite gradient",
        }
        for tracker in self.trackers:
            tracker.finish(summary)
        checkpoint.remove_all(self.folder)
        self.report({"trial_id": self.trial.trial_id, **plain(self._position() | self.final_values), FRACTION: 1.0})
        summary |= {"wall_seconds": self._wall(), "ledgers": self.clock.ledgers}
        (self.folder / SUMMARY_FILE).write_text(json.dumps(plain(summary), indent=1))
        return summary

    # Small things -----------------------------------------------------------------------------------------------------

    def _position(self) -> Row:
        return {
            STEP: self.step,
            FRACTION: min(1.0, self.clock.train_seconds / self.budget.seconds),
            TRAIN_SECONDS: self.clock.train_seconds,
            WALL_SECONDS: self._wall(),
            TOKENS_SEEN: self.loader.tokens_seen,
        }

    def _wall(self) -> float:
        return self._wall_before + time.time() - self._started

    def _flush(self) -> None:
        for row in self.rows:
            self._track(row)
        self.rows = []

    def _track(self, row: Row) -> None:
        for tracker in self.trackers:
            tracker.log(row)
