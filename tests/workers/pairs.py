"""Trials of two workers: two processes that run one trial after the other, on the CPU or a GPU each."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file

from cggr_ray import checkpoint
from cggr_ray.learner import Learner, Pass
from cggr_ray.loop import Run, run_race
from cggr_ray.race import Trial
from cggr_ray.stopping import StoppedError
from cggr_ray.workers import ALONE, Group, Workers

HOST, PATIENCE = "127.0.0.1", timedelta(seconds=90)
# What a worker exits with that has lost the other; seconds for all trials together.
LOST, LONGEST = 3, 550


@dataclass(frozen=True)
class Job:
    """A trial, and what happens to it: memory runs out at a pass in the last worker; the first report after so many
    seconds ends all; worker 0 alone is asked to end after so many steps. `saved` is the trial's own."""

    trial: Trial
    scarce_at: int | None = None
    stops_after: float | None = None
    asked_after: int | None = None
    saved: bool = False


class ScarceOnce:
    """A pass whose n-th call finds no memory, when its work is done."""

    def __init__(self, at: int) -> None:
        self._call, self._left = Pass.__call__, at

    def __get__(self, instance: Any, owner: type) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            result = self._call(instance, *arguments, **keywords)
            self._left -= 1
            if self._left == 0:
                raise torch.OutOfMemoryError("no memory")
            return result

        return call


@contextmanager
def scarce(at: int | None) -> Iterator[None]:
    whole = Pass.__call__
    if at is not None:
        Pass.__call__ = ScarceOnce(at)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Pass.__call__ = whole  # type: ignore[method-assign]


def everything(learner: Learner) -> dict[str, torch.Tensor]:
    """Weights, state of the optimizer, and what the router has learned."""
    state = {f"optimizer.{key}": value for key, value in learner.optimizer.state_dict().items()}
    state |= {f"router.{key}": value for key, value in learner.router.tensors().items()}
    weights = {name: parameter.detach() for name, parameter in learner.named_parameters()}
    return {key: value.clone().contiguous() for key, value in (weights | state).items()}


def run(job: Job, workers: Workers = ALONE) -> dict[str, Any]:
    """The summary; leaves what the worker holds at the end in the trial's folder."""
    steps = count()

    def report(row: dict[str, Any]) -> None:
        if job.stops_after is not None and row["train_seconds"] > job.stops_after:
            saved = checkpoint.newest(Path(job.trial.folder))[0]
            raise StoppedError(f"{row['kind']} of step {row['step']} after {saved and saved.name}")

    def stop() -> bool:
        return workers.is_first and next(steps) == job.asked_after

    running = Run(job.trial, report, stop=stop, saved=job.saved, workers=workers)
    with scarce(job.scarce_at if workers.rank == workers.size - 1 else None):
        summary = running.complete()
    save_file(everything(running.learner), Path(job.trial.folder) / f"held-{workers.rank}.safetensors")
    return summary


def join(rank: int, port: int, device: torch.device) -> Workers:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore(HOST, port, is_master=False, timeout=PATIENCE)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=2, timeout=PATIENCE
    )
    torch.set_num_threads(1)
    return Group(device)


def run_jobs(rank: int, port: int, on_gpu: bool, jobs: list[Job], last: Trial) -> None:
    """Runs all jobs, then a trial in whose middle worker 1 is killed."""
    workers = join(rank, port, torch.device("cuda", rank) if on_gpu else torch.device("cpu"))
    for job in jobs:
        try:
            run(job, workers)
        except StoppedError as stopped:
            (Path(job.trial.folder) / f"stopped-{rank}").write_text(str(stopped))
            dist.barrier()

    def die(row: dict[str, Any]) -> None:
        if rank == 1 and row["train_seconds"] > last.race.budget_seconds / 2:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        run_race(last, die, workers=workers)
    except RuntimeError as error:
        (Path(last.folder) / "said").write_text(str(error))
        # The interpreter's own exit waits for gloo's threads.
        os._exit(LOST)


def together(jobs: list[Job], last: Trial, on_gpu: bool = False) -> None:
    """Two workers run jobs one after the other, until worker 1 dies in the middle of the last trial."""
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    arguments = [(rank, store.port, on_gpu, jobs, last) for rank in range(2)]
    both = [context.Process(target=run_jobs, args=of_rank, daemon=True) for of_rank in arguments]
    for process in both:
        process.start()
    for process in both:
        process.join(LONGEST)
    assert [process.exitcode for process in both] == [LOST, -signal.SIGKILL]
