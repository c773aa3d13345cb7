"""Losses and scores milestone by milestone, and the verdicts on scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from simulated import simulated_race

from analysis import write_report
from analysis.findings import milestones_table, score_table, tokens_table
from analysis.frames import read_race
from analysis.report import race_plots, render
from analysis.scores import at_marks, at_tokens, final_scores, score_claims, score_names, unequal_questions

Writer = Callable[..., Path]
RowMaker = Callable[..., dict[str, Any]]
ACCURACY = "eval/sums/accuracy"


@pytest.fixture
def scored_folder(tmp_path: Path, run_writer: Writer, milestone_row: RowMaker) -> Path:
    """Three seeds; `other` answers 0.2 more of the sums at the end, and its curve is twice as fast."""
    for seed in range(3):
        for recipe, gain in (("baseline", 0.0), ("other", 0.2)):
            rows = []
            for step, part in ((5, 0.25), (10, 0.5), (20, 1.0)):
                score = 0.4 * part + gain * part + 0.01 * seed * (recipe == "other")
                asked = {ACCURACY: score, f"{ACCURACY}_low": score - 0.05, f"{ACCURACY}_high": score + 0.05}
                asked |= {"eval/sums/n": 100.0, "eval/sums/truncated": 0.5, "eval/sums/valid": 90.0 + seed}
                row = milestone_row(step, 20 * part + 0.1 * (part < 1), int(1000 * part), 3 - part)
                rows.append(row | (asked if part > 0.25 else {}))
            run_writer(tmp_path, recipe, seed, rows, {})
    spec = {"baseline": "baseline", "spec": {"milestones": [0.25, 0.5]}}
    (tmp_path / "race.json").write_text(json.dumps(spec))
    return tmp_path


def test_scores_are_told_from_what_describes_them(scored_folder: Path) -> None:
    assert score_names(read_race(scored_folder)) == [ACCURACY]
    assert score_names(simulated_race(np.random.default_rng(0), 3, 2)) == []


def test_scores_at_equal_time_are_those_of_the_milestones(scored_folder: Path) -> None:
    table = at_marks(read_race(scored_folder), ACCURACY)
    assert table["at"].drop_duplicates().round(6).tolist() == [5.1, 10.1, 20.0]
    table = table.assign(at=table["at"].round()).set_index(["recipe", "at"])
    half = table.loc[("other", 10)]
    assert half["value"] == pytest.approx(0.31) and half["difference"] == pytest.approx(0.11)
    low, high = stats.ttest_1samp([0.10, 0.11, 0.12], 0).confidence_interval(0.95)
    assert half["difference_half_width"] == pytest.approx((high - low) / 2)
    assert math.isnan(table.loc[("other", 5)]["value"]) and math.isnan(table.loc[("baseline", 20)]["difference"])


def test_scores_at_equal_tokens_are_interpolated(scored_folder: Path) -> None:
    table = at_tokens(read_race(scored_folder), ACCURACY, parts=(0.75,))
    assert table["at"].tolist() == [750.0] * 2
    assert table["value"].tolist() == pytest.approx([0.3, 0.46])  # half way from 500 to 1000 tokens


def test_a_loss_at_equal_time_is_the_same_with_and_without_scores(scored_folder: Path) -> None:
    table = at_marks(read_race(scored_folder))
    assert table.loc[table["recipe"] == "baseline", "value"].tolist() == [2.75, 2.5, 2.0]


def test_more_is_better_in_the_verdict_on_a_score(scored_folder: Path) -> None:
    (row,) = score_claims(read_race(scored_folder)).to_dict("records")
    assert (row["recipe"], row["quantity"], row["verdict"], row["side"]) == ("other", "sums/accuracy", "better", 1)
    assert row["difference"] == pytest.approx(0.21)
    assert row["p_holm"] == pytest.approx(stats.ttest_1samp([0.2, 0.21, 0.22], 0).pvalue)


def test_a_claim_on_a_score_is_withdrawn_as_one_on_a_loss(scored_folder: Path, run_writer: Writer) -> None:
    (row,) = score_claims(read_race(scored_folder)).to_dict("records")
    assert row["supported"]
    run_writer(scored_folder, "other", 3, [], {"status": "failed", "tokens_seen": 0})
    race = read_race(scored_folder)
    (row,) = score_claims(race).to_dict("records")
    assert not row["supported"] and row["verdict"] == "better, not supported: 1 run failed of other, left out"
    assert "**better" not in score_table(race) and "better, not supported" in score_table(race)


def test_one_score_of_each_task_is_judged(tmp_path: Path, run_writer: Writer, milestone_row: RowMaker) -> None:
    measures = ("gsm8k/strict", "gsm8k/flexible", "gsm8k/verified", "aime/avg_at_n", "aime/pass_at_4", "old/strict")
    for seed in range(3):
        for recipe, gain in (("baseline", 0.0), ("other", 0.2)):
            asked = {f"eval/{name}": 0.1 + gain * (name != "gsm8k/verified") + 0.01 * seed for name in measures}
            run_writer(tmp_path, recipe, seed, [milestone_row(20, 20, 20, 2.0) | asked], {})
    race = read_race(tmp_path)
    assert len(score_names(race)) == 6
    table = score_claims(race).set_index("quantity")
    assert table["verdict"].to_dict() == {
        "gsm8k/verified": "no difference that 3 seeds could show",
        "aime/avg_at_n": "better",
        "old/strict": "better",
    }


def test_a_milestone_that_a_long_step_passed_over_shifts_no_cell(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    # Nobody stopped at a quarter, `slow` not at a half either.
    curves = {"baseline": ((12, 3.0), (16, 2.5), (20, 2.0)), "slow": ((17, 3.5), (20, 3.0))}
    for recipe, curve in curves.items():
        rows = [milestone_row(at, at, 10 * at, loss) | {ACCURACY: loss / 10} for at, loss in curve]
        run_writer(tmp_path, recipe, 0, rows, {})
    spec = {"baseline": "baseline", "spec": {"milestones": [0.25, 0.5, 0.75]}}
    (tmp_path / "race.json").write_text(json.dumps(spec))
    race = read_race(tmp_path)
    head, _, baseline, slow = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in milestones_table(race).splitlines()
    ]
    assert head == ["recipe", "12.0 s", "16.5 s", "20.0 s"]
    assert baseline == ["baseline", "3.0000", "2.5000", "2.0000"]
    assert slow == ["slow", "–", "3.5000 (+1.0000)", "3.0000 (+1.0000)"]
    assert "nan" not in render(race)


def test_positions_that_coincide_have_a_column_each(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    run_writer(tmp_path, "baseline", 0, [milestone_row(20, 20, 0, 2.0)], {})
    head, _, row = tokens_table(read_race(tmp_path)).splitlines()
    assert head.count("0.000 M tokens") == row.count("2.0000") == 4


def test_a_quarter_of_the_tokens_before_the_first_milestones_has_no_column(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    run_writer(tmp_path, "baseline", 0, [milestone_row(8, 8, 800_000, 4.0), milestone_row(20, 20, 2_000_000, 1.0)], {})
    head, _, row = tokens_table(read_race(tmp_path)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, row)]
    assert cells[0] == ["recipe", "1.000 M tokens", "1.500 M tokens", "2.000 M tokens"]
    assert cells[1] == ["baseline", "3.5000", "2.2500", "1.0000"]


def test_a_run_keeps_its_questions_and_interval(scored_folder: Path) -> None:
    rows = final_scores(read_race(scored_folder)).set_index("trial_id")
    assert rows.loc["other-1", ["value", "low", "high", "questions"]].tolist() == pytest.approx([0.61, 0.56, 0.66, 100])


def test_scores_have_a_section_of_their_own(scored_folder: Path) -> None:
    text = render(read_race(scored_folder))
    body = text.split("## Evaluation scores")[1].split("\n## ")[0]
    assert "| sums/accuracy | 0.400 ± 0.000 | other | **better** |" in " ".join(body.split()).replace("   ", " ")
    assert "**better**" in body and "0.610 [0.560, 0.660] (n = 100)" in body
    assert "different numbers of questions" not in body and "nan" not in body


def test_what_the_answers_were_like_is_told_of_every_run(scored_folder: Path) -> None:
    path = scored_folder / "runs" / "other-2" / "metrics.jsonl"
    path.write_text(
        path.read_text().replace('"eval/sums/n": 100.0', '"eval/sums/n": 100.0, "eval/sums/disagreements": 7.0')
    )
    body = render(read_race(scored_folder)).split("Answers at the end, run by run")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")]
    assert rows[0] == ["trial", "task", "questions", "valid solutions", "truncated (%)", "disagreements"]
    assert rows[2] == ["baseline-0", "sums", "100", "90", "50.0", "–"]
    assert rows[-1] == ["other-2", "sums", "100", "92", "50.0", "7"] and len(rows) == 2 + 6


@pytest.mark.parametrize("alone", [False, True])
def test_a_task_of_which_no_question_was_answered_in_time_is_told(scored_folder: Path, alone: bool) -> None:
    for path in scored_folder.glob("runs/*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        asked = [{k: v for k, v in row.items() if not (alone and k.startswith("eval/"))} for row in rows]
        late = {"eval/late/n": 0.0, "eval/late/valid": 0.0, "eval/late/disagreements": 0.0}
        path.write_text("".join(json.dumps(row | late) + "\n" for row in asked))
    body = render(read_race(scored_folder)).split("## Evaluation scores")[1].split("\n## ")[0]
    told = [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines() if "| late " in line]
    assert len(told) == 6 and told[0] == ["baseline-0", "late", "0", "0", "–", "0"]
    assert ("sums/accuracy" in body) != alone


def test_the_judged_score_is_drawn_against_seconds_and_tokens(scored_folder: Path, tmp_path: Path) -> None:
    text = write_report(scored_folder, tmp_path / "report").read_text()
    for axis in ("seconds", "tokens"):
        name = f"sums_accuracy_against_{axis}.png"
        assert f"]({name})" in text.split("## Curves")[1] and (tmp_path / "report" / name).stat().st_size > 10_000


def test_a_race_without_scores_has_no_such_section(pair_race: Path) -> None:
    assert "Evaluation scores" not in render(read_race(pair_race))
    assert all("score" not in name and "eval" not in name for name, _, _ in race_plots(read_race(pair_race)))


def test_a_time_cap_that_left_questions_out_is_said(scored_folder: Path) -> None:
    path = scored_folder / "runs" / "other-2" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"eval/sums/n": 100.0', '"eval/sums/n": 60.0'))
    race = read_race(scored_folder)
    assert unequal_questions(race) == [ACCURACY]
    assert "Runs answered different numbers of questions within their time: sums/accuracy." in render(race)
    (row,) = score_claims(race).to_dict("records")
    assert not row["supported"] and row["verdict"].endswith("pair answered different numbers of questions")


def test_equal_arms_rarely_get_a_verdict_on_their_scores() -> None:
    rng = np.random.default_rng(0)
    races = [simulated_race(rng, seeds=3 + number % 5, arms=3, scores=True) for number in range(100)]
    assert np.mean([bool(score_claims(race)["side"].any()) for race in races]) <= 0.07
