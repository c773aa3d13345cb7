"""Search algorithms: pure functions of seed, number and what trials have shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search_spaces import SPACES
from search_spaces.domains import Choice, Domains, Integers, LogUniform, Uniform
from trainables.algorithms import AnyAlgorithm, Grid, Random, Tpe, TpeMemory, new_draw
from trainables.history import Drawn

DOMAINS: Domains = {
    "rate": LogUniform(1e-4, 1e-1),
    "keep": Uniform(0.0, 1.0),
    "part": Choice((None, {"kind": "a"}, {"kind": "b", "of": [1, 2]})),
    "size": Integers(2, 8),
}

RANDOM = Random()


def past(count: int, end: Any, algorithm: AnyAlgorithm = RANDOM) -> list[Drawn]:
    """Trials that ended as `end` of their values says."""
    found: list[Drawn] = []
    for number in range(count):
        values = json.loads(json.dumps(new_draw(algorithm, DOMAINS, found, 5)))
        found.append(Drawn(f"t{number:04d}", values, values, end=end(values)))
    return found


def finished(values: dict[str, Any]) -> dict[str, Any]:
    loss = (values["keep"] - 0.3) ** 2 + (np.log10(values["rate"]) + 2) ** 2
    return {"status": "finished", "val/loss": loss, "peak_memory_mib": 1000 * values["keep"]}


@pytest.mark.parametrize("algorithm", [Random(), Grid(4), Tpe(4), TpeMemory(4)])
def test_a_draw_follows_from_the_seed_and_the_past_alone(algorithm: AnyAlgorithm) -> None:
    trials = past(12, finished)
    first = new_draw(algorithm, DOMAINS, trials, 3)
    np.random.seed(0)
    assert new_draw(algorithm, DOMAINS, trials, 3) == first
    assert new_draw(algorithm, DOMAINS, trials, 4) != first
    assert new_draw(algorithm, DOMAINS, trials[:-1], 3) != first


def test_a_grid_is_every_combination_once() -> None:
    values = [trial.drawn for trial in past(3 * 3 * 3 * 3, lambda values: None, Grid(3))]
    assert len({json.dumps(v, sort_keys=True) for v in values}) == 81
    assert sorted({v["rate"] for v in values}) == pytest.approx([1e-4, np.sqrt(1e-5), 1e-1])
    assert {v["size"] for v in values} == {2, 5, 8} and {v["keep"] for v in values} == {0.0, 0.5, 1.0}
    assert new_draw(Grid(3), DOMAINS, [Drawn("t0", v, v) for v in values], 5) is None


@pytest.mark.parametrize("seed", range(4))
def test_a_larger_grid_ends_with_its_last_combination_too(seed: int) -> None:
    """Its order must not depend on how many were drawn: a repeated one would look like the end."""
    domains: Domains = {"rate": LogUniform(1e-4, 1e-1), "keep": Uniform(0.0, 1.0)}
    found: list[Drawn] = []
    while (values := new_draw(Grid(10), domains, found, seed)) is not None:
        found.append(Drawn(f"t{len(found):04d}", values, values))
    assert len({(trial.drawn["rate"], trial.drawn["keep"]) for trial in found}) == len(found) == 100


def test_tpe_finds_the_valley_that_random_draws_miss() -> None:
    trials = past(40, finished, Tpe(8))
    losses = [trial.end["val/loss"] for trial in trials if trial.end]
    assert np.median(losses[25:]) < 0.3 * np.median(losses[:8])


def test_tpe_keeps_away_from_where_memory_ran_out() -> None:
    """Memory suffices in the lowest third alone, where all losses are equal: nothing else leads there."""

    def scarce(values: dict[str, Any]) -> dict[str, Any]:
        fits = values["keep"] < 1 / 3
        return {
            "status": "finished" if fits else "out_of_memory",
            "val/loss": 1.0 if fits else None,
            "peak_memory_mib": 1e5 * values["keep"],
        }

    for algorithm in (Tpe(8), TpeMemory(8)):
        late = [trial.drawn["keep"] < 1 / 3 for trial in past(60, scarce, algorithm)[30:]]
        assert np.mean(late) > 0.6


def test_tpe_reads_a_stopped_trial_by_how_far_it_came() -> None:
    """Trials with a small `keep` come to the second validation, others to the first, all with the same loss."""

    def stopped(values: dict[str, Any]) -> dict[str, Any]:
        return {"status": "stopped", "val/loss": 1.0, "peak_memory_mib": None}

    trials = past(20, stopped)
    for trial in trials:
        trial.results = [{"val/loss": 1.0}] * (2 if trial.drawn["keep"] < 0.4 else 1)
    draws = [Tpe(4).draw(DOMAINS, trials, seed, 0) for seed in range(40)]
    assert np.mean([draw["keep"] < 0.4 for draw in draws if draw]) > 0.6


def test_an_end_of_any_kind_can_be_told_with_two_objectives() -> None:
    kinds = ["finished", "stopped", "diverged", "out_of_memory", "failed", "cut", None]
    trials = past(14, finished)
    for number, trial in enumerate(trials):
        status = kinds[number % len(kinds)]
        trial.end = {**finished(trial.drawn), "status": status} if status else None
        trial.results = [{"val/loss": 1.0}]
    for algorithm in (Tpe(2), TpeMemory(2)):
        assert new_draw(algorithm, DOMAINS, trials, 0) is not None


@pytest.mark.parametrize("name", sorted(SPACES))
def test_every_shipped_space_can_be_searched_by_every_algorithm(name: str, tmp_path: Path) -> None:
    domains = SPACES[name].domains()
    for algorithm in (Random(), Grid(2), Tpe(1), TpeMemory(1)):
        trials: list[Drawn] = []
        for number in range(4):
            values = json.loads(json.dumps(new_draw(algorithm, domains, trials, 0)))
            end = {"status": "finished", "val/loss": float(number), "peak_memory_mib": 1.0}
            trials.append(Drawn(f"t{number}", values, values, end=end))
        assert all(domain.decode(domain.encode(trials[0].drawn[key])) == trials[0].drawn[key]
                   for key, domain in domains.items())  # fmt: skip
