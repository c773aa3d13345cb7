"""Whether a micro-batch fits: a run in small, in a process of its own that leaves nothing behind, under a limit.

    python -m cggr_ray.fits QUESTION.json ANSWER.json

The run is a trial's own. A try that searches warms up at the fullest level alone. One that verifies does so at every
level, takes steps over the whole schedule, and generates the largest batch where the trial is asked questions; and,
where it writes, a checkpoint, and the model where the race keeps it: of a large model tens of gigabytes, too slow for
every try. The limit is the head-room: on a GPU the allocator of the process may use a part of the memory, on a CPU the
process may have so many bytes of data (RLIMIT_DATA), so that an allocation beyond truly fails. Any error but want of
memory ends the process.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch

from cggr_ray.codec import Plain
from cggr_ray.data.batch import Batch
from cggr_ray.learner import Levels
from cggr_ray.loop import Run
from cggr_ray.out_of_memory import FAILURES, first_line, is_out_of_memory
from cggr_ray.race import Trial
from cggr_ray.telemetry.gpu import MIB, peak_bytes
from cggr_ray.warmup import warm_up

if TYPE_CHECKING:
    from cggr_ray.optim.optimizer import StackedOptimizer

# Of what a process that failed has said.
LAST_CHARACTERS = 2000
# How a process near its limit fails beside its allocators: a thread finds no room for its stack, a library for itself.
LIMIT_TEXTS = ("can't start new thread", "failed to map segment from shared object")


@dataclass(frozen=True)
class Question(Plain):
    """`limit_mib` is what the process may use, `verifies` whether it does all that a run does, but for what that leaves
    on the disk, and `writes` whether that too."""

    trial: Trial
    limit_mib: float
    verifies: bool
    writes: bool


@dataclass(frozen=True)
class Answer(Plain):
    """`peak_mib`, up to where it failed: the most that the allocator held on a GPU, which is what the limit bounds; on
    a CPU the largest resident size of the process, without what is mapped from files. `batch_mib` of that:
    what a step took up to its gradients, which grows with its rows where the update after them does not; a CPU cannot
    tell them apart."""

    fits: bool
    peak_mib: float
    batch_mib: float
    message: str = ""


class Watched:
    """An optimizer with something to do before and after every update."""

    def __init__(self, optimizer: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._optimizer, self._before, self._after = optimizer, before, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self, *args: Any) -> Any:
        self._before()
        found = self._optimizer.step(*args)
        self._after()
        return found


class SmallRun(Run):
    """A run that ends where a real one would go on with smaller micro-batches."""

    def __init__(self, trial: Trial, verifies: bool, writes: bool) -> None:
        super().__init__(trial, lambda row: None)
        self._peak, self._batch, self._verifies, self._writes = 0.0, 0.0, verifies, writes

    def _warm_up(self) -> None:
        """Also at levels where there is nothing to compile."""
        learner, order, levels = self.learner, self.data.order(), self.learner.levels()
        levels = levels if self._verifies else fullest(levels)
        optimizer: Any = learner.optimizer
        learner.optimizer = cast("StackedOptimizer", Watched(optimizer, self._before_update, self._after_update))
        try:
            warm_up(learner, self.milestones.heldout, order, self.own_rows, self.counts.micro_rows, levels)
        finally:
            learner.optimizer = optimizer
        self._peak = self.peak

    def _before_update(self) -> None:
        self._peak = self.peak
        used = peak_bytes(self.device) / MIB if self.device.type == "cuda" else self._peak
        self._batch = max(self._batch, used)

    def _after_update(self) -> None:
        """What the update took is not what the next batch takes."""
        if self.device.type == "cuda":
            self._peak = self.peak
            torch.cuda.reset_peak_memory_stats(self.device)

    def _smaller(self, reason: str) -> Batch:
        raise torch.OutOfMemoryError(reason)

    def fits(self, limit_mib: float) -> Answer:
        """Whether it comes to its end with so much memory."""
        try:
            with limit(self.device, limit_mib):
                self.prepare()
                with self.loader:
                    if self._verifies:
                        self._train()
                    if self.milestones.suite is not None:
                        self.milestones.suite.fill(self.learner.adapter.model)
                    if self._writes:
                        self._write()
        except (*FAILURES, ImportError) as error:
            if not (is_out_of_memory(error) or any(text in str(error) for text in LIMIT_TEXTS)):
                raise
            return Answer(False, self.peak, self._batch, first_line(error))
        return Answer(True, self.peak, self._batch)

    def _write(self) -> None:
        """A checkpoint, and the model where the race keeps it: memory is needed to write either."""
        self._save(self.clock.train_seconds)
        asked = self.spec.evaluation
        if self.spec.save_model or (asked is not None and asked.keep_models):
            self.milestones.save_model(self.folder / "model", {})

    @property
    def peak(self) -> float:
        return max(self._peak, peak_mib(self.device))


def fullest(levels: Sequence[Levels]) -> list[Levels]:
    """Those at which most rows, positions and layers learn."""

    def learning(level: Levels) -> tuple[float, float, int]:
        return level.rows, level.tokens, sum(level.layers.active)

    most = max(map(learning, levels))
    return [level for level in levels if learning(level) == most]


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / MIB
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, mapped = (float(status[name].split()[0]) / 1024 for name in ("VmHWM", "RssFile"))
    return resident - mapped


def total_mib(device: torch.device) -> float:
    """Memory of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory / MIB


@contextmanager
def limit(device: torch.device, limit_mib: float) -> Iterator[None]:
    """Inside, this process may use so many MiB."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_mib / total_mib(device)))
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit_mib * MIB), before[1]))
    try:
        yield
    finally:
        # Saying that there was no memory takes memory.
        resource.setrlimit(resource.RLIMIT_DATA, before)


def ask(trial: Trial, limit_mib: float, verifies: bool, writes: bool) -> Answer:
    """The answer of a fresh process.

    Raises:
        RuntimeError: it failed for another reason than memory; with the end of what it said.
    """
    Path(trial.folder).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=trial.folder) as name:
        folder = Path(name)
        question, answer = folder / "question.json", folder / "answer.json"
        asked = Question(trial.placed(folder / "run", Path(trial.data_folder)), limit_mib, verifies, writes)
        question.write_text(json.dumps(asked.to_plain()))
        command = [sys.executable, "-m", "cggr_ray.fits", str(question), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not answer.is_file():
            raise RuntimeError(f"{trial.trial_id} ended with exit code {done.returncode}, and not for want of memory:\n"
                               + (done.stderr or done.stdout)[-LAST_CHARACTERS:])  # fmt: skip
        return Answer.from_plain(json.loads(answer.read_text()))


def main(question: str, answer: str) -> None:
    asked = Question.from_plain(json.loads(Path(question).read_text()))
    # What it imports comes before the limit: without it not even an answer could be given.
    run = SmallRun(asked.trial, asked.verifies, asked.writes)
    Path(answer).write_text(json.dumps(run.fits(asked.limit_mib).to_plain()))


if __name__ == "__main__":
    main(*sys.argv[1:])
