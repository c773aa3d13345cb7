"""Verdicts: words and sides by hand, claims that are withdrawn, and how often a race of equals claims one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulated import simulated_race
from written_rows import edit_summary

from analysis.frames import Race, read_race
from analysis.judging import LOSS, SPEED, TIME, Quantity, claims, controls_of, differences, judge
from analysis.stats import SIGNS, STUDENT, detectable

Writer = Callable[..., Path]
RowMaker = Callable[..., dict[str, Any]]


def row_of(table: pd.DataFrame, recipe: str, quantity: Quantity) -> dict[Any, Any]:
    (row,) = table[(table["recipe"] == recipe) & (table["quantity"] == quantity.name)].to_dict("records")
    return row


def one(quantity: Quantity, *sample: float) -> dict[Any, Any]:
    """The verdict on a sample that is alone in its race."""
    return row_of(judge({("arm", quantity): np.array(sample)}), "arm", quantity)


def test_the_level_is_shared_out_among_what_can_be_tested() -> None:
    sample, two = np.array([-0.5, -0.6, -0.3]), np.array([0.1, 0.4])
    idle = {"broken": np.array([0.1, math.nan]), "lone": np.array([0.2]), "none": np.array([])}
    table = judge({("arm", LOSS): sample, ("other", LOSS): two} | {(name, LOSS): own for name, own in idle.items()})
    for name, own in (("arm", sample), ("other", two)):
        assert row_of(table, name, LOSS)["detectable"] == pytest.approx(detectable(own, 0.05 / 2))
    assert one(LOSS, *sample)["detectable"] == pytest.approx(detectable(sample, 0.05))


def test_words_of_a_lone_comparison() -> None:
    assert one(LOSS, -0.5, -0.51, -0.49)["verdict"] == "better" and one(LOSS, 0.5, 0.51, 0.49)["verdict"] == "worse"
    assert one(SPEED, 0.5, 0.51, 0.49)["verdict"] == "faster" and one(SPEED, -0.5, -0.51, -0.49)["verdict"] == "slower"
    assert one(LOSS, -0.5, 0.5, 0.2)["verdict"] == "no difference that 3 seeds could show"
    assert one(LOSS, 0.1)["verdict"] == "one seed: no verdict" and one(LOSS)["verdict"] == "no pair: no verdict"
    assert one(LOSS, 0.1, math.nan)["verdict"] == "not a number in some pair: no verdict"


def test_a_difference_that_the_correction_takes_away_is_said_to_be_one_alone() -> None:
    weak, strong = np.array([0.5, 0.6, 0.9]), np.array([-1.0, 0.5, 0.7])
    p = stats.ttest_1samp(weak, 0).pvalue
    assert 0.0125 < p < 0.05
    table = judge({(f"arm{i}", LOSS): weak if i == 0 else strong for i in range(4)})
    row = row_of(table, "arm0", LOSS)
    assert row["p"] == pytest.approx(p) and row["p_holm"] == pytest.approx(4 * p) and row["side"] == 0
    assert row["verdict"].startswith("no difference that 3 seeds could show (by itself")
    assert row_of(judge({("arm0", LOSS): weak}), "arm0", LOSS)["verdict"] == "worse"


def test_what_is_no_difference_alone_is_not_said_to_be_one() -> None:
    """Of 64 ways to give signs four are as far from 0, though Student's interval leaves 0 out."""
    sample = -np.array([1.0, 1.1, 0.9, 1.2, 0.8, -0.01])
    assert stats.ttest_1samp(sample, 0).pvalue < 0.05
    row = one(LOSS, *sample)
    assert row["p"] == 4 / 64 and row["verdict"] == "no difference that 6 seeds could show"


def test_ratios_are_shown_as_factors() -> None:
    sample = np.log([0.95, 0.96, 0.94])
    row = one(SPEED, *sample)
    low, high = stats.ttest_1samp(sample, 0).confidence_interval(0.95)
    assert row["difference"] == pytest.approx(stats.gmean([0.95, 0.96, 0.94]))
    assert (row["low"], row["high"]) == pytest.approx((math.exp(low), math.exp(high)))
    assert row["detectable"] == pytest.approx(math.exp(np.std(sample, ddof=1) * 5.6535 / math.sqrt(3)) - 1, rel=1e-3)


def test_a_speed_up_is_claimed_only_with_the_final_loss() -> None:
    clear, open_ = np.array([0.5, 0.51, 0.49]), np.array([0.1, -0.1, 0.2])
    both = judge({("arm", LOSS): -clear, ("arm", TIME): clear})
    assert row_of(both, "arm", TIME)["verdict"] == "faster"
    gated = judge({("arm", LOSS): -open_, ("arm", TIME): clear})
    assert row_of(gated, "arm", TIME)["side"] == 0
    assert row_of(gated, "arm", TIME)["p_holm"] == row_of(gated, "arm", LOSS)["p_holm"]


@pytest.mark.parametrize("losses", [[0.5, 0.51, 0.49], [-0.5, math.nan, -0.49]])
def test_a_speed_up_needs_a_final_loss_on_its_own_side(losses: list[float]) -> None:
    faster = np.array([0.5, 0.51, 0.49])
    for sign in (1, -1):
        table = judge({("arm", LOSS): sign * np.array(losses), ("arm", TIME): sign * faster})
        row = row_of(table, "arm", TIME)
        assert row["side"] == 0 and row["p_holm"] == 1 and row["p"] < 0.05


def test_many_pairs_of_one_arm_are_tested_by_their_signs() -> None:
    rng = np.random.default_rng(1)
    assert set(claims(simulated_race(rng, seeds=5, arms=2))["test"]) == {STUDENT}
    assert set(claims(simulated_race(rng, seeds=8, arms=2))["test"]) == {SIGNS}


def test_differences_are_those_of_pairs(pair_race: Path) -> None:
    found = differences(read_race(pair_race))
    assert found["quick", LOSS] == pytest.approx([1.5 - 2.0, 1.9 - 2.2])
    assert found["quick", SPEED] == pytest.approx([math.log(0.5)] * 2)
    # Common loss: 2.2, the highest of the four finals. Baselines meet it at 18 and 20 s, quick at 13 and 10 s.
    assert found["quick", TIME] == pytest.approx([math.log(18 / 13), math.log(20 / 10)])


@pytest.fixture
def better_race(tmp_path: Path, run_writer: Writer, milestone_row: RowMaker) -> Path:
    """Three seeds in which `arm` ends 0.5 lower than the baseline, and a control `chance` as low as `arm`."""
    parts = {"rows": {"kind": "all_rows"}, "tokens": {"kind": "all_tokens"}, "updates": {"kind": "full_update"}}
    tokens = {"baseline": "all_tokens", "arm": "selected_tokens", "chance": "random_tokens"}
    for seed in range(3):
        for recipe, end in (("baseline", 2.0), ("arm", 1.5 + seed / 100), ("chance", 1.5 - seed / 50)):
            rows = [milestone_row(0, 0, 0, 9.0), milestone_row(20, 20, 20, end)]
            described = {"parts": parts | {"tokens": {"kind": tokens[recipe]}}, "device": {"name": "Test GPU"}}
            run_writer(tmp_path, recipe, seed, rows, {"order": {"8": f"a{seed}"}}, **described)
    return tmp_path


def test_a_win_names_the_controls_that_it_does_not_beat(better_race: Path) -> None:
    race = read_race(better_race)
    assert controls_of(race, "arm") == ["chance"] and controls_of(race, "chance") == []
    row = row_of(claims(race), "arm", LOSS)
    assert row["verdict"] == "better; not shown to beat the control chance" and row["supported"]
    assert row_of(claims(race), "chance", LOSS)["verdict"] == "better"


@pytest.mark.parametrize(
    ("control", "words"), [(-0.5, "better; not shown to beat the control chance"), (0.5, "better")]
)
def test_a_control_is_beaten_only_from_the_better_side(control: float, words: str, better_race: Path) -> None:
    race = read_race(better_race)
    own = race.milestones["recipe"] == "chance"
    at_the_end = own & (race.milestones["step"] == 20)
    spread = race.milestones["seed"] / 100
    losses = race.milestones["val/loss"].mask(at_the_end, 1.5 + control + spread**2)
    row = row_of(claims(replace(race, milestones=race.milestones.assign(**{"val/loss": losses}))), "arm", LOSS)
    assert row["verdict"] == words


def test_controls_are_named_by_what_was_won(tmp_path: Path, run_writer: Writer, milestone_row: RowMaker) -> None:
    """`arm` ends lower than the control `chance`, but comes later to the loss that both reach; `worse` ends higher."""
    parts = {"rows": {"kind": "all_rows"}, "updates": {"kind": "full_update"}}
    kinds = {"baseline": "all_tokens", "arm": "selected_tokens", "worse": "selected_tokens", "chance": "random_tokens"}
    curves = {"baseline": (5.5, 2.0), "arm": (5.0, 1.5), "worse": (6.0, 2.5), "chance": (1.9, 1.9)}
    for seed in range(3):
        for recipe, (half, end) in curves.items():
            spread = (seed if recipe == "arm" else -seed) / 100
            rows = [
                milestone_row(0, 0, 0, 9.0),
                milestone_row(10, 10, 10, half),
                milestone_row(20, 20, 20, end + spread),
            ]
            tokens = round(1e6 * (1.2 if recipe in ("arm", "worse") else 1.0) * (1 + seed * spread / 10))
            described = {"parts": parts | {"tokens": {"kind": kinds[recipe]}}, "device": {"name": "Test GPU"}}
            run_writer(tmp_path, recipe, seed, rows, {"order": {"8": f"a{seed}"}, "tokens_seen": tokens}, **described)
    table = claims(read_race(tmp_path))
    assert row_of(table, "arm", LOSS)["verdict"] == "better" and row_of(table, "arm", SPEED)["verdict"] == "faster"
    assert row_of(table, "arm", TIME)["verdict"] == "faster; not shown to beat the control chance"
    assert row_of(table, "worse", LOSS)["verdict"] == "worse" and row_of(table, "worse", SPEED)["verdict"] == "faster"


def test_fewer_rows_control_every_method_and_chance_its_own_part(better_race: Path, run_writer: Writer) -> None:
    parts = {"rows": {"kind": "fewer_rows"}, "tokens": {"kind": "all_tokens"}, "updates": {"kind": "full_update"}}
    run_writer(better_race, "less", 0, [], {}, parts=parts)
    suffix = {"rows": {"kind": "all_rows"}, "tokens": {"kind": "all_tokens"}, "updates": {"kind": "static_suffix"}}
    run_writer(better_race, "suffix", 0, [], {}, parts=suffix)
    race = read_race(better_race)
    assert controls_of(race, "arm") == ["chance", "less"] and controls_of(race, "suffix") == ["less"]
    assert controls_of(race, "baseline") == [] and controls_of(race, "less") == []


def test_a_control_whose_first_run_could_not_say_what_it_was_is_one(better_race: Path) -> None:
    folder = better_race / "runs" / "chance-0"
    for file in ("run.json", "summary.json", "metrics.jsonl"):
        (folder / file).unlink()
    failure = {"trial_id": "chance-0", "recipe": "chance", "seed": 0, "message": "out of memory"}
    (folder / "failure.json").write_text(json.dumps(failure))
    race = read_race(better_race)
    assert controls_of(race, "arm") == ["chance"]
    assert row_of(claims(race), "arm", LOSS)["verdict"] == "better; not shown to beat the control chance"


def test_a_win_without_the_runs_that_diverged_is_not_supported(better_race: Path, run_writer: Writer) -> None:
    run_writer(better_race, "arm", 3, [], {"status": "diverged", "tokens_seen": 0})
    row = row_of(claims(read_race(better_race)), "arm", LOSS)
    assert "not supported: 1 run diverged of arm, left out" in row["verdict"] and not row["supported"]
    run_writer(better_race, "chance", 3, [])
    assert row_of(claims(read_race(better_race)), "chance", LOSS)["supported"]  # unfinished is not yet an ending


def test_a_run_that_failed_for_good_speaks_against_a_win_even_if_it_could_not_say_what_it_was(
    better_race: Path, run_writer: Writer
) -> None:
    assert row_of(claims(read_race(better_race)), "arm", LOSS)["supported"]
    folder = run_writer(better_race, "arm", 3, [])
    failure = {"trial_id": "arm-3", "recipe": "arm", "seed": 3, "message": "out of memory"}
    (folder / "failure.json").write_text(json.dumps(failure))
    for file in ("metrics.jsonl", "run.json"):
        row = row_of(claims(read_race(better_race)), "arm", LOSS)
        assert "not supported: 1 run failed of arm, left out" in row["verdict"] and not row["supported"]
        (folder / file).unlink()
    assert row_of(claims(read_race(better_race)), "arm", LOSS)["verdict"] == row["verdict"]


def test_a_claim_against_an_arm_does_not_hold_without_the_baseline_s_lost_runs(
    better_race: Path, run_writer: Writer
) -> None:
    race = read_race(better_race)
    turned = {**race.spec, "baseline": "arm"}
    assert row_of(claims(replace(race, spec=turned)), "baseline", LOSS)["supported"]
    run_writer(better_race, "arm", 3, [], {"status": "failed", "tokens_seen": 0})
    row = row_of(claims(replace(read_race(better_race), spec=turned)), "baseline", LOSS)
    assert row["verdict"] == "worse, not supported: 1 run failed of arm, left out" and not row["supported"]


def changed(race: Race, **columns: list[Any]) -> Race:
    return replace(race, runs=race.runs.assign(**columns))


def test_a_difference_between_other_rows_or_devices_is_not_supported(better_race: Path) -> None:
    race = read_race(better_race)
    other = [{"8": "zz"} if trial == "arm-1" else order for trial, order in race.runs[["trial_id", "order"]].to_numpy()]
    table = claims(changed(race, order=other))
    assert "not supported: the runs of a pair read other rows" in row_of(table, "arm", LOSS)["verdict"]
    assert row_of(table, "chance", LOSS)["supported"]
    devices = {"device/name": ["Test GPU", "Another"] * 4 + ["Test GPU"]}
    assert "had other devices" in row_of(claims(changed(race, **devices)), "arm", LOSS)["verdict"]


def test_runs_of_other_budgets_support_no_claim(better_race: Path) -> None:
    """Two races in one folder: an arm with twice the time ends lower, and that says nothing."""
    for folder in better_race.glob("runs/arm-*"):
        edit_summary(better_race, folder.name, budget_seconds=40.0, train_seconds=40.0)
    table = claims(read_race(better_race))
    row = row_of(table, "arm", LOSS)
    assert "not supported: the runs of a pair had other budgets" in row["verdict"] and not row["supported"]
    assert row_of(table, "chance", LOSS)["supported"]


def test_a_run_that_has_not_ended_is_in_no_pair(better_race: Path, run_writer: Writer, milestone_row: RowMaker) -> None:
    run_writer(better_race, "baseline", 3, [], device={"name": "Another"}, gpus_per_trial=0.5)
    run_writer(better_race, "arm", 3, [milestone_row(20, 20, 20, 1.5)], {}, device={"name": "Test GPU"})
    row = row_of(claims(read_race(better_race)), "arm", LOSS)
    assert row["pairs"] == 3 and row["supported"] and "pair" not in row["verdict"]


def test_runs_that_shared_a_gpu_support_no_claim(better_race: Path) -> None:
    assert row_of(claims(read_race(better_race)), "arm", LOSS)["supported"]
    file = better_race / "runs" / "arm-0" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"gpus_per_trial": 0.5}))
    table = claims(read_race(better_race))
    row = row_of(table, "arm", LOSS)
    assert "not supported: runs shared a GPU with others" in row["verdict"] and not row["supported"]
    assert row_of(table, "chance", LOSS)["supported"]


def test_races_without_a_difference_claim_one_in_at_most_seven_percent() -> None:
    rng = np.random.default_rng(0)
    races = [simulated_race(rng, seeds=3 + number % 5, arms=2 + number // 5 % 4) for number in range(500)]
    claimed = [bool(claims(race)["side"].any()) for race in races]
    assert 0.01 <= np.mean(claimed) <= 0.07


def test_a_planted_slowdown_of_five_percent_is_found() -> None:
    rng = np.random.default_rng(0)
    tables = [claims(simulated_race(rng, seeds=5, arms=3, slower=0.05)) for _ in range(20)]
    found = [row_of(table, "arm2", SPEED) for table in tables]
    assert all(row["verdict"] == "slower" and row["supported"] for row in found)
    assert np.mean([row["difference"] for row in found]) == pytest.approx(0.95, abs=0.005)
    assert np.mean([row["low"] <= 0.95 <= row["high"] for row in found]) >= 0.8
    assert sum(row_of(table, "arm2", LOSS)["side"] != 0 for table in tables) <= 2


def test_a_planted_difference_of_loss_is_found() -> None:
    rng = np.random.default_rng(0)
    tables = [claims(simulated_race(rng, seeds=5, arms=3, better=0.1)) for _ in range(20)]
    found = [row_of(table, "arm2", LOSS) for table in tables]
    assert all(row["verdict"] == "better" and row["supported"] for row in found)
    assert np.mean([row["difference"] for row in found]) == pytest.approx(-0.1, abs=0.01)
    assert np.mean([row_of(table, "arm2", TIME)["verdict"] == "faster" for table in tables]) >= 0.9
    assert sum(row_of(table, "arm1", quantity)["side"] != 0 for table in tables for quantity in (LOSS, SPEED)) <= 2


def test_a_race_that_set_its_seconds_is_judged_by_its_loss_alone() -> None:
    race = simulated_race(np.random.default_rng(3), seeds=3, arms=2)
    assert set(claims(race)["quantity"]) == {LOSS.name, SPEED.name, TIME.name}
    stepped = replace(race, spec={**race.spec, "spec": {**race.spec["spec"], "step_seconds": 0.1}})
    last = race.milestones[race.milestones["fraction"] == 1.0].pivot(index="seed", columns="recipe", values="val/loss")
    (row,) = claims(stepped).to_dict("records")
    assert row["quantity"] == LOSS.name
    assert row["p_holm"] == pytest.approx(stats.ttest_rel(last["arm1"], last["baseline"]).pvalue)
