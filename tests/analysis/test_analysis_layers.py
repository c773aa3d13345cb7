"""Which layers learnt, against figures worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.frames import read_race
from analysis.layers import MODES, layer_measures, layer_rows, relevance_shares

Writer = Callable[..., Path]
RowMaker = Callable[..., dict[str, Any]]


def measures(folder: Path) -> dict[str, dict[Any, Any]]:
    return {row["trial_id"]: row for row in layer_measures(read_race(folder)).to_dict("records")}


def test_measures_of_a_run_by_hand(resting_race: Path) -> None:
    table = measures(resting_race)
    assert set(table) == {"suffix-0", "suffix-1", "static-0"}  # the baseline never rested
    run = table["suffix-0"]
    assert (run["recipe"], run["seed"], run["layers"]) == ("suffix", 0, 4)
    # Seconds of the ten steps: 1, .5, .5, .25, 1, .5, .75, .25, .75, .5; layers: 4, 4, 2, 2, 4, 3, 4, 2, 4, 4.
    assert run["mean_active"] == pytest.approx(
        (4 * (1 + 0.5 + 1 + 0.75 + 0.75 + 0.5) + 2 * (0.5 + 0.25 + 0.25) + 1.5) / 6
    )
    # Probes left out, 4 2 2 3 4 2 4 4.
    assert (run["probes"], run["switches"], run["steps_per_row"]) == (2, 5, 1.0)
    seconds = [run[f"seconds/{mode}"] for mode in ("start", "probes", "resting", "between", "end")]
    assert seconds == pytest.approx([0.5, 2.0, 1.5, 0.75, 1.25])


def test_a_row_speaks_for_the_steps_before_it(resting_race: Path) -> None:
    run = measures(resting_race)["suffix-1"]
    assert run["mean_active"] == pytest.approx((4 * 1 + 2 * 2 + 2 * 2) / 5)
    assert (run["probes"], run["switches"]) == (1, 0) and run["steps_per_row"] == pytest.approx(8 / 3)
    assert [run[f"seconds/{mode}"] for mode in MODES] == [0, 1, 4, 0, 0]


def test_a_probe_speaks_for_itself_alone(tmp_path: Path, run_writer: Writer, learning_row: RowMaker) -> None:
    rows = [learning_row(1, 1.0, 4), learning_row(2, 2.0, 2), learning_row(6, 6.0, 4, [1.0] * 4)]
    run_writer(tmp_path, "suffix", 0, [*rows, learning_row(8, 8.0, 2)])
    run = measures(tmp_path)["suffix-0"]
    # Of the four steps to the probe three rested: 1 s of four, 1 + 3 of two, 1 of four, 2 of two.
    assert run["mean_active"] == pytest.approx((4 + 8 + 4 + 4) / 8) and (run["probes"], run["switches"]) == (1, 1)
    assert [run[f"seconds/{mode}"] for mode in MODES] == pytest.approx([1, 1, 6, 0, 0])


def test_a_suffix_that_never_changes_only_rests(resting_race: Path) -> None:
    run = measures(resting_race)["static-0"]
    assert (run["mean_active"], run["layers"], run["probes"], run["switches"]) == (2, 4, 0, 0)
    assert [run[f"seconds/{mode}"] for mode in MODES] == [0, 0, 1.5, 0, 0]


def test_a_run_whose_probes_let_nothing_rest_is_shown(
    tmp_path: Path, run_writer: Writer, learning_row: RowMaker
) -> None:
    flat = [1.0] * 4
    rows = [learning_row(1, 1.0, 4, flat), learning_row(2, 1.5, 4), learning_row(3, 2.5, 4, flat)]
    run_writer(tmp_path, "suffix", 0, rows, {})
    run_writer(tmp_path, "suffix", 1, [learning_row(1, 2.0, 4, flat)], {})
    table = measures(tmp_path)
    assert [table[name]["mean_active"] for name in ("suffix-0", "suffix-1")] == [4, 4]
    assert [table[name]["probes"] for name in ("suffix-0", "suffix-1")] == [2, 1]
    assert all(run["switches"] == 0 for run in table.values())
    assert [[run[f"seconds/{mode}"] for mode in MODES] for run in table.values()] == [
        [0.5, 2, 0, 0, 0],
        [0, 2, 0, 0, 0],
    ]
    assert relevance_shares(read_race(tmp_path))["suffix-0"].to_numpy().tolist() == [[0.25] * 4] * 2


def test_a_model_says_how_many_layers_it_has(tmp_path: Path, run_writer: Writer, learning_row: RowMaker) -> None:
    run_writer(tmp_path, "static", 0, [learning_row(1, 1.0, 2)], {}, model={"name": "tiny", "layers": 4})
    run = measures(tmp_path)["static-0"]
    assert run["layers"] == 4 and run["seconds/resting"] == 1


def test_modes_follow_the_steps_and_not_the_lines(tmp_path: Path, run_writer: Writer, learning_row: RowMaker) -> None:
    """A resumed run goes on with its clock; rows of lost steps do not count."""
    rows = [learning_row(1, 1.0, 4), learning_row(2, 2.0, 2), learning_row(3, 9.0, 2), {"kind": "resumed", "step": 2}]
    run_writer(tmp_path, "suffix", 0, [*rows, learning_row(3, 4.0, 4), learning_row(4, 4.5, 4)])
    run = measures(tmp_path)["suffix-0"]
    assert [run[f"seconds/{mode}"] for mode in MODES] == [1, 0, 1, 0, 2.5] and run["switches"] == 2


def test_shares_of_relevance_add_up_to_one(resting_race: Path) -> None:
    shares = relevance_shares(read_race(resting_race))
    assert list(shares) == ["suffix-0"]  # the first seed, whatever the order of the folders
    own = shares["suffix-0"]
    assert own.index.tolist() == [1.0, 3.25]
    assert own.to_numpy().tolist() == [[0.25, 0.25, 0.25, 0.25], [0.0, 0.125, 0.25, 0.625]]


def test_probes_that_cannot_be_shared_out_are_left_out(
    tmp_path: Path, run_writer: Writer, learning_row: RowMaker
) -> None:
    found = ([1.0, None], [-2.0, 1.0], [0.0, 0.0], [-1.0, 3.0])
    probes = [learning_row(step, float(step), 2, relevance) for step, relevance in enumerate(found, 1)]
    run_writer(tmp_path, "suffix", 0, [*probes, learning_row(5, 5.0, 1)])
    own = relevance_shares(read_race(tmp_path))["suffix-0"]
    assert own.index.tolist() == [4.0] and own.to_numpy().tolist() == [[-0.5, 1.5]]
    run_writer(tmp_path / "none", "suffix", 0, [*probes[:3], learning_row(5, 5.0, 1)])
    assert relevance_shares(read_race(tmp_path / "none")) == {}


def test_a_race_of_before_has_no_resting_layers(pair_race: Path) -> None:
    race = read_race(pair_race)
    assert len(layer_rows(race)) == 0 and len(layer_measures(race)) == 0 and relevance_shares(race) == {}


def test_a_row_without_the_number_is_left_out(tmp_path: Path, run_writer: Writer, learning_row: RowMaker) -> None:
    old = {key: value for key, value in learning_row(2, 2.0, 4).items() if not key.startswith("updates/")}
    run_writer(tmp_path, "suffix", 0, [learning_row(1, 1.0, 4), old, learning_row(3, 4.0, 2)])
    run = measures(tmp_path)["suffix-0"]
    assert run["mean_active"] == pytest.approx((4 * 1 + 2 * 3) / 4)
