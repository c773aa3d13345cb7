"""What a trial needs and what there is: concurrency, cores and GPUs a trial. What cannot be placed is refused here."""

from __future__ import annotations

from dataclasses import dataclass

CPUS_BESIDE_A_GPU = 8


@dataclass(frozen=True)
class Placement:
    """Resources of one trial, and how many trials run side by side."""

    cpus: int
    gpus: int
    concurrent: int

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def place(device: str, cluster: dict[str, float]) -> Placement:
    """One trial a GPU, never two; on a machine without one, a single trial on all cores, so that it is timed alone.

    Args:
        cluster: `ray.cluster_resources()`.
    Raises:
        ValueError: a GPU is asked for and there is none, or there is no core to run on.
    """
    cpus, gpus = int(cluster.get("CPU", 0)), int(cluster.get("GPU", 0))
    if cpus < 1:
        raise ValueError(f"the cluster offers {cluster.get('CPU', 0):g} CPUs; accepted: at least 1")
    if device == "cuda" and gpus < 1:
        raise ValueError("device 'cuda', and the cluster offers no GPU; accepted: cpu, auto")
    if device == "cpu" or gpus < 1:
        return Placement(cpus=cpus, gpus=0, concurrent=1)
    return Placement(cpus=max(1, min(CPUS_BESIDE_A_GPU, cpus // gpus)), gpus=1, concurrent=gpus)
