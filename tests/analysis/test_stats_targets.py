"""Times to losses, their price in tokens, and profiles, on curves whose crossings are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.findings import efficiency_table, targets_table, verdict_table
from analysis.frames import read_race
from analysis.judging import LOSS, TIME, claims
from analysis.report import verdicts
from analysis.targets import (
    LARGEST_TAU,
    bound_of,
    common_loss,
    curves,
    efficiency,
    geometric_interval,
    performance_profile,
    profile_area,
    profile_ratios,
    speed_ups,
    target_losses,
    target_times,
)

Writer = Callable[..., Path]
RowMaker = Callable[..., dict[str, Any]]


def row_of(table: pd.DataFrame, **where: Any) -> dict[Any, Any]:
    for name, value in where.items():
        table = table[table[name] == value]
    (row,) = table.to_dict("records")
    return row


@pytest.fixture
def straight_race(tmp_path: Path, run_writer: Writer, milestone_row: RowMaker, logged_step: RowMaker) -> Path:
    """Losses fall from 4 in a straight line over 20 s: the baseline's to 2, `half`'s (slower) to 3, `quick`'s to 1.

    The baseline and `half` read 100 tokens a second, `quick` 200 of which it selects a quarter.
    """
    ends = {"baseline": (2.0, 100, 1.0), "half": (3.0, 100, 1.0), "quick": (1.0, 200, 0.25)}
    parts = {"quick": {"tokens": {"kind": "selected_tokens"}}}
    every = {"tokens": {"kind": "all_tokens"}}
    for seed in range(2):
        for recipe, (end, rate, kept) in ends.items():
            bend = 0.1 * seed * (recipe == "baseline")
            rows = [milestone_row(0, 0, 0, 4.0), milestone_row(20, 20, 20 * rate, end + bend)]
            rows += [
                logged_step(n, train_seconds=n, tokens_seen=n * rate, **{"router/kept_fraction": kept})
                for n in range(1, 21)
            ]
            run_writer(tmp_path, recipe, seed, rows, {"tokens_seen": 20 * rate}, parts=parts.get(recipe, every))
    (tmp_path / "race.json").write_text(json.dumps({"baseline": "baseline"}))
    return tmp_path


@pytest.fixture
def late_race(tmp_path: Path, run_writer: Writer, milestone_row: RowMaker) -> Path:
    """Nobody was asked before 5 s. By then the baseline is at 3; `slow` is there at 15 s, `soon` past its end."""
    ends = {"baseline": (3.0, 2.0), "slow": (5.0, 3.0), "soon": (1.5, 1.0)}
    for seed in range(3):
        for recipe, (first, last) in ends.items():
            rows = [milestone_row(5, 5, 500, first), milestone_row(15, 15, 1500, last + seed / 1000)]
            run_writer(tmp_path, recipe, seed, rows, {"tokens_seen": 1500}, parts={"tokens": {"kind": "all_tokens"}})
    (tmp_path / "race.json").write_text(json.dumps({"baseline": "baseline"}))
    return tmp_path


def test_a_loss_met_by_the_first_milestone_bounds_the_speed_up(late_race: Path) -> None:
    """The baseline may have been at 3.002 at any time up to 5 s, so `slow` is at most a third as fast."""
    race = read_race(late_race)
    known = curves(race)
    assert [bound_of(known, name, "baseline") for name in ("slow", "soon")] == ["≤", "≥"]
    assert bound_of(known, "baseline", "slow") == "≥" and bound_of(known, "soon", "slow") == "≥"
    rows = {row["recipe"]: row for row in efficiency(race).to_dict("records")}
    assert rows["slow"]["bound"] == "≤" and rows["slow"]["speed_up"] == pytest.approx(1 / 3, rel=1e-3)
    lines = {line.split("|")[1].strip(): line for line in efficiency_table(race).splitlines()}
    assert lines["slow"].count("≤ 0.33") == 2 and "[" not in lines["slow"] and "≥ 2.99" in lines["soon"]
    judged = {row["recipe"]: row for row in claims(race).to_dict("records") if row["quantity"] == TIME.name}
    assert (judged["slow"]["verdict"], judged["slow"]["bound"], judged["slow"]["supported"]) == ("slower", "≤", True)
    shown = next(line for line in verdict_table(race).splitlines() if "speed-up" in line and "slow " in line)
    assert "≤ 0.33" in shown and "[" not in shown and "beyond" not in shown
    assert any("slower (≤ 0.33" in line for line in verdicts(race))


def test_a_bound_from_the_other_side_supports_nothing(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    """Losses rise: all were at the common one, 1.95, before anybody was asked, and who was there first is not known."""
    for seed in range(3):
        for recipe, (first, end, last) in {"baseline": (6, 1.9, 2.5), "arm": (4, 1.95, 1.96)}.items():
            rows = [milestone_row(5, first + seed / 100, 500, end), milestone_row(15, 15, 1500, last - seed / 1000)]
            run_writer(tmp_path, recipe, seed, rows, {"tokens_seen": 1500})
    (tmp_path / "race.json").write_text(json.dumps({"baseline": "baseline"}))
    race = read_race(tmp_path)
    row = row_of(claims(race), recipe="arm", quantity=TIME.name)
    assert row["side"] == 1 and row["bound"] == "?" and not row["supported"]
    assert row["verdict"] == "faster, not supported: a first milestone bounds it from the other side"
    assert row_of(claims(race), recipe="arm", quantity=LOSS.name)["supported"]


def test_the_common_loss_is_reached_by_both_in_every_pair(straight_race: Path) -> None:
    known = curves(read_race(straight_race))
    assert common_loss(known, "quick", "baseline") == 2.1 == common_loss(known, "baseline", "quick")
    assert common_loss(known, "half", "baseline") == 3.0
    # 2.1 at 12.67 s of quick; at 19 and 20 s of the baselines. 3.0 at 20 s of half; at 10 and 10.53 s of the baselines.
    quick = 1.9 / 3 * 20
    assert np.exp(speed_ups(known, "quick", "baseline")) == pytest.approx([19 / quick, 20 / quick])
    assert np.exp(speed_ups(known, "half", "baseline")) == pytest.approx([0.5, 1 / 1.9])
    assert speed_ups(known, "baseline", "quick") == pytest.approx(-speed_ups(known, "quick", "baseline"))


def test_speed_up_is_value_over_break_even(straight_race: Path) -> None:
    table = efficiency(read_race(straight_race))
    quick = row_of(table, recipe="quick")
    seconds = stats.gmean([19, 20]) / (1.9 / 3 * 20)
    assert quick["speed_up"] == pytest.approx(seconds) and quick["kept"] == pytest.approx(0.25)
    assert quick["tokens"] == pytest.approx(seconds / 2)  # it reads twice as fast
    assert quick["value"] == pytest.approx(4 * seconds / 2)  # and keeps a quarter of what it reads
    assert quick["break_even"] == pytest.approx(2.0)  # a kept token takes 1/50 s, the baseline's 1/100 s
    assert quick["speed_up"] == pytest.approx(quick["value"] / quick["break_even"])
    assert quick["speed_up_low"] < quick["speed_up"] < quick["speed_up_high"]
    against = row_of(efficiency(read_race(straight_race), "half"), recipe="baseline")
    assert against["speed_up"] == pytest.approx(1 / row_of(table, recipe="half")["speed_up"])


def test_the_table_of_values_shows_the_break_even_of_skipped_backwards(straight_race: Path) -> None:
    (line,) = [line for line in efficiency_table(read_race(straight_race)).splitlines() if "| quick" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[4] == "0.250" and cells[6].startswith("2.00x") and cells[7] == "2.00"


@pytest.mark.parametrize("kind", ["skipped_tokens", "depth_buckets", "all_tokens"])
def test_tokens_that_are_not_chosen_for_the_loss_have_no_value(straight_race: Path, kind: str) -> None:
    for path in straight_race.glob("runs/quick-*/run.json"):
        path.write_text(path.read_text().replace("selected_tokens", kind))
    race = read_race(straight_race)
    quick = row_of(efficiency(race), recipe="quick")
    assert all(math.isnan(quick[name]) for name in ("kept", "value", "break_even")) and quick["speed_up"] > 1
    head = efficiency_table(race).splitlines()[0]
    assert "token efficiency" in head and "kept" not in head and "break-even" not in head


def test_a_race_that_did_not_log_what_it_kept_has_no_value(pair_race: Path) -> None:
    quick = row_of(efficiency(read_race(pair_race)), recipe="quick")
    assert math.isnan(quick["value"]) and math.isnan(quick["kept"])
    assert quick["speed_up"] == pytest.approx(math.sqrt(18 / 13 * 20 / 10))


def test_geometric_interval_is_that_of_the_logarithms() -> None:
    ratios = np.array([1.1, 1.3, 0.9])
    low, high = stats.ttest_1samp(np.log(ratios), 0).confidence_interval(0.95)
    assert geometric_interval(ratios) == pytest.approx((stats.gmean(ratios), math.exp(low), math.exp(high)))
    assert all(math.isnan(value) for value in geometric_interval(np.array([1.0, math.nan])))


def test_every_baseline_run_reaches_every_target(straight_race: Path) -> None:
    race = read_race(straight_race)
    # The slower baseline falls by 0.095 a second.
    expected = [4 - 1.9 * part for part in (0.4, 0.55, 0.7, 0.85)]
    assert target_losses(race) == pytest.approx(expected)
    table = target_times(race)
    own = table[table["recipe"] == "baseline"]
    assert (own["reached"] == 2).all() and (own["speed_up"] == 1).all()
    first = row_of(table, recipe="quick", target=target_losses(race)[0])
    assert first["seconds"] == pytest.approx(0.76 / 3 * 20)
    assert first["speed_up"] == pytest.approx(math.sqrt(7.6 * 8) / first["seconds"]) and not first["bound"]


def test_a_target_that_was_not_reached_is_censored_and_said_so(straight_race: Path) -> None:
    race = read_race(straight_race)
    last = row_of(target_times(race), recipe="half", target=min(target_losses(race)))
    assert last["reached"] == 0 and last["bound"] == "≤" and math.isnan(last["seconds"])
    # The baselines need 85 % of 19 and 20 s; half needs more than its 20 s.
    assert last["speed_up"] == pytest.approx(0.85 * math.sqrt(19 * 20) / 20) and math.isnan(last["speed_up_low"])
    (line,) = [line for line in targets_table(race).splitlines() if "| half" in line]
    assert line.strip("| ").split("|")[-1].strip() == "0 of 2, ≤ 0.828x"


def test_a_target_met_by_the_first_milestone_is_a_bound(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    """Losses fall by 0.1 and 0.3 a second from 4, first measured at 5 s: the true speed-up to any target is 3."""
    for seed in range(3):
        for recipe, fall in (("baseline", 0.1), ("quick", 0.3)):
            rows = [milestone_row(at, at, 100 * at, 4 - fall * at + seed / 1000) for at in (5, 10, 20)]
            run_writer(tmp_path, recipe, seed, rows, {})
    race = read_race(tmp_path)
    table = target_times(race)
    # 3.202 after 8 s of the slowest baseline; `quick` was at 2.5 by 5 s.
    first = row_of(table, recipe="quick", target=target_losses(race)[0])
    assert first["bound"] == "≥" and first["speed_up"] == pytest.approx(8 / 5, rel=0.01) and first["speed_up"] < 3
    assert (first["seconds"], first["seconds_bound"]) == (5, "≤") and first["seconds"] > 0.8 / 0.3
    last = row_of(table, recipe="quick", target=target_losses(race)[-1])
    assert not last["bound"] and not last["seconds_bound"] and last["speed_up"] == pytest.approx(3, rel=0.01)
    assert last["speed_up_low"] < 3.01 and last["speed_up_high"] > 2.99
    (line,) = [line for line in targets_table(race).splitlines() if "| quick" in line]
    cells = [cell.strip() for cell in line.strip("| ").split("|")]
    assert cells[1].startswith("≤ 5.0; ≥ 1.5") and "[" not in cells[1] and "±" not in cells[1] and "[" in cells[-1]


def test_a_fraction_before_a_baseline_s_first_milestone_is_no_target(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    """At 8 s, 0.4 of the time, one run is at 3.2; the other, first measured a step later, never gets there."""
    for seed, (first, start) in enumerate(((8, 4.0), (9, 5.5))):
        rows = [milestone_row(at, at, 100 * at, start - at / 10) for at in (first, 20)]
        run_writer(tmp_path, "baseline", seed, rows, {})
    race = read_race(tmp_path)
    assert target_losses(race) == pytest.approx([5.5 - 2 * part for part in (0.55, 0.7, 0.85)])
    assert (target_times(race)["reached"] == 2).all()


def test_a_profile_against_a_count_by_hand() -> None:
    inf = math.inf
    times = np.array([[10.0, 20.0, inf, inf], [20.0, 10.0, 30.0, inf]])
    ratios = profile_ratios(times)
    assert ratios.tolist() == [[1, 2, inf, inf], [2, 1, 1, inf]]
    taus = np.linspace(1, LARGEST_TAU, 300_001)
    for own in ratios:
        share = np.mean([taus >= ratio for ratio in own], axis=0)
        assert profile_area(own) == pytest.approx(np.trapezoid(share, taus) / (LARGEST_TAU - 1), abs=1e-4)
    assert (
        profile_area(np.ones(3)) == 1 and profile_area(np.full(3, inf)) == 0 and math.isnan(profile_area(np.array([])))
    )


def test_a_diverged_run_reaches_nothing_and_an_unfinished_one_leaves_its_seed_out(
    straight_race: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    whole = performance_profile(read_race(straight_race)).set_index("recipe")
    assert whole.at["quick", "area"] == 1 and whole.at["quick", "problems"] == 8 and whole.at["half", 4.0] < 1
    for recipe in ("baseline", "half"):
        run_writer(straight_race, recipe, 2, [milestone_row(0, 0, 0, 4.0), milestone_row(20, 20, 2000, 2.0)], {})
    assert performance_profile(read_race(straight_race)).set_index("recipe").at["quick", "problems"] == 8
    run_writer(straight_race, "quick", 2, [milestone_row(0, 0, 0, 4.0)], {"status": "diverged"})
    worse = performance_profile(read_race(straight_race)).set_index("recipe")
    assert worse.at["quick", "problems"] == 12 and worse.at["quick", 4.0] == pytest.approx(2 / 3)
