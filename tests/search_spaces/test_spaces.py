"""Every draw of every space is a valid recipe of its family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from cggr_ray.models.presets import ModelSpec
from cggr_ray.optim.galore import GaLore
from cggr_ray.race import RaceSpec, Trial
from cggr_ray.routing.scores import HeadScore
from search_spaces import SPACES
from trainables.schedulers import Asha, Unstopped
from trainables.settings import Search, SweepSpec
from trainables.sweep import sweep_race, sweep_trial


def drawn(name: str, count: int, seed: int) -> Iterator[tuple[dict[str, Any], Trial]]:
    """Values and trials of a space at random."""
    random, space = np.random.default_rng(seed), SPACES[name]
    race = RaceSpec(recipes=(space.recipe,), model=ModelSpec(preset="smollm-135m"))
    spec = SweepSpec(name, space.recipe, space.domains(), race, Search())
    for number in range(count):
        values = {key: domain.sample(random) for key, domain in spec.domains.items()}
        yield values, sweep_trial(spec, spec.race, values, f"t{number:04d}", Path("sweep"))


@pytest.mark.parametrize("name", sorted(SPACES))
def test_every_draw_is_a_valid_trial_that_has_what_was_drawn(name: str) -> None:
    draws, recipes = set(), set()
    for values, trial in drawn(name, 200, 0):
        single = {key: value for key, value in values.items() if not isinstance(value, dict)}
        assert trial.recipe.with_values(single) == trial.recipe
        draws.add(repr(values))
        recipes.add(repr(trial.recipe))
    assert len(recipes) == len(draws) > 1


def test_the_cggr_space_reaches_every_setting_it_promises() -> None:
    draws = [trial.recipe.tokens for _, trial in drawn("cggr", 800, 1)]
    scores = {*get_args(HeadScore)}
    assert {t.score for t in draws} == scores
    assert {t.selection for t in draws} == {"topk", "stratified", "stratified_top", "sequence_aware", "importance"}
    assert {t.weights for t in draws} == {"mean", "inverse_probability"}
    assert {t.plan for t in draws} == {"dense", "after", "two_pass", "before"}
    assert {t.detach for t in draws} == {"const", "live"}
    routers = {type(t.router).__name__ for t in draws}
    assert routers == {"OwnScores", "TruncatedRouter", "TunedLens", "Probe", "StaleScores"}
    assert {t.num_strata for t in draws} == {2, 4, 8}
    assert {t.dynamic and t.dynamic.rule for t in draws} == {None, "corrected", "upstream"}
    assert {t.dynamic.sensitivity for t in draws if t.dynamic} == {0.25, 0.5, 1.0}
    assert min(t.keep for t in draws) >= 0.25 and max(t.keep for t in draws) <= 0.75


def test_the_e3_space_reaches_every_setting_it_promises() -> None:
    draws = [trial.recipe for _, trial in drawn("e3", 400, 2)]
    matrices = [d.optimizer.matrix for d in draws]
    assert {type(m).__name__ for m in matrices} == {"Muon", "GaLore"}
    assert {m.rank for m in matrices if isinstance(m, GaLore)} == {64, 128, 256}
    assert {m.refresh_every for m in matrices if isinstance(m, GaLore)} == {50, 200, 800}
    corrected = {(m.full_rank, d.optimizer.project_early) for m, d in zip(matrices, draws, strict=True)
                 if isinstance(m, GaLore)}  # fmt: skip
    assert corrected == {(0.0, True), (0.125, False)}
    assert {type(d.optimizer.rest.state).__name__ for d in draws} == {"Float32", "Int8Blockwise"}
    rates = [d.optimizer.rest.lr for d in draws]
    assert min(rates) < 5e-4 and max(rates) > 8e-3 and {m.lr for m in matrices} == {0.02}
    assert {type(getattr(d.objective, "form", None)).__name__ for d in draws} == {"NoneType", "Heads", "SharedLogits"}
    assert {d.tokens.mode for d in draws} == {"quantile", "upstream"}
    assert min(d.tokens.keep for d in draws) < 0.5 and max(d.tokens.keep for d in draws) > 0.8


def test_the_suffix_space_reaches_every_setting_it_promises() -> None:
    draws = [trial.recipe.updates for _, trial in drawn("suffix", 400, 3)]
    for draw in draws:
        reachable = draw.build(12, 0).reachable()
        assert reachable[0].probe and min(sum(learning.active) for learning in reachable) >= 1
    assert {d.relevance for d in draws} == {"gradient_norm", "saliency", "fisher", "decrease"}
    assert {d.levels for d in draws} == {2, 3, 4, 6, 8} and {d.hysteresis for d in draws} == {1, 2, 3}
    assert {d.smallest for d in draws} == {0.125, 0.25, 0.5} and {d.beta for d in draws} >= {0.0, 0.95}
    assert min(d.threshold for d in draws) < 0.55 and max(d.threshold for d in draws) > 0.9
    assert {d.cadence.shortest == d.cadence.longest for d in draws} == {True, False}
    assert {d.stability and d.stability.window for d in draws} == {None, 20, 50}
    assert {d.limits and d.limits.upper for d in draws} == {None, 1.01, 1.02, 1.05}
    assert min(d.full_until for d in draws) < 0.05 and max(d.full_until for d in draws) > 0.35
    assert {d.full_from for d in draws} == {0.8, 0.85, 0.9, 0.95, 1.0}


def test_a_sweep_validates_at_every_rung_of_successive_halving() -> None:
    race, domains = RaceSpec(recipes=("baseline",), milestones=(0.9,)), SPACES["baseline"].domains()
    rungs = {scheduler: sweep_race(SweepSpec("mine", "baseline", domains, race, Search(scheduler=scheduler))).milestones
             for scheduler in (Asha(), Asha(first_rung=0.3, reduction=3), Unstopped())}  # fmt: skip
    assert list(rungs.values()) == [(0.125, 0.25, 0.5), (0.3, pytest.approx(0.9)), (0.9,)]
