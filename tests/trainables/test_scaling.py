"""Placement: what a trial gets, and what is refused before anything starts."""

import pytest

from trainables.scaling import Placement, place, place_growing


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
    assert place(device, [cluster]) == expected


@pytest.mark.parametrize(
    ("device", "cluster", "expected"),
    [
        ("auto", {"CPU": 2.0}, Placement(cpus=1, gpus=0, concurrent=1, workers=2)),
        ("cuda", {"CPU": 32.0, "GPU": 8.0}, Placement(cpus=4, gpus=1, concurrent=4, workers=2)),
        ("auto", {"CPU": 64.0, "GPU": 3.0}, Placement(cpus=8, gpus=1, concurrent=1, workers=2)),
    ],
)
def test_place_of_two_workers_a_trial(device: str, cluster: dict[str, float], expected: Placement) -> None:
    assert place(device, [cluster], workers=2) == expected


@pytest.mark.parametrize(("cluster", "of"), [({"CPU": 1.0}, "CPU"), ({"CPU": 8.0, "GPU": 1.0}, "GPU")])
def test_more_workers_than_there_is_room_for_are_refused(cluster: dict[str, float], of: str) -> None:
    with pytest.raises(ValueError, match=f"workers = 2, .* accepted: at most one worker a {of}"):
        place("auto", [cluster], workers=2)


@pytest.mark.parametrize(
    ("cluster", "share", "expected"),
    [
        ({"CPU": 16.0, "GPU": 2.0}, 0.5, Placement(cpus=4, gpus=0.5, concurrent=4)),
        ({"CPU": 16.0, "GPU": 1.0}, 0.3, Placement(cpus=5, gpus=0.3, concurrent=3)),
        ({"CPU": 2.0}, 0.5, Placement(cpus=2, gpus=0, concurrent=1)),
    ],
)
def test_trials_share_a_gpu_as_often_as_their_part_fits(
    cluster: dict[str, float], share: float, expected: Placement
) -> None:
    assert place("auto", [cluster], gpus_per_trial=share) == expected


def test_a_cluster_that_grows_is_not_asked_what_it_has() -> None:
    assert place_growing(1.0, 6) == Placement(cpus=8, gpus=1, concurrent=6)
    assert place_growing(0.25, 6) == Placement(cpus=2, gpus=0.25, concurrent=6)


def test_without_gpus_every_machine_runs_a_trial_on_all_its_cores() -> None:
    assert place("auto", [{"CPU": 4.0}] * 3) == Placement(cpus=4, gpus=0, concurrent=3)
    # A head without cores runs none.
    assert place("auto", [{}, {"CPU": 4.0}, {"CPU": 4.0}]) == Placement(cpus=4, gpus=0, concurrent=2)


def test_a_trial_asks_for_no_more_cores_than_a_machine_with_a_gpu_has() -> None:
    """Else it would wait forever: those of a head without a GPU are of no use to it."""
    small, large = {"CPU": 4.0, "GPU": 1.0}, {"CPU": 24.0, "GPU": 2.0}
    assert place("cuda", [{"CPU": 64.0}, *[small] * 4]) == Placement(cpus=4, gpus=1, concurrent=4)
    assert place("auto", [small, large]) == Placement(cpus=4, gpus=1, concurrent=3)
    assert place("auto", [{"CPU": 64.0}, large], gpus_per_trial=0.5) == Placement(cpus=6, gpus=0.5, concurrent=4)


def test_a_gpu_that_the_cluster_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="no GPU; accepted: cpu, auto"):
        place("cuda", [{"CPU": 2.0}])


def test_a_cluster_without_cores_is_refused() -> None:
    with pytest.raises(ValueError, match="0 CPUs; accepted: at least 1"):
        place("auto", [{}])
