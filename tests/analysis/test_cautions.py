"""What speaks against a race is said in its report, and only where it does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from written_rows import edit_summary

from analysis.cautions import caveats
from analysis.frames import read_race
from analysis.logs import write_logs
from analysis.report import render

Writer = Callable[..., Path]
RowMaker = Callable[..., dict[str, Any]]
PNG = b"\x89PNG\r\n\x1a\n"


def test_repeated_data_is_shown_and_warned_of(pair_race: Path) -> None:
    assert "arXiv:2305.16264" not in render(read_race(pair_race))
    for trial, passes in (("baseline-0", 3.0), ("baseline-1", 3.2), ("quick-0", 6.0), ("quick-1", 7.0)):
        edit_summary(pair_race, trial, epochs={"prose": passes})
    text = render(read_race(pair_race))
    assert re.search(r"\| baseline .*\| 3\.1 +\|", text) and re.search(r"\| quick .*\| 6\.5 +\|", text)
    assert "(baseline 3.1, quick 6.5)" in text
    for trial in ("baseline-0", "baseline-1", "quick-0", "quick-1"):
        edit_summary(pair_race, trial, epochs={"prose": 2.0, "sums": 0.25})
    text = render(read_race(pair_race))
    assert "prose 2.0, sums 0.2 " in text and "arXiv:2305.16264" not in text


def test_broken_fairness_is_said_aloud(pair_race: Path) -> None:
    good = render(read_race(pair_race))
    assert "add up to the wall clock within 0.001 %" in good and "read the same rows in the same order" in good
    edit_summary(pair_race, "quick-0", wall_seconds=50.0, order={"8": "different"})
    bad = render(read_race(pair_race))
    assert "miss the wall clock by up to 20.00 %" in bad and "read different rows" in bad


def test_a_check_speaks_of_the_runs_that_ended_alone(pair_race: Path) -> None:
    (pair_race / "runs" / "quick-1" / "summary.json").unlink()
    text = render(read_race(pair_race))
    assert "within 0.001 % in every run that ended (3 of 4)." in text
    edit_summary(pair_race, "baseline-1", order={"8": "a0", "16": "b0"}, data_seed=0)
    assert "\n\nEvery run that ended (3 of 4) read the same rows" in render(read_race(pair_race))


def test_runs_too_short_for_a_mark_are_not_said_to_be_alone(pair_race: Path) -> None:
    edit_summary(pair_race, "quick-0", order={})
    text = render(read_race(pair_race))
    assert "could not be compared: no other run of their data seed has a mark at as many rows" in text
    assert "read the same rows in the same order" not in text


def with_spec(race: Path, spec: dict[str, Any]) -> str:
    """The report of a race whose specification is another."""
    record = json.loads((race / "race.json").read_text())
    (race / "race.json").write_text(json.dumps(record | {"spec": spec}))
    return render(read_race(race))


def test_how_the_arms_were_tuned_is_said(pair_race: Path) -> None:
    # A sweep may have chosen values of an arm, of which the race's file knows nothing.
    assert "By the race's file no arm was tuned before the race." in render(read_race(pair_race))
    tried = [{"optimizer.matrix.lr": lr, "optimizer.rest.lr": lr / 2} for lr in (0.002, 0.004, 0.008)]
    spec = {"recipes": ["baseline", "quick"], "tuning": {"seconds": 20.0, "seed": 1000, "values": tried}}
    tuned = {"baseline": tried[1], "quick": {"tokens.keep": 0.5, **tried[2]}}
    words = (
        "each arm had 3 trials of 20 train seconds, seed 1000, over optimizer.matrix.lr = 0.002, 0.004, 0.008; "
        "optimizer.rest.lr = 0.001, 0.002, 0.004 (varied together), before the race; "
        "it races with one of the values tried."
    )
    text = with_spec(pair_race, spec | {"arms": tuned})
    assert words in text and "Not so" not in text and "no arm was tuned" not in text
    largest = "quick (optimizer.matrix.lr = 0.008, the largest; optimizer.rest.lr = 0.004, the largest)"
    assert f"so that a better value may lie beyond: {largest}.**" in text
    text = with_spec(pair_race, spec | {"arms": {"baseline": tried[1], "quick": tried[1]}})
    assert words in text and "may lie beyond" not in text
    text = with_spec(pair_race, spec | {"arms": {"baseline": tried[1], "quick": {"optimizer.matrix.lr": 0.002}}})
    assert words in text and "**Not so quick: none of these values.**" in text
    assert "no arm was tuned for this race" in with_spec(pair_race, spec | {"arms": {}})


def test_where_micro_batches_were_calibrated_is_said(pair_race: Path) -> None:
    assert "calibrated" not in render(read_race(pair_race))
    for trial, rows in (("baseline-0", 4), ("baseline-1", 4), ("quick-0", 16), ("quick-1", 16)):
        edit_summary(pair_race, trial, micro_rows=rows)
    spec = {"calibration": {"device": {"name": "Test GPU"}, "arms": {}}}
    text = with_spec(pair_race, spec)
    assert re.search(r"\| rows of a micro-batch, at the end +\| baseline: 4; quick: 16 +\|", text)
    assert re.search(r"\| calibrated on +\| Test GPU +\|", text) and "need not be the largest" not in text
    spec["calibration"]["device"] = {"name": "B200"}
    said = "**Micro-batches were calibrated on B200, and runs were on Test GPU: there they need not be the largest"
    assert said in with_spec(pair_race, spec)


def test_questions_that_were_trained_on_are_told(pair_race: Path) -> None:
    seen = {"gsm8k": {"questions": 1319, "words": 13, "keys": ["4", "7", "9"]}}
    (pair_race / "overlap.json").write_text(json.dumps(seen))
    seen["sums"] = {"questions": 100, "words": 1000, "keys": ["8"]}
    seen["aime"] = {"questions": 30, "words": 13, "keys": []}
    (pair_race / "overlap.json").write_text(json.dumps(seen))
    text = render(read_race(pair_race))
    assert "3 of 1319 questions of gsm8k are whole in a training document, or 13 words of them in a row." in text
    assert "1 of 100 questions of sums are whole in a training document." in text and "of aime" not in text


def test_what_does_not_apply_is_not_said(
    tmp_path: Path, one_seed_race: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    assert "p (Holm)**: none: no arm has two pairs" in render(read_race(one_seed_race))
    run_writer(tmp_path / "alone", "baseline", 0, [milestone_row(20, 20, 20, 2.0)], {})
    text = render(read_race(tmp_path / "alone"))
    assert "luck of one seed" not in text and "taken up again" not in text


def test_runs_that_went_on_from_a_checkpoint_are_told(pair_race: Path) -> None:
    with (pair_race / "runs" / "quick-1" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "resumed", "step": 20}\n')
    assert "1 run was taken up again from a checkpoint (quick-1)" in render(read_race(pair_race))


def test_steps_that_changed_nothing_are_told(pair_race: Path) -> None:
    assert "finite gradient" not in render(read_race(pair_race))
    edit_summary(pair_race, "quick-1", skipped_steps=3)
    edit_summary(pair_race, "baseline-0", skipped_steps=0)
    told = render(read_race(pair_race))
    assert "changed nothing: 3 of quick-1.**" in told and told.count("finite gradient") == 1


def test_a_run_that_was_moved_is_told_and_its_pair_supports_no_claim(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    for seed in range(3):
        for recipe, loss in (("baseline", 2.0), ("other", 1.0)):
            run_writer(
                *(tmp_path, recipe, seed, [milestone_row(20, 20, 1000, loss + 0.01 * seed)], {}),
                device={"name": "B"},
                process={"host": "b"},
            )
    assert "**better**" in render(read_race(tmp_path)) and "moved in its" not in render(read_race(tmp_path))
    file = tmp_path / "runs" / "other-1" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"earlier": [{"device": "A", "host": "a"}]}))
    text = render(read_race(tmp_path))
    assert "**other-1 was moved in its midst, from A of a to B of b: its speed is neither's.**" in text
    assert "not supported: the runs of a pair had other devices" in text and "**better**" not in text
    write_logs(read_race(tmp_path), tmp_path)


def test_a_run_that_went_on_with_another_version_is_told(pair_race: Path) -> None:
    file = pair_race / "runs" / "quick-1" / "run.json"
    run = json.loads(file.read_text()) | {"versions": {"torch": "2.13", "commit": "b"}, "process": {"host": "h"}}
    where = {"device": run["device"]["name"], "host": "h"}
    file.write_text(json.dumps(run | {"earlier": [where | {"versions": {"torch": "2.13", "commit": "a"}}]}))
    lines = caveats(read_race(pair_race))
    assert "**What quick-1 ran with has changed in its midst: commit.**" in lines
    assert not any("was moved" in line for line in lines)
    file.write_text(json.dumps(run | {"earlier": [where | {"device": "A", "versions": run["versions"]}]}))
    lines = caveats(read_race(pair_race))
    assert any("quick-1 was moved in its midst, from A of h to" in line for line in lines)
    assert not any("has changed" in line for line in lines)


def test_different_devices_of_seeds_are_told(pair_race: Path) -> None:
    assert any("one device" in line for line in caveats(read_race(pair_race)))
    for trial in ("baseline-1", "quick-1"):
        file = pair_race / "runs" / trial / "run.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"device": {"name": "Other GPU"}}))
    lines = caveats(read_race(pair_race))
    assert not any("and one device" in line for line in lines)
    assert any("different devices (Test GPU: seed 0; Other GPU: seed 1): means over seeds" in line for line in lines)


def test_it_is_said_whether_versions_differ_within_pairs(pair_race: Path) -> None:
    def versions(**of: str) -> list[str]:
        for trial, torch in of.items():
            file = pair_race / "runs" / trial.replace("_", "-") / "run.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"versions": {"torch": torch}}))
        return [line for line in caveats(read_race(pair_race)) if "different versions of torch" in line]

    assert versions(baseline_1="2.13.0", quick_1="2.13.0") == [
        "**Seeds had different versions of torch; the runs of a pair had the same.**"
    ]
    assert versions(quick_1="2.12.0") == [
        "**Runs of one seed had different versions of torch: their difference may come of it.**"
    ]


def test_how_little_two_pairs_tell_of_their_spread_is_said(pair_race: Path) -> None:
    lines = caveats(read_race(pair_race))
    assert any("has 2 pairs, which tell their own spread within a factor of 0.45 to 32 only" in line for line in lines)
    assert any(line.startswith("Every loss is on the same held-out text") for line in lines)


def test_runs_that_shared_a_gpu_are_not_compared_by_speed(tmp_path: Path, run_writer: Callable[..., Path]) -> None:
    for recipe, share in (("baseline", 1.0), ("quick", 0.5)):
        run_writer(tmp_path, recipe, 0, [], {}, gpus_per_trial=share)
    assert any("shared a GPU" in line for line in caveats(read_race(tmp_path)))
    quick = tmp_path / "runs" / "quick-0" / "run.json"
    quick.write_text(quick.read_text().replace('"gpus_per_trial": 0.5', '"gpus_per_trial": 1.0'))
    assert not any("shared a GPU" in line for line in caveats(read_race(tmp_path)))
