"""Runs that are killed, for the tests of this folder: a tiny trial, the points where it may die, and its last word.

A process of its own imports everything once and forks a child for every try, so that a try costs what the run costs.
A point is the n-th event of a try: a step begins, or something in the run's folder is opened, flushed, renamed or
removed, or a tensor file has been written up to some byte. There the child kills itself with SIGKILL.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from analysis.frames import read_rows, surviving_rows
from cggr_ray.data.dataset import DataSpec, prepare
from cggr_ray.data.sources import Problems
from cggr_ray.loop import run_race
from cggr_ray.models.presets import PRESETS, ModelSpec, Preset
from cggr_ray.race import RaceSpec, Trial, plan_trials

STEP_SECONDS, STEPS, STEPS_BETWEEN = 0.5, 8, 2
AUDITED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
SMALLEST = Preset(2, 64, 4, 2, 96, 2048)
# Of rows and summaries, what the machine decides.
RATES = ("train/tokens_per_sec", "train/samples_per_sec", "train/step_seconds")
OF_THE_MACHINE = ("wall_seconds", "overrun_seconds", "ledgers", "data/wait_seconds", *RATES)


def trial_in(folder: Path, data: Path, recipe: str = "cggr_loss", **changes: Any) -> Trial:
    """A few steps of a tiny model on a clock of fixed steps, with a checkpoint every few of them."""
    PRESETS["smallest"] = SMALLEST
    spec = RaceSpec(
        recipes=(recipe,),
        budget_seconds=STEPS * STEP_SECONDS,
        step_seconds=STEP_SECONDS,
        global_rows=2,
        micro_rows=2,
        milestones=(0.5,),
        checkpoint_every_seconds=STEPS_BETWEEN * STEP_SECONDS,
        save_model=True,
        model=ModelSpec(preset="smallest"),
        data=DataSpec(sources=(Problems(count=300),), row_tokens=64, val_documents=4),
        values={"optimizer.schedule.warmup_tokens": 500},
        device="cpu",
    )
    return plan_trials(replace(spec, **changes), folder)[0].placed(folder, data)


def warm(trial: Trial) -> Path:
    """Prepares the data and runs the trial once in this process, which loads what children would load each."""
    prepare(trial.race.data, Path(trial.data_folder))
    logging.disable(logging.WARNING)
    disable_progress_bar()
    run_race(trial)
    return Path(trial.folder)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind and that has to be the same, killed or not: to the bit, as JSON and hex."""
    summary = json.loads((folder / "summary.json").read_text())
    rows, _ = surviving_rows(read_rows(folder / "metrics.jsonl"))
    began = (folder / "progress.f64").read_bytes()
    return {
        "summary": {key: value for key, value in summary.items() if key not in OF_THE_MACHINE},
        "rows": [{key: value for key, value in row.items() if key not in OF_THE_MACHINE} for row in rows],
        "began": struct.unpack(f"<{len(began) // 8}d", began),
        "weights": (folder / "model" / "model.safetensors").read_bytes().hex(),
        "left": sorted(path.name for path in folder.iterdir()),
    }


@dataclass
class Points:
    """Counts the events of a run in this process; kills it at the one numbered `last`, never where that is None.

    `log` gets the number of every step that begins, whatever becomes of the process.
    """

    folder: Path
    last: int | None
    log: Path
    seen: int = 0

    def watch(self) -> None:
        """From here on; cannot be undone."""
        from cggr_ray import checkpoint
        from cggr_ray.learner import Learner

        step, sync, save = Learner.step, os.fsync, checkpoint.save_file
        steps = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

        def counted_step(learner: Learner, batch: Any, progress: Any, *rest: Any, **more: Any) -> Any:
            if progress.budget_seconds > 1:  # not of the warm-up
                os.write(steps, struct.pack("<i", progress.step))
                self.event()
            return step(learner, batch, progress, *rest, **more)

        def counted_sync(descriptor: int) -> None:
            self.event()
            sync(descriptor)
            self.event()

        def counted_save(tensors: dict[str, Any], path: Path) -> None:
            self.event(lambda: self.die_at_byte(lambda: save(tensors, path), 1))
            self.event(lambda: self.die_at_byte(lambda: save(tensors, path), 20_000))
            save(tensors, path)

        Learner.step, os.fsync, checkpoint.save_file = counted_step, counted_sync, counted_save
        sys.addaudithook(self.audit)

    def audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Python tells of these before they happen."""
        if name in AUDITED and str(arguments[0]).startswith(str(self.folder)):
            self.event()

    def event(self, die: Callable[[], None] = lambda: None) -> None:
        if self.seen == self.last:
            die()
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1

    def die_at_byte(self, write: Callable[[], None], byte: int) -> None:
        """The kernel ends the process inside the write that goes beyond that byte of a file."""
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (byte, resource.RLIM_INFINITY))
        write()


def in_a_child(body: Callable[[], None]) -> int:
    """Runs `body` in a fork; returns minus the signal that ended it, or its exit code."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            if code:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempt(trial: Trial, last: int | None, log: Path) -> int:
    """One try of a trial in a child that dies at event `last`; the number of events of one that does not die is left in
    `<log>.events`."""

    def body() -> None:
        points = Points(Path(trial.folder), last, log)
        points.watch()
        run_race(trial)
        log.with_suffix(".events").write_text(str(points.seen))

    return in_a_child(body)
