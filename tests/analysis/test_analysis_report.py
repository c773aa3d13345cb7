"""The report: files, links, and words no stronger than the figures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.frames import Race, read_race
from analysis.plots import BASELINE_COLOUR, plot_memory, styles
from analysis.report import render, summary_table, verdicts, write_report
from analysis.tables import figure

Writer = Callable[..., Path]
RowMaker = Callable[..., dict[str, Any]]
PNG = b"\x89PNG\r\n\x1a\n"


def edit_summary(race: Path, trial: str, **changes: Any) -> None:
    path = race / "runs" / trial / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def verdict_of(race: Race, recipe: str) -> str:
    (line,) = [line for line in verdicts(race, bold=False) if line.startswith(f"{recipe}:")]
    return line


def test_a_report_is_complete_and_its_links_resolve(pair_race: Path) -> None:
    path = write_report(pair_race)
    assert path == pair_race / "report" / "benchmark_results.md"
    text = path.read_text()
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(links) == 4
    for link in links:
        assert (path.parent / link).read_bytes().startswith(PNG)
    assert {file.name for file in path.parent.glob("*.parquet")} == {
        "runs.parquet",
        "steps.parquet",
        "milestones.parquet",
    }
    for fact in ("tiny", "1,234,567", "Test GPU", "torch 2.12.0", "2,048 (16 rows of 128)", "maths", "0.02"):
        assert fact in text
    assert not re.search(r"\bnan\b|None", text)
    assert render(read_race(pair_race)) == text  # the report inside the race folder is no part of the race


def section(text: str, title: str) -> str:
    (body,) = re.findall(rf"^## {title}\n(.*?)(?=^## )", text, re.M | re.S)
    return str(body)


def test_resting_layers_get_a_section_with_two_plots(resting_race: Path) -> None:
    path = write_report(resting_race)
    body = section(path.read_text(), "Layers that learn")
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", body)
    assert links == ["active_layers.png", "relevance.png"]
    assert all((path.parent / link).read_bytes().startswith(PNG) for link in links)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line[:1] == "|"]
    cells = {row[0]: row[1:] for row in rows[2:]}
    assert set(cells) == {"suffix-0", "suffix-1", "static-0"}
    assert cells["suffix-0"] == ["suffix", "0", "3.58 of 4", "2", "5", "1.0", "0.5", "2.0", "1.5", "0.8", "1.2"]
    steps = pd.read_parquet(path.parent / "steps.parquet")
    texts = steps.loc[steps["trial_id"] == "suffix-0", "updates/relevance"].dropna()
    assert [json.loads(text) for text in texts] == [[1, 1, 1, 1], [0, 1, 2, 5]]


def test_layers_that_rest_without_probes_have_no_heat_map(
    tmp_path: Path, run_writer: Writer, learning_row: RowMaker
) -> None:
    run_writer(tmp_path, "static", 0, [learning_row(1, 0.5, 4), learning_row(2, 1.0, 2)], {})
    path = write_report(tmp_path)
    assert "active_layers.png" in path.read_text() and "relevance.png" not in path.read_text()
    assert (path.parent / "active_layers.png").is_file() and not (path.parent / "relevance.png").exists()


def test_without_resting_layers_the_report_is_as_before(
    tmp_path: Path, run_writer: Writer, learning_row: RowMaker, logged_step: RowMaker
) -> None:
    texts = []
    for name, maker in (("old", logged_step), ("new", lambda step: learning_row(step, float(step), 4))):
        run_writer(tmp_path / name, "baseline", 0, [maker(1), maker(2)], {})
        (tmp_path / name / "race.json").write_text('{"name": "same"}')
        path = write_report(tmp_path / name)
        texts.append(path.read_text())
        assert len(list(path.parent.glob("*.png"))) == 4
    assert texts[0] == texts[1] and "Layers that learn" not in texts[0]


def test_figures_of_the_comparison_reach_the_table(pair_race: Path) -> None:
    (row,) = [line for line in render(read_race(pair_race)).splitlines() if re.match(r"\| quick +\| 2 of 2", line)]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:4] == ["1.7000 ± 2.5412", "-0.4000 ± 1.2706"]
    assert cells[5:8] == ["12.5 ± 31.8", "1.67 ± 4.24", "0.001 ± 0.000"]


def test_one_seed_concludes_nothing(one_seed_race: Path) -> None:
    line = verdict_of(read_race(one_seed_race), "quick")
    assert "one seed: no interval, nothing can be concluded" in line and "-0.5000" in line
    assert "±" not in line and "excludes" not in line


def test_two_seeds_with_a_wide_interval_show_no_difference(pair_race: Path) -> None:
    line = verdict_of(read_race(pair_race), "quick")
    assert "no difference that 2 seeds could show" in line and "includes 0" in line
    assert "-0.4000 ± 1.2706" in line and "an interval that includes 1" in line


@pytest.mark.parametrize(("shift", "word"), [(-0.5, "lower"), (0.5, "higher")])
def test_a_narrow_interval_is_said_to_exclude_zero(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker, shift: float, word: str
) -> None:
    for seed, noise in enumerate((0.0, 0.01, 0.02)):
        for recipe, end in (("baseline", 2.0 + seed), ("other", 2.0 + seed + shift + noise)):
            run_writer(tmp_path, recipe, seed, [milestone_row(0, 0, 0, 9.0), milestone_row(20, 20, 20, end)], {})
    line = verdict_of(read_race(tmp_path), "other")
    assert f"{word} final loss" in line and "over 3 pairs excludes 0" in line
    assert ("0 of 3 pairs reached" in line) == (shift > 0)


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


def test_lost_runs_are_named(pair_race: Path, run_writer: Writer) -> None:
    run_writer(pair_race, "quick", 2, [], {"status": "diverged", "tokens_seen": 0, "message": "loss was not finite"})
    run_writer(pair_race, "lost", 0, [])
    race = read_race(pair_race)
    assert "1 run diverged, left out" in verdict_of(race, "quick")
    assert "no run finished (1 run unfinished): nothing can be compared" in verdict_of(race, "lost")
    assert "quick-2 (diverged): loss was not finite" in render(race)


def test_a_trial_without_a_folder_is_named(pair_race: Path) -> None:
    spec = json.loads((pair_race / "race.json").read_text())
    (pair_race / "race.json").write_text(json.dumps(spec | {"trials": [*spec["trials"], "quick-9"]}))
    assert "quick-9: never started" in render(read_race(pair_race))


def test_broken_fairness_is_said_aloud(pair_race: Path) -> None:
    good = render(read_race(pair_race))
    assert "add up to the wall clock within 0.000 %" in good and "read the same rows in the same order" in good
    edit_summary(pair_race, "quick-0", wall_seconds=50.0, order={"8": "different"})
    bad = render(read_race(pair_race))
    assert "miss the wall clock by up to 20.00 %" in bad and "read different rows" in bad


def with_spec(race: Path, spec: dict[str, Any]) -> str:
    """The report of a race whose specification is another."""
    record = json.loads((race / "race.json").read_text())
    (race / "race.json").write_text(json.dumps(record | {"spec": spec}))
    return render(read_race(race))


def test_how_the_arms_were_tuned_is_said(pair_race: Path) -> None:
    assert "No arm was tuned for this race." in render(read_race(pair_race))
    tried = [{"optimizer.matrix.lr": lr, "optimizer.rest.lr": lr / 2} for lr in (0.002, 0.004, 0.008)]
    spec = {"recipes": ["baseline", "quick"], "tuning": {"seconds": 20.0, "seed": 1000, "values": tried}}
    tuned = {"baseline": tried[1], "quick": {"tokens.keep": 0.5, **tried[2]}}
    words = (
        "each arm had 3 trials of 20 train seconds, seed 1000, over optimizer.matrix.lr = 0.002, 0.004, 0.008; "
        "optimizer.rest.lr = 0.001, 0.002, 0.004 (varied together)"
    )
    text = with_spec(pair_race, spec | {"arms": tuned})
    assert words in text and "Not so" not in text and "No arm was tuned" not in text
    text = with_spec(pair_race, spec | {"arms": {"baseline": tried[1], "quick": {"optimizer.matrix.lr": 0.002}}})
    assert words in text and "**Not so quick: none of these values.**" in text
    assert "no arm was tuned for this race" in with_spec(pair_race, spec | {"arms": {}})


def test_a_race_that_has_just_begun_can_be_reported(tmp_path: Path, run_writer: Writer) -> None:
    run_writer(tmp_path, "baseline", 0, [])
    out = tmp_path / "elsewhere"
    assert "Only baseline ran" in write_report(tmp_path, out).read_text()
    assert (out / "benchmark_results.md").is_file() and not (tmp_path / "report").exists()


def test_without_a_device_there_is_no_memory_and_still_a_report(pair_race: Path) -> None:
    for trial in ("baseline-0", "baseline-1", "quick-0", "quick-1"):
        edit_summary(pair_race, trial, peak_memory_mib=None)
    race = read_race(pair_race)
    assert re.search(r"\| 20 ± 0 +\| – +\|", render(race))
    assert plot_memory(race, pair_race / "memory.png").is_file()


def test_summary_for_a_terminal_is_plain(pair_race: Path) -> None:
    text = summary_table(read_race(pair_race))
    assert "**" not in text and "|" not in text and "quick: no difference" in text


def test_figure_shows_a_spread_only_where_there_is_one() -> None:
    assert figure(1234.5678, 2) == "1,234.57" and figure(1.0, 1, 0.25) == "1.0 ± 0.2"
    assert figure(float("nan"), 2, 1.0) == "–" and figure(0.5, 1, sign=True) == "+0.5"


def test_a_recipe_keeps_one_look_and_no_two_share_it() -> None:
    names = ["baseline", *(f"r{i}" for i in range(12))]
    look = styles(names, "baseline")
    assert look["baseline"] == (BASELINE_COLOUR, "-") and len(set(look.values())) == 13
    assert styles(names[:5], "baseline")["r3"] == look["r3"]


def test_reading_a_race_loads_neither_torch_nor_ray() -> None:
    code = "import sys, analysis; print([m for m in ('torch', 'ray', 'cggr_ray.loop') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
