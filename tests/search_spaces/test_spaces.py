"""Every draw of every space is a valid recipe of its family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trainables  # noqa: F401 - settles Ray's settings before Ray is imported
from cggr_ray.optim.galore import GaLore
from cggr_ray.race import RaceSpec
from search_spaces import SPACES
from trainables.sweep import sweep_spec, sweep_trial


@pytest.mark.parametrize("name", sorted(SPACES))
def test_every_draw_is_a_valid_trial(name: str, tmp_path: Path) -> None:
    np.random.seed(0)
    space, spec, seen = SPACES[name], sweep_spec(RaceSpec()), set()
    for number in range(200):
        values = {key: domain.sample() for key, domain in space.domains().items()}
        trial = sweep_trial(spec, space.recipe, values, f"t{number}", tmp_path)
        rates = {"optimizer.matrix.lr": trial.recipe.optimizer.matrix.lr,
                 "optimizer.lr_scale": trial.recipe.optimizer.lr_scale}  # fmt: skip
        drawn = values.keys() & rates.keys()
        assert drawn and all(rates[key] == values[key] for key in drawn)
        seen.add(repr(trial.recipe))
    assert len(seen) == 200


def test_the_cggr_space_reaches_every_setting_it_promises(tmp_path: Path) -> None:
    np.random.seed(1)
    draws = []
    for number in range(800):
        values = {key: domain.sample() for key, domain in SPACES["cggr"].domains().items()}
        draws.append(sweep_trial(RaceSpec(), "cggr_loss", values, str(number), tmp_path).recipe.tokens)
    scores = {"entropy", "entropy_confidence", "margin", "loss", "combined", "gnorm", "surprise"}
    assert {t.score for t in draws} == scores
    assert {t.selection for t in draws} == {"topk", "stratified", "sequence_aware", "importance"}
    assert {t.weights for t in draws} == {"mean", "inverse_probability"}
    assert {t.plan for t in draws} == {"dense", "after", "two_pass", "before"}
    assert {t.detach for t in draws} == {"const", "live"}
    routers = {type(t.router).__name__ for t in draws}
    assert routers == {"OwnScores", "TruncatedRouter", "Probe", "StaleScores"}
    assert {t.num_strata for t in draws} == {2, 4, 8}
    assert {t.dynamic and t.dynamic.rule for t in draws} == {None, "corrected", "upstream"}
    assert {t.dynamic.sensitivity for t in draws if t.dynamic} == {0.25, 0.5, 1.0}
    assert min(t.keep for t in draws) >= 0.25 and max(t.keep for t in draws) <= 0.75


def test_the_e3_space_reaches_every_setting_it_promises(tmp_path: Path) -> None:
    np.random.seed(2)
    draws = []
    for number in range(400):
        values = {key: domain.sample() for key, domain in SPACES["e3"].domains().items()}
        draws.append(sweep_trial(RaceSpec(), "e3/full", values, str(number), tmp_path).recipe)
    matrices = [d.optimizer.matrix for d in draws]
    assert {type(m).__name__ for m in matrices} == {"Muon", "GaLore"}
    assert {m.rank for m in matrices if isinstance(m, GaLore)} == {64, 128, 256}
    assert {m.refresh_every for m in matrices if isinstance(m, GaLore)} == {50, 200, 800}
    corrected = {(m.full_rank, d.optimizer.project_early) for m, d in zip(matrices, draws, strict=True)
                 if isinstance(m, GaLore)}  # fmt: skip
    assert corrected == {(0.0, True), (0.125, False)}
    assert {type(d.optimizer.rest.state).__name__ for d in draws} == {"Float32", "Int8Blockwise"}
    assert {type(getattr(d.objective, "form", None)).__name__ for d in draws} == {"NoneType", "Heads", "SharedLogits"}
    assert {d.tokens.mode for d in draws} == {"quantile", "upstream"}
    assert min(d.tokens.keep for d in draws) < 0.5 and max(d.tokens.keep for d in draws) > 0.8


def test_the_suffix_space_reaches_every_setting_it_promises(tmp_path: Path) -> None:
    np.random.seed(3)
    draws = []
    for number in range(400):
        values = {key: domain.sample() for key, domain in SPACES["suffix"].domains().items()}
        draws.append(sweep_trial(RaceSpec(), "dynamic_suffix", values, str(number), tmp_path).recipe.updates)
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
    assert sweep_spec(RaceSpec(milestones=(0.9,))).milestones == (0.125, 0.25, 0.5)
