"""What a trial needs and what there is: concurrency, cores and GPUs a trial. What cannot be placed is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CPUS_BESIDE_A_GPU = 8


@dataclass(frozen=True)
class Placement:
    """Resources of one worker, how many trials run side by side, and how many workers each of these has."""

    cpus: int
    gpus: float
    concurrent: int
    workers: int = 1

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def place(
    device: str, machines: Sequence[Mapping[str, float]], workers: int = 1, gpus_per_trial: float = 1.0
) -> Placement:
    """One worker a GPU; with `gpus_per_trial` below 1, as many trials on one as it has such parts. Its cores are those
    that every machine with a GPU has beside each. Without a GPU, one trial a machine, on all of its cores, so that it
    is timed alone; one trial alone if it has several workers. These machines are taken to be alike.

    Args:
        machines: the resources of each, as Ray names them. workers: of a trial.
    Raises:
        ValueError: a GPU is asked for and there is none; there are fewer GPUs, or cores, than a trial has workers; or
            several workers would have a part of a GPU each.
    """
    cpus, gpus = (int(sum(machine.get(name, 0) for machine in machines)) for name in ("CPU", "GPU"))
    if cpus < 1:
        raise ValueError(f"the cluster offers {cpus} CPUs; accepted: at least 1")
    if device == "cuda" and gpus < 1:
        raise ValueError("device 'cuda', and the cluster offers no GPU; accepted: cpu, auto")
    if workers > 1 and gpus_per_trial < 1:
        raise ValueError(f"workers = {workers} with {gpus_per_trial:g} of a GPU each; accepted: a whole GPU a worker")
    on_cpu = device == "cpu" or gpus < 1
    if workers > (cpus if on_cpu else gpus):
        raise ValueError(f"workers = {workers}, and the cluster offers {cpus} CPUs and {gpus} GPUs; accepted: at most "
                         f"one worker a {'CPU' if on_cpu else 'GPU'}")  # fmt: skip
    if on_cpu:
        concurrent = max(1, sum(machine.get("CPU", 0) >= 1 for machine in machines)) if workers == 1 else 1
        return Placement(cpus // (concurrent * workers), 0, concurrent, workers)
    parts = int(1 / gpus_per_trial)
    # Cores of a machine without a GPU are of no use, and no trial is placed where there are fewer than it asks for.
    beside = min(machine.get("CPU", 0) // (machine["GPU"] * parts) for machine in machines if machine.get("GPU"))
    return Placement(max(1, min(CPUS_BESIDE_A_GPU, int(beside))), gpus_per_trial, gpus * parts // workers, workers)


def place_growing(gpus_per_trial: float, concurrent: int) -> Placement:
    """`concurrent` trials with a GPU each, or a part of one, on a cluster that starts machines for what waits."""
    cpus = max(1, int(CPUS_BESIDE_A_GPU * gpus_per_trial))
    return Placement(cpus, gpus_per_trial, concurrent)
