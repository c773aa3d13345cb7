"""What a trial needs and what there is: concurrency, cores and GPUs a trial. What cannot be placed is refused here."""

from __future__ import annotations

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


def place(device: str, cluster: dict[str, float], workers: int = 1, gpus_per_trial: float = 1.0) -> Placement:
    """One worker a GPU; with `gpus_per_trial` below 1, as many trials on one as it has such parts. Without a GPU, one
    trial a machine, on all of its cores, so that it is timed alone; one trial alone if it has several workers. Machines
    are taken to be alike.

    Args:
        cluster: `ray.cluster_resources()`. workers: of a trial.
    Raises:
        ValueError: a GPU is asked for and there is none; there are fewer GPUs, or cores, than a trial has workers; or
            several workers would have a part of a GPU each.
    """
    cpus, gpus = int(cluster.get("CPU", 0)), int(cluster.get("GPU", 0))
    if cpus < 1:
        raise ValueError(f"the cluster offers {cluster.get('CPU', 0):g} CPUs; accepted: at least 1")
    if device == "cuda" and gpus < 1:
        raise ValueError("device 'cuda', and the cluster offers no GPU; accepted: cpu, auto")
    if workers > 1 and gpus_per_trial < 1:
        raise ValueError(f"workers = {workers} with {gpus_per_trial:g} of a GPU each; accepted: a whole GPU a worker")
    on_cpu = device == "cpu" or gpus < 1
    if workers > (cpus if on_cpu else gpus):
        raise ValueError(f"workers = {workers}, and the cluster offers {cpus} CPUs and {gpus} GPUs; accepted: at most "
                         f"one worker a {'CPU' if on_cpu else 'GPU'}")  # fmt: skip
    if on_cpu:
        machines = min(cpus, max(1, round(sum(n for name, n in cluster.items() if is_address(name)))))
        concurrent = machines if workers == 1 else 1
        return Placement(cpus // (concurrent * workers), 0, concurrent, workers)
    places = gpus * int(1 / gpus_per_trial)
    return Placement(max(1, min(CPUS_BESIDE_A_GPU, cpus // places)), gpus_per_trial, places // workers, workers)


def place_growing(gpus_per_trial: float, concurrent: int) -> Placement:
    """`concurrent` trials with a GPU each, or a part of one, on a cluster that starts machines for what waits."""
    cpus = max(1, int(CPUS_BESIDE_A_GPU * gpus_per_trial))
    return Placement(cpus, gpus_per_trial, concurrent)


def is_address(name: str) -> bool:
    """Whether a resource stands for a machine: there is one of it on each."""
    return name.startswith("node:") and name != "node:__internal_head__"
