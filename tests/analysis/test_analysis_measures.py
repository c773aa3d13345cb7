"""Measures against figures worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from written_rows import step_row

from analysis.cautions import stability_words
from analysis.frames import read_race
from analysis.measures import (
    comparison,
    equal_tokens,
    ledger_check,
    loss_at_time,
    loss_at_tokens,
    order_check,
    run_measures,
    saturation,
    stability,
    time_to_loss,
)
from analysis.tables import stability_table

Writer = Callable[..., Path]
RowMaker = Callable[..., dict[str, Any]]
# The 97.5 % quantile of Student's t with one degree of freedom, tan(0.475 pi).
T_ONE = math.tan(0.475 * math.pi)


def milestones_of(*runs: list[tuple[float, float, float]]) -> pd.DataFrame:
    """A milestones frame; run i has seed i and rows (train seconds, tokens, loss)."""
    rows = [(f"t{seed}", "baseline", seed, *row) for seed, run in enumerate(runs) for row in run]
    return pd.DataFrame(rows, columns=["trial_id", "recipe", "seed", "train_seconds", "tokens_seen", "val/loss"])


def row_of(table: pd.DataFrame, recipe: str) -> dict[Any, Any]:
    (row,) = table[table["recipe"] == recipe].to_dict("records")
    return row


def test_losses_are_interpolated_within_a_run_and_nan_outside() -> None:
    frame = milestones_of([(0, 0, 5), (10, 100, 3), (30, 500, 2)], [(5, 50, 4), (25, 250, 1)])
    assert loss_at_time(frame, 5).tolist() == [4, 4]
    assert loss_at_time(frame, 20).tolist() == pytest.approx([2.5, 1.75])
    late = loss_at_time(frame, 30)
    assert late.xs("t0").tolist() == [2] and late.xs("t1").isna().all()
    assert loss_at_tokens(frame, 150).tolist() == pytest.approx([3 - 50 / 400, 2.5])
    assert loss_at_tokens(frame, 600).isna().all()
    assert loss_at_time(frame.sample(frac=1, random_state=0), 20).xs("t0").tolist() == [2.5]


def test_time_to_loss_is_the_first_crossing() -> None:
    dips = [(0, 0, 5), (10, 1, 3), (20, 2, 4), (30, 3, 1)]
    frame = milestones_of(dips, [(0, 0, 5), (10, 1, 4.5)], [(0, 0, 2), (10, 1, 1)])
    assert time_to_loss(frame, 3.5).tolist() == pytest.approx([7.5, math.nan, 0], nan_ok=True)
    assert time_to_loss(frame, 3).tolist()[0] == 10
    assert time_to_loss(frame, {0: 2.5, 2: 1.5}).tolist() == pytest.approx([25, math.nan, 5], nan_ok=True)


def test_an_unmeasured_milestone_is_skipped_in_interpolation() -> None:
    frame = milestones_of([(0, 0, 5), (10, 1, math.nan), (20, 2, 1)])
    assert loss_at_time(frame, 10).tolist() == [3] and time_to_loss(frame, 2).tolist() == [15]


def test_an_unknown_metric_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="'val/los'; accepted: val/loss"):
        loss_at_time(milestones_of([(0, 0, 5)]), 0, "val/los")


def test_comparison_of_two_seeds_by_hand(pair_race: Path) -> None:
    table = comparison(read_race(pair_race))
    assert table["recipe"].tolist() == ["baseline", "quick"]
    base, quick = row_of(table, "baseline"), row_of(table, "quick")
    assert (quick["seeds"], quick["runs"], quick["pairs"], quick["reached"]) == (2, 2, 2, 2)
    assert quick["final_loss"] == pytest.approx(1.7)
    assert quick["final_loss_half_width"] == pytest.approx(0.2 * T_ONE)
    # Differences are 1.5 - 2.0 and 1.9 - 2.2; paired, their spread is .1 and not that of the losses.
    assert quick["loss_difference"] == pytest.approx(-0.4)
    assert quick["loss_difference_half_width"] == pytest.approx(0.1 * T_ONE)
    # quick ends at 1000 tokens, where baseline has 3.0 and 3.2.
    assert base["loss_at_equal_tokens"] == pytest.approx(3.1)
    assert quick["loss_at_equal_tokens"] == pytest.approx(1.7)
    # 2.0 lies half way from 2.5 to 1.5: 15 s; 2.2 is met at 10 s; baselines take 20 s.
    assert quick["seconds_to_baseline_loss"] == pytest.approx(12.5)
    assert base["seconds_to_baseline_loss"] == 20 and base["loss_difference"] == 0
    assert (quick["tokens_seen"], quick["tokens_per_second"], quick["steps"]) == (1000, 50, 20)
    assert quick["peak_memory_mib"] == 512


def test_one_seed_has_no_interval(one_seed_race: Path) -> None:
    quick = row_of(comparison(read_race(one_seed_race)), "quick")
    assert quick["loss_difference"] == pytest.approx(-0.5) and math.isnan(quick["loss_difference_half_width"])


def test_runs_that_did_not_finish_are_counted_but_not_compared(
    pair_race: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    before = row_of(comparison(read_race(pair_race)), "quick")
    run_writer(pair_race, "quick", 2, [milestone_row(1, 1, 50, 99.0)], {"status": "diverged"})
    run_writer(pair_race, "quick", 3, [milestone_row(1, 1, 50, 0.1)])
    race = read_race(pair_race)
    quick = row_of(comparison(race), "quick")
    assert (quick["seeds"], quick["runs"]) == (2, 4) and equal_tokens(race) == 1000
    assert quick["final_loss"] == before["final_loss"]


def test_a_seed_without_a_baseline_is_left_out_of_pairs_only(
    pair_race: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    rows = [milestone_row(0, 0, 0, 4.0), milestone_row(20, 20, 1000, 1.1)]
    run_writer(pair_race, "quick", 7, rows, {})
    quick = row_of(comparison(read_race(pair_race)), "quick")
    assert (quick["seeds"], quick["pairs"]) == (3, 2)
    assert quick["final_loss"] == pytest.approx(1.5) and quick["loss_difference"] == pytest.approx(-0.4)


def test_a_loss_never_reached_leaves_no_mean_time(pair_race: Path, run_writer: Writer, milestone_row: RowMaker) -> None:
    for recipe, end in (("baseline", 1.0), ("quick", 3.0)):
        rows = [milestone_row(0, 0, 0, 4.0), milestone_row(20, 20, 1000, end)]
        run_writer(pair_race, recipe, 2, rows, {})
    quick = row_of(comparison(read_race(pair_race)), "quick")
    assert (quick["pairs"], quick["reached"]) == (3, 2)
    assert math.isnan(quick["seconds_to_baseline_loss"])


def test_a_baseline_that_rises_again_is_timed_at_its_own_first_crossing(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    rising = [milestone_row(0, 0, 0, 4.0), milestone_row(10, 10, 10, 1.0), milestone_row(20, 20, 20, 2.5)]
    steady = [milestone_row(0, 0, 0, 4.0), milestone_row(20, 20, 20, 1.0)]
    run_writer(tmp_path, "baseline", 0, rising, {})
    run_writer(tmp_path, "other", 0, steady, {})
    measured = run_measures(read_race(tmp_path)).set_index("recipe")
    assert measured.at["baseline", "seconds_to_baseline_loss"] == 5
    assert measured.at["other", "seconds_to_baseline_loss"] == 10


def test_two_runs_of_a_recipe_and_seed_are_refused(tmp_path: Path, run_writer: Writer, milestone_row: RowMaker) -> None:
    for name in ("a", "b"):
        run_writer(tmp_path / name, "baseline", 0, [milestone_row(20, 20, 20, 2.0)], {}, trial_id=name)
        (tmp_path / name / "runs" / "baseline-0" / "summary.json").write_text('{"status": "finished"}')
    with pytest.raises(ValueError, match=r"\['a', 'b'\]; accepted: one run a recipe and seed"):
        comparison(read_race(tmp_path))


def test_saturation_is_the_slope_of_the_last_quarter(pair_race: Path) -> None:
    quick = row_of(saturation(read_race(pair_race)), "quick")
    # At 15 of 20 s the interpolated losses are 2.0 and 2.05; 1.5 and 1.9 at the end.
    assert quick["change"] == pytest.approx(-(0.5 + 0.15) / 2)
    assert quick["change_half_width"] == pytest.approx(T_ONE * 0.175)
    assert quick["per_minute"] == pytest.approx(12 * quick["change"]) and quick["seeds"] == 2


def test_saturation_needs_a_milestone_before_the_last_quarter(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    run_writer(tmp_path, "baseline", 0, [milestone_row(20, 20, 20, 2.0)], {})
    assert math.isnan(row_of(saturation(read_race(tmp_path)), "baseline")["change"])


def test_stability_looks_for_gradients_far_beyond_the_usual_after_the_first_tenth(
    tmp_path: Path, run_writer: Writer
) -> None:
    norms = [900.0, 80.0, 1.0, 2.0, 3.0, None, 2.0, 21.0, 2.0, 19.0]
    rows = [step_row(n, fraction=n / 20, **{"train/grad_norm": norm}) for n, norm in enumerate(norms, 1)]
    run_writer(tmp_path, "wild", 0, rows, {"skipped_steps": 3})
    run_writer(tmp_path, "calm", 0, [step_row(9, fraction=0.5, **{"train/grad_norm": 0.5})], {"skipped_steps": 0})
    run_writer(tmp_path, "mute", 0, [], {})
    race = read_race(tmp_path)
    found = stability(race).set_index("trial_id")
    # Of 1, 2, 3, 2, 21, 2, 19: the median is 2, and one of seven is beyond 20.
    assert found.loc["wild-0", ["median", "largest", "far", "skipped_steps"]].tolist() == [2, 21, 1 / 7, 3]
    assert found.loc["calm-0", ["median", "largest", "far"]].tolist() == [0.5, 0.5, 0]
    assert found.loc["mute-0", ["median", "largest", "far"]].isna().all()
    words = stability_words(race)
    assert "wild-0 in 14 %" in words and "calm-0" not in words and "changed nothing: 3 of wild-0.**" in words
    calm = replace(race, runs=race.runs[race.runs["recipe"] == "calm"])
    assert stability_words(calm).startswith("No run logged gradient norms beyond 10 times")
    assert "21" in stability_table(race) and "10.5x" in stability_table(race)


def test_ledgers_are_held_against_the_wall_clock(pair_race: Path, run_writer: Writer) -> None:
    run_writer(pair_race, "quick", 2, [], {"wall_seconds": 50.0, "overrun_seconds": 1.0, "tokens_seen": 0})
    run_writer(pair_race, "quick", 3, [])
    checks = ledger_check(read_race(pair_race)).set_index("trial_id")
    assert "quick-3" not in checks.index and len(checks) == 5
    assert checks.at["quick-0", "ledger_seconds"] == 40 and checks.at["quick-0", "difference_percent"] == 0
    assert checks.at["quick-0", "overrun_steps"] == 0.5
    assert checks.at["quick-2", "difference_percent"] == pytest.approx(-20)
    assert checks.at["quick-2", "overrun_steps"] == 2


def test_a_missing_ledger_does_not_count_as_zero(tmp_path: Path, run_writer: Writer) -> None:
    run_writer(tmp_path, "baseline", 0, [], {"ledgers": {"train": 40.0}})
    assert math.isnan(ledger_check(read_race(tmp_path))["difference_percent"][0])


def test_order_is_compared_within_a_data_seed_at_shared_marks(pair_race: Path, run_writer: Writer) -> None:
    agreeing = order_check(read_race(pair_race)).set_index("trial_id")
    assert agreeing["agree"].tolist() == [True] * 4 and agreeing["marks_compared"].tolist() == [1] * 4

    run_writer(pair_race, "odd", 5, [], {"order": {"8": "a0", "16": "other"}}, data_seed=0)
    run_writer(pair_race, "alone", 6, [], {"order": {"8": "zz"}})
    checks = order_check(read_race(pair_race)).set_index("trial_id")
    assert checks.at["odd-5", "disagrees_with"] == ["baseline-0"] and checks.at["odd-5", "marks_compared"] == 2
    assert not checks.at["odd-5", "agree"] and not checks.at["baseline-0", "agree"]
    assert checks.at["quick-0", "agree"] and checks.at["baseline-1", "agree"]
    assert pd.isna(checks.at["alone-6", "agree"])


def test_a_race_without_a_finished_run_compares_nothing(tmp_path: Path, run_writer: Writer) -> None:
    run_writer(tmp_path, "baseline", 0, [])
    row = row_of(comparison(read_race(tmp_path)), "baseline")
    assert (row["seeds"], row["runs"]) == (0, 1) and math.isnan(row["final_loss"])
