"""The report: files, links, and words no stronger than the figures."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_cautions import with_spec
from written_rows import edit_summary

from analysis.frames import Race, read_race
from analysis.output import write_report
from analysis.plots import BASELINE_COLOUR, plot_memory, styles
from analysis.report import render, summary_table, verdicts
from analysis.stats import detectable
from analysis.tables import figure, table

Writer = Callable[..., Path]
RowMaker = Callable[..., dict[str, Any]]
PNG = b"\x89PNG\r\n\x1a\n"


def verdict_of(race: Race, recipe: str) -> str:
    (line,) = [line for line in verdicts(race) if line.startswith(f"{recipe}:")]
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


def cells_of(text: str, title: str, *first: str) -> list[str]:
    """The row of a section's tables that begins with these cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section(text, title).splitlines()]
    (found,) = [row for row in rows if tuple(row[: len(first)]) == first]
    return found


def test_figures_of_the_comparison_reach_the_table(pair_race: Path) -> None:
    cells = cells_of(render(read_race(pair_race)), "Comparison", "quick")
    assert cells[1:4] == ["2 of 2", "1.7000 ± 2.5412", "-0.4000 ± 1.2706 †"]
    assert cells[5:7] == ["12.5 ± 31.8", "0.001 ± 0.000"]


def test_the_verdicts_come_first_and_only_claims_are_bold(pair_race: Path) -> None:
    text = render(read_race(pair_race))
    assert text.index("## Verdicts") < text.index("## What ran")
    loss = cells_of(text, "Verdicts", "final loss (nats/token)", "quick")
    assert loss[2:5] == ["no difference that 2 seeds could show", "-0.4000", "[-1.6706, +0.8706]"]
    assert loss[-1] == "2"
    speed = cells_of(text, "Verdicts", "tokens/s (ratio)", "quick")
    assert speed[2:4] == ["**slower**", "0.500x"] and speed[5] == "< 0.001"
    assert "by paired t over 2 pairs" in text


def test_the_findings_reach_their_sections(pair_race: Path) -> None:
    text = render(read_race(pair_race))
    assert cells_of(text, "Equal time and equal tokens", "quick", "1.7000 (-0.4000 ± 1.2706)")
    # Where quick ends, at 1000 tokens, baselines are at 3.0 and 3.2.
    assert "1.7000 (-1.4000 ± " in section(text, "Equal time and equal tokens")
    assert cells_of(text, "Saturation", "quick")[1:] == [
        "-0.3250 ± 2.2236",
        "-3.9000 ± 26.6830",
        "no change shown",
    ]
    efficiency = "Efficiency, and the value of a kept token"
    assert cells_of(text, efficiency, "quick")[1] == "2.2000"
    # Nobody logged what was kept.
    assert cells_of(text, efficiency, "arm")[1:] == [
        *("common loss (nats/token)", "speed-up", "token efficiency", "peak memory")
    ]
    assert "2.5000 nats/token" in section(text, "Time to target losses") and "Performance profile" in text


def test_one_seed_concludes_nothing(one_seed_race: Path) -> None:
    race = read_race(one_seed_race)
    line = verdict_of(race, "quick")
    assert line.count("one seed: no verdict") == 3 and "-0.5000" in line and "±" not in line
    text = render(race)
    assert "2 recipes, 2 runs, 1 seed, 20 train seconds" in text
    assert "-0.5000 †" in text and not re.search(r"\bnan\b", text)
    assert cells_of(text, "Verdicts", "final loss (nats/token)", "quick")[2] == "one seed: no verdict"


def test_two_seeds_with_a_wide_interval_show_no_difference(pair_race: Path) -> None:
    line = verdict_of(read_race(pair_race), "quick")
    assert "final loss: no difference that 2 seeds could show (-0.4000 ± 1.2706 nats/token)" in line
    assert "speed-up to a common loss: no difference that 2 seeds could show" in line


@pytest.mark.parametrize(("shift", "word", "speed"), [(-0.5, "better", "faster"), (0.5, "worse", "slower")])
def test_a_clear_difference_is_a_claim(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker, shift: float, word: str, speed: str
) -> None:
    for seed, noise in enumerate((0.0, 0.01, 0.02)):
        for recipe, end in (("baseline", 2.0), ("other", 2.0 + shift + noise)):
            run_writer(tmp_path, recipe, seed, [milestone_row(0, 0, 0, 9.0), milestone_row(20, 20, 20, end)], {})
    race = read_race(tmp_path)
    line = verdict_of(race, "other")
    assert f"final loss: {word} (" in line and f"speed-up to a common loss: {speed} (" in line
    assert "tokens/s: no difference" in line
    assert f"**{word}**" in render(race) and "†" not in section(render(race), "Comparison").split("* **finished**")[0]


def test_lost_runs_are_named(pair_race: Path, run_writer: Writer) -> None:
    run_writer(pair_race, "quick", 2, [], {"status": "diverged", "tokens_seen": 0, "message": "loss was not finite"})
    run_writer(pair_race, "lost", 0, [])
    race = read_race(pair_race)
    assert "1 run diverged, left out" in verdict_of(race, "quick")
    assert "no pair: no verdict" in verdict_of(race, "lost") and "1 run unfinished" in verdict_of(race, "lost")
    text = render(race)
    assert "quick: 1 run diverged, left out of these figures." in text
    assert "quick-2 (diverged): loss was not finite" in text and "left out of all" not in text


def test_the_command_and_mixed_versions_are_stated(pair_race: Path) -> None:
    assert "different versions" not in render(read_race(pair_race))
    spec = json.loads((pair_race / "race.json").read_text())
    (pair_race / "race.json").write_text(json.dumps(spec | {"command": "cggr-ray race --seeds 0,1"}))
    run = pair_race / "runs" / "quick-0" / "run.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"versions": {"torch": "2.13.0"}}))
    text = render(read_race(pair_race))
    assert "`cggr-ray race --seeds 0,1`" in text and "different versions of torch" in text


def test_an_injected_clock_and_lost_memory_are_said(pair_race: Path) -> None:
    edit_summary(pair_race, "quick-0", out_of_memory=2, wall_seconds=1000.0)
    assert "time is unexplained" in render(read_race(pair_race))
    text = with_spec(pair_race, {"step_seconds": 0.5})
    assert "time is unexplained" not in text
    assert "are not those of any machine" in text and "1 run ran out of memory (quick-0)" in text
    assert "train seconds a run, counted as 0.5 s a step, on Test GPU" in text
    verdicts_of_all = section(text, "Verdicts")
    assert "equal time is equal steps, and speeds are not judged" in verdicts_of_all and not re.search(
        r"tokens/s|speed-up|\{", verdicts_of_all
    )


def test_what_ran_says_whose_figure_it_is(pair_race: Path) -> None:
    for trial, parameters in (("baseline-0", 1234567), ("baseline-1", 1234567), ("quick-0", 2345678)):
        edit_summary(pair_race, trial, parameters=parameters)
        file = pair_race / "runs" / trial / "run.json"
        described = {"device": {"name": "Test GPU", "memory_mib": 143156.25}, "versions": {"torch": "2", "mine": ""}}
        file.write_text(json.dumps(json.loads(file.read_text()) | described))
    edit_summary(pair_race, "quick-1", parameters=2345678)
    text = render(read_race(pair_race))
    assert cells_of(text, "What ran", "trained parameters, all parts")[1] == "baseline: 1,234,567; quick: 2,345,678"
    assert cells_of(text, "What ran", "device, memory (MiB)")[1] == "143,156"
    assert "mine" not in cells_of(text, "What ran", "versions")[1]


def test_a_trial_without_a_folder_is_named(pair_race: Path) -> None:
    spec = json.loads((pair_race / "race.json").read_text())
    (pair_race / "race.json").write_text(json.dumps(spec | {"trials": [*spec["trials"], "quick-9"]}))
    text = render(read_race(pair_race))
    assert "quick-9: never started" in text and "2 recipes, 4 of 5 runs, 2 seeds" in text


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
    report = write_report(pair_race)
    assert "memory.png" not in report.read_text() and not (report.parent / "memory.png").exists()
    edit_summary(pair_race, "quick-1", peak_memory_mib=512.0)
    report = write_report(pair_race)
    assert "(memory.png)" in report.read_text() and (report.parent / "memory.png").is_file()
    assert cells_of(report.read_text(), "Comparison", "quick")[-1] == "512 (1 of 2 runs)"


def test_summary_for_a_terminal_is_plain(pair_race: Path) -> None:
    text = summary_table(read_race(pair_race))
    assert "**" not in text and "|" not in text and "quick: final loss: no difference" in text


def test_figure_shows_a_spread_only_where_there_is_one() -> None:
    assert figure(1234.5678, 2) == "1,234.57" and figure(1.0, 1, 0.25) == "1.0 ± 0.2"
    assert figure(float("nan"), 2, 1.0) == "–" and figure(0.5, 1, sign=True) == "+0.5"
    assert figure(-1e-9, 3) == "0.000" and figure(-1e-9, 3, sign=True) == "+0.000" and figure(-0.06, 1) == "-0.1"


def test_a_recipe_keeps_one_look_and_no_two_share_it() -> None:
    names = ["baseline", *(f"r{i}" for i in range(12))]
    look = styles(names, "baseline")
    assert look["baseline"] == (BASELINE_COLOUR, "-") and len(set(look.values())) == 13
    assert styles(names[:5], "baseline")["r3"] == look["r3"]


def test_reading_a_race_loads_neither_torch_nor_ray() -> None:
    code = "import sys, analysis; print([m for m in ('torch', 'ray', 'cggr_ray.loop') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_message_stays_on_its_line_and_a_bar_in_its_cell(pair_race: Path) -> None:
    edit_summary(pair_race, "quick-1", status="failed", message="Traceback:\n\n## Not | a heading\n  gone")
    spec = json.loads((pair_race / "race.json").read_text())
    (pair_race / "race.json").write_text(json.dumps(spec | {"command": "echo a | b"}))
    text = render(read_race(pair_race))
    assert "* quick-1 (failed): Traceback: ## Not | a heading gone\n" in text
    assert r"`echo a \| b`" in text
    assert table(["x|y"], [["a|b"]], "simple").split("\n")[-1].strip() == "a|b"


def test_headers_are_broken_in_a_terminal_and_not_in_markdown() -> None:
    long, cells = ["time to the loss of another (s)"], [["12.5"]]
    assert max(map(len, table(long, cells, "simple").splitlines())) < 20 < len(table(long, cells).splitlines()[0])


def test_runs_alone_make_the_report_of_their_race(pair_race: Path) -> None:
    """Set seconds, a tuning, milestones and a baseline that is not called so: none of it is in the rows."""
    spec = {"recipes": ["quick", "baseline"], "step_seconds": 1.0, "milestones": [0.5], "name": "pair"}
    spec |= {"tuning": {"seconds": 20.0, "seed": 9, "values": [{"lr": 1.0}, {"lr": 2.0}]}}
    spec |= {"arms": {name: {"lr": 2.0} for name in ("quick", "baseline")}}
    record = json.loads((pair_race / "race.json").read_text())
    record |= {"spec": spec, "recipes": ["quick", "baseline"], "baseline": "quick"}
    (pair_race / "race.json").write_text(json.dumps(record))
    for file in pair_race.glob("runs/*/run.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"spec": spec}))
    for file in pair_race.glob("runs/*/summary.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"budget_seconds": 20.0}))
    whole = render(read_race(pair_race))
    (pair_race / "race.json").unlink()
    alone = render(read_race(pair_race))
    assert "tokens/s (ratio)" not in alone and "each arm had 2 trials of 20 train seconds" in alone
    told = "race.json is not here; as baseline-0 has it:"
    assert told in alone and alone.replace(f"{told}\n\n", "") == whole


def test_a_baseline_without_a_run_is_refused(pair_race: Path) -> None:
    spec = json.loads((pair_race / "race.json").read_text())
    (pair_race / "race.json").write_text(json.dumps(spec | {"baseline": "full"}))
    with pytest.raises(ValueError, match=r"baseline = 'full' has no run; accepted: .*: baseline, quick"):
        render(read_race(pair_race))


def test_what_a_ratio_could_have_shown_is_a_factor_both_ways(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    for seed, tokens in enumerate((1000, 900, 1200)):
        run_writer(tmp_path, "baseline", seed, [milestone_row(20, 20, 1000, 2.0)], {})
        run_writer(tmp_path, "other", seed, [milestone_row(20, 20, tokens, 2.0)], {})
    up = math.exp(detectable(np.log([1.0, 0.9, 1.2]), 0.05 / 2))
    cells = cells_of(render(read_race(tmp_path)), "Verdicts", "tokens/s (ratio)", "other")
    assert cells[-2] == f"beyond {up:.3f}x or {1 / up:.3f}x" and up > 1
