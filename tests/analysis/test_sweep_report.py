"""The report of a sweep: its words and tables against what was planted, and all of its files."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sweep_folders import START, drawn, ended, planted, result, write_run_of, write_sweep
from typer.testing import CliRunner

from analysis import read_sweep, write_report
from analysis.html.sweep import sweep_page
from analysis.sweep_report import best_trials, render_sweep, rung_table, sweep_plots
from cggr_ray.cli import app


@pytest.fixture(scope="module")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted(tmp_path_factory.mktemp("sweeps") / "planted")


def cells(markdown: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head."""
    body = markdown.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def test_the_report_says_what_was_planted(sweep_folder: Path) -> None:
    markdown = render_sweep(read_sweep(sweep_folder))
    assert markdown.startswith("# Sweep sweep-mine\n\nquick, space mine: 40 trials (")
    assert "1 out of memory" in markdown and "1 failed" in markdown and "20 train seconds each. Best: t00" in markdown
    best = cells(markdown, "Best trials")
    losses = [float(row[2]) for row in best]
    assert losses == sorted(losses) and {row[1] for row in best} == {"finished"}
    matter = cells(markdown, "Which hyperparameters matter")
    assert matter[0][0] == "lr" and matter[0][3] == "yes" and {row[0] for row in matter} >= {"tokens.keep", "strata"}
    failures = cells(markdown, "Failures, and why")
    assert failures == [
        ["out of memory", "1", "t0007", "100", "CUDA out of memory. Tried 2 GiB"],
        ["failed", "1", "t0011", "100", r"ValueError: no \|"],
    ]
    assert "Stopped early: " in markdown and "Not ended yet: 1 trial." in markdown and "shared a GPU" not in markdown
    assert '"scheduler": "asha"' in markdown and "`cggr-ray sweep mine`" in markdown


def test_rungs_count_who_came_and_who_stopped(tmp_path: Path) -> None:
    # Up to a step late, of half a second.
    events = [
        event
        for number in range(4)
        for event in (drawn(number, x=number), result(number, 5.0 + number / 6, 4.0 + number))
    ]
    events += [result(0, 10.01, 3.0), result(1, 10.0, 2.5), result(0, 20.0, 2.0)]
    events += [ended(0, "finished", 2.0, 20.0), ended(1, "stopped", 2.5, 10.0), ended(2, "stopped", 6.0, 5.0)]
    events += [ended(3, "failed", 7.0, 6.0)]
    rows = rung_table(read_sweep(write_sweep(tmp_path / "sweep", events))).splitlines()[2:]
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows] == [
        ["5.2", "4", "1", "4.0000", "5.5000", "7.0000"],
        ["10.0", "2", "1", "2.5000", "2.7500", "3.0000"],
        ["20.0", "1", "0", "2.0000", "2.0000", "2.0000"],
    ]


def test_the_best_are_finished_ones_where_there_are_any(tmp_path: Path) -> None:
    events = [drawn(number, x=number) for number in range(3)]
    events += [result(0, 5.0, 1.0), result(1, 20.0, 3.0), ended(0, "stopped", 1.0, 5.0)]
    going = write_sweep(tmp_path / "going", events)
    assert best_trials(read_sweep(going))["trial_id"].tolist() == ["t0000", "t0001"]
    words = render_sweep(read_sweep(going))
    assert "Best: t0000 (stopped), 1.0000 nats/token." in words
    assert "Trials that used their whole budget" not in words and "No trial with a loss has used its whole" in words
    over = write_sweep(tmp_path / "over", [*events, ended(1, "finished", 3.0, 20.0)])
    assert best_trials(read_sweep(over))["trial_id"].tolist() == ["t0001"]
    assert "Trials that used their whole budget" in render_sweep(read_sweep(over))


def test_shared_gpus_and_taken_weights_are_cautioned_against(tmp_path: Path) -> None:
    exploit = {"kind": "exploit", "trial_id": "t0000", "donor": "t0001", "values": {"x": 2}, "at": START}
    folder = write_sweep(tmp_path / "sweep", [drawn(0, x=1), drawn(1, x=2), exploit, ended(0, "finished", 1.0, 20.0)])
    write_run_of(folder, 1, [], gpus_per_trial=0.25)
    markdown = render_sweep(read_sweep(folder))
    assert "**Trials shared a GPU" in markdown and "Gone on with the weights of others: 1 trial." in markdown


def test_a_sweep_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", [drawn(0, x=1)])
    text = write_report(folder).read_text()
    assert "No trial has been validated." in text and "No trial failed." in text and "Fewer than 10 trials" in text
    names = {path.name for path in (folder / "report").iterdir()}
    assert "timeline.png" in names and "loss_against_budget.png" not in names and "report.html" in names


def test_the_command_writes_all_files_and_every_picture(sweep_folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(sweep_folder), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0 and "40 trials" in done.stdout and "finished" in done.stdout
    path = tmp_path / "out" / "benchmark_results.md"
    names = {file.name for file in path.parent.iterdir()}
    assert names >= {f"{frame}.{ending}" for frame in ("trials", "results") for ending in ("csv", "parquet")}
    linked = set(re.findall(r"!\[.*?\]\(([\w.]+)\)", path.read_text()))
    assert linked == {name for name, _, _ in sweep_plots(read_sweep(sweep_folder))} and linked < names
    assert all((path.parent / name).read_bytes().startswith(b"\x89PNG") for name in linked)


class Words(HTMLParser):
    """The text of a page, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags = "", [("", {})][:0]
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_a_line_a_trial_that_says_its_values(sweep_folder: Path) -> None:
    page, sweep = Words(sweep_page(read_sweep(sweep_folder))), read_sweep(sweep_folder)
    known = sweep.trials.dropna(subset=["val/loss"])
    lines = [tag for tag, attributes in page.tags if tag == "path" and "trial" in str(attributes.get("class"))]
    assert len(lines) == len(known) == 38
    best = known.sort_values("val/loss").iloc[0]
    assert (
        f"{best['trial_id']} ({best['status']}): {best['val/loss']:.4f} nats/token\nlr = {best['values/lr']}"
        in page.text
    )
    assert all(str(a.get("src", "data:")).startswith("data:") for _, a in page.tags)
    data = json.loads(page.text[page.text.index('{"recipes":') :].split("\n")[0])
    assert data["recipes"] == best_trials(sweep, 8)["trial_id"].tolist()
    first = data["charts"][0]["views"][0]["curves"][0]
    own = sweep.results[sweep.results["trial_id"] == first["trial"]]
    assert first["x"] == own["train_seconds"].tolist() and first["y"] == pytest.approx(own["val/loss"], rel=1e-4)


def test_a_hostile_value_stays_text(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    events = [event for n in range(12) for event in (drawn(n, name=f"{evil}{n % 3}"), result(n, 20.0, 1.0 + n))]
    events += [ended(n, "finished", 1.0 + n, 20.0) for n in range(11)] + [ended(11, "failed", None, 1.0, message=evil)]
    page = sweep_page(read_sweep(write_sweep(tmp_path / "sweep", events, name=evil)))
    assert "<img src=x" not in page and "&lt;img src=x" in page
    assert page.count("</script>") == 2
