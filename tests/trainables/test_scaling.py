"""Placement: what a trial gets, and what is refused before anything starts."""

import pytest

from trainables.scaling import Placement, place


@pytest.mark.parametrize(
    ("device", "cluster", "expected"),
    [
        ("auto", {"CPU": 2.0}, Placement(cpus=2, gpus=0, concurrent=1)),
        ("auto", {"CPU": 16.0, "GPU": 1.0}, Placement(cpus=8, gpus=1, concurrent=1)),
        ("cuda", {"CPU": 32.0, "GPU": 8.0}, Placement(cpus=4, gpus=1, concurrent=8)),
        ("auto", {"CPU": 2.0, "GPU": 4.0}, Placement(cpus=1, gpus=1, concurrent=4)),
        ("cpu", {"CPU": 16.0, "GPU": 1.0}, Placement(cpus=16, gpus=0, concurrent=1)),
    ],
)
def test_place(device: str, cluster: dict[str, float], expected: Placement) -> None:
    assert place(device, cluster) == expected


def test_a_gpu_that_the_cluster_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="no GPU; accepted: cpu, auto"):
        place("cuda", {"CPU": 2.0})


def test_a_cluster_without_cores_is_refused() -> None:
    with pytest.raises(ValueError, match="0 CPUs; accepted: at least 1"):
        place("auto", {})
