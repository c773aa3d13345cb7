"""The HTML report: one safe file, the words and tables of the Markdown report, and curves equal to the logged rows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from scipy import stats

from analysis.frames import read_race
from analysis.html import write_html
from analysis.html.curves import POINTS, Chart, charts
from analysis.html.markup import to_html
from analysis.html.page import page, script_json
from analysis.html.svg import picture
from analysis.report import render
from analysis.tables import table

Writer = Callable[..., Path]
RowMaker = Callable[..., dict[str, Any]]
LEAVES = ("h1", "h2", "h3", "p", "li", "th", "td", "code", "strong", "summary")
HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'


class Reader(HTMLParser):
    """The elements of a page with their attributes, and the text of those that hold text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)
        if tag in LEAVES:
            self.texts.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.texts and self.open:
            tag, text = self.texts[-1]
            self.texts[-1] = (tag, text + data)

    def named(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def chart_of(drawn: list[Chart], metric: str) -> Chart:
    (chart,) = [chart for chart in drawn if chart.metric == metric]
    return chart


def leaves(html: str) -> list[tuple[str, str]]:
    """Text by element, in order: cells of a head and of a body are cells, blanks are one blank, empty ones no one's."""
    found = [("td" if tag == "th" else tag, " ".join(text.split())) for tag, text in Reader(html).texts]
    return [(tag, text) for tag, text in found if text and tag != "summary"]


@pytest.mark.parametrize("name", ["pair_race", "resting_race"])
def test_the_words_are_those_of_a_markdown_library(name: str, request: pytest.FixtureRequest) -> None:
    markdown = render(read_race(request.getfixturevalue(name)))
    markdown = re.sub(r"^!\[.*\)$", "", markdown, flags=re.M)
    oracle = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    ours = to_html(markdown, lambda *_: pytest.fail("no image is left"))
    assert leaves(ours) == leaves(oracle)


def test_a_bar_in_a_cell_is_text() -> None:
    markdown = table(["x|y", "z"], [["a | b", "`c|d`"], ["|", "||"]])
    ours = leaves(to_html(markdown, lambda *_: ""))
    oracle = MarkdownIt("commonmark").enable("table").render(markdown)
    assert ours == leaves(oracle) and ("td", "||") in ours and ("code", "c|d") in ours


def test_markup_in_the_markdown_is_text() -> None:
    table = f"| x | y |\n|---|---|\n| {HOSTILE} | [a](b) |"
    text = f"a {HOSTILE} **b <i>** `c <b>`\n\n{table}\n\n* {HOSTILE}\n\n```\n</pre>\n```\n"
    reader = Reader(to_html(text, lambda *_: ""))
    table_tags = {"div", "table", "thead", "tbody", "tr", "th", "td"}
    tags = {"p", "strong", "code", "ul", "li", "details", "summary", "pre"} | table_tags
    assert {tag for tag, _ in reader.elements} == tags
    assert [text.strip() for text in reader.named("li")] == [HOSTILE] and reader.named("th")[-1] == HOSTILE
    assert "[a](b)" in reader.named("td")


def test_a_page_asks_for_nothing_and_runs_only_its_own_script(pair_race: Path, tmp_path: Path) -> None:
    spec = pair_race / "race.json"
    spec.write_text(json.dumps(json.loads(spec.read_text()) | {"name": HOSTILE}))
    for path in (*pair_race.glob("runs/quick-*/run.json"), *pair_race.glob("runs/quick-*/summary.json")):
        values = json.loads(path.read_text())
        values |= {"recipe": HOSTILE, "trial_id": f"{HOSTILE}{values['seed']}", "message": HOSTILE}
        path.write_text(json.dumps(values | ({"status": "failed"} if values["seed"] else {})))
    text = write_html(read_race(pair_race), tmp_path / "report.html").read_text()
    reader = Reader(text)
    assert not reader.open
    for tag, attributes in reader.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;")), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", text, re.S)
    assert json.loads(data)["recipes"] == ["baseline", HOSTILE] and HOSTILE not in text
    policies = [attributes["content"] for tag, attributes in reader.elements if "http-equiv" in attributes]
    (policy,) = [policy for policy in policies if policy]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for code in (script, *re.findall(r"<style>(.*?)</style>", text, re.S)):
        assert base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() in policy
    assert not re.search(r"https?://", text)


def test_json_in_a_script_reads_back_and_has_no_markup() -> None:
    value = {"a": "</script><!-- & \u2028", "b": [1.5, None]}
    text = script_json(value)
    assert json.loads(text) == value and not set("<>&\u2028") & set(text)
    with pytest.raises(ValueError):
        script_json(float("nan"))


def test_curves_of_milestones_against_seconds_and_tokens(pair_race: Path) -> None:
    chart = chart_of(charts(read_race(pair_race)), "val/loss")
    assert (chart.unit, chart.group, chart.from_zero) == ("nats/token", "Held-out loss", False)
    seconds, tokens = chart.views
    assert (seconds.axis, tokens.axis) == ("train time (s)", "tokens seen (millions)")
    drawn = {curve.trial: (curve.x, curve.y) for curve in tokens.curves}
    assert drawn["quick-1"] == ([0, 0.0005, 0.001], [4, 2.2, 1.9])
    assert drawn["baseline-0"] == ([0, 0.001, 0.002], [4, 3, 2])
    baseline, quick = seconds.means
    assert (baseline.recipe, baseline.runs, baseline.x) == ("baseline", 2, [0, 10, 20])
    assert baseline.y == pytest.approx([4, 3.1, 2.1]) and quick.y == pytest.approx([4, 2.35, 1.7])
    # The interval of two values: t of one degree of freedom times half their distance.
    quantile = float(stats.t.ppf(0.975, 1))
    assert quick.half == pytest.approx([0, quantile * 0.15, quantile * 0.2], rel=5e-3)


def test_a_run_that_did_not_finish_is_drawn_and_not_averaged(pair_race: Path) -> None:
    (pair_race / "runs" / "quick-1" / "summary.json").unlink()
    race = read_race(pair_race)
    chart = chart_of(charts(race), "val/loss")
    assert [(curve.trial, curve.finished) for curve in chart.views[0].curves][-1] == ("quick-1", False)
    quick = chart.views[0].means[1]
    assert (quick.runs, quick.y, quick.half) == (1, [4, 2.5, 1.5], [None, None, None])
    drawn = Reader(picture(chart, race.recipes)).elements
    kinds = [attributes["class"] for tag, attributes in drawn if tag == "path"]
    assert kinds.count("run arm-1") == 1 and kinds.count("run unfinished arm-1") == 1 and kinds.count("mean arm-1") == 1


def test_a_diverged_run_leaves_a_gap_and_no_figure(tmp_path: Path, run_writer: Writer, milestone_row: RowMaker) -> None:
    rows = [milestone_row(step, step, step, loss) for step, loss in ((1, 3.0), (2, float("inf")), (3, None), (4, 2.0))]
    run_writer(tmp_path, "baseline", 0, rows, {})
    race = read_race(tmp_path)
    chart = chart_of(charts(race), "val/loss")
    (curve,) = chart.views[0].curves
    assert (curve.x, curve.y) == ([1, 4], [3, 2])
    assert not re.search(r"nan|inf", picture(chart, race.recipes))


def test_scores_are_drawn_without_their_counts_and_bounds(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker
) -> None:
    scores = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "n": 100}
    scores |= {"valid": 90.0, "disagreements": 2.0, "truncated": 0.1}
    rows = [milestone_row(1, 1, 1, 3.0) | {f"eval/gsm8k/{name}": value for name, value in scores.items()}]
    run_writer(tmp_path, "baseline", 0, rows, {})
    drawn = charts(read_race(tmp_path))
    assert [chart.metric for chart in drawn if chart.group == "Scores"] == ["eval/gsm8k/accuracy"]
    assert len(chart_of(drawn, "eval/gsm8k/accuracy").views) == 2


def test_many_rows_become_means_of_equal_parts(tmp_path: Path, run_writer: Writer, logged_step: RowMaker) -> None:
    rng = np.random.default_rng(0)
    norms = rng.random(10 * POINTS)
    for seed in (0, 1):
        rows = [logged_step(step + 1, **{"train/grad_norm": norms[step] + seed}) for step in range(len(norms))]
        run_writer(tmp_path, "baseline", seed, rows, {})
    chart = chart_of(charts(read_race(tmp_path)), "train/grad_norm")
    (view,) = chart.views
    # Parts are closed on the left, so each begins with its tenth row and the last one has ten and one.
    first, later = norms[:9].mean(), norms[9:-11].reshape(-1, 10).mean(axis=1)
    expected = [first, *later, norms[-11:].mean()]
    assert len(view.curves[0].y) == POINTS
    assert view.curves[0].y == pytest.approx(expected, rel=1e-4)
    (mean,) = view.means
    assert mean.y == pytest.approx([value + 0.5 for value in expected], abs=0.05) and len(mean.x) == POINTS


def test_the_last_histogram_of_a_run_is_drawn_as_a_density(
    tmp_path: Path, run_writer: Writer, logged_step: RowMaker
) -> None:
    histograms = [{"edges": [0, 1, 3], "counts": counts} for counts in ([9, 1], [3, 1])]
    rows = [logged_step(step, **{"router/difficulty_score_dist": value}) for step, value in enumerate(histograms, 1)]
    run_writer(tmp_path, "baseline", 0, rows, {})
    chart = chart_of(charts(read_race(tmp_path)), "router/difficulty_score_dist")
    assert (chart.views[0].axis, chart.views[0].curves[0].x) == ("score", [0.5, 2])
    assert chart.unit == "density" and chart.views[0].curves[0].y == [0.75, 0.125], "of 1 under the curve"


def test_a_picture_places_its_points(pair_race: Path) -> None:
    race = read_race(pair_race)
    text = picture(chart_of(charts(race), "val/loss"), race.recipes)
    means = re.findall(r'<path class="mean arm-\d" d="M([^"]+)"', text)
    points = np.array([[point.split(",") for point in mean.split("L")] for mean in means], dtype=float)
    assert points[0, :, 0] == pytest.approx([54, 256, 458])
    # What is measured from 5 s on spans 1.5 to 3.2, with a twentieth of it above and below.
    low, high = 1.5 - 0.085, 3.2 + 0.085
    assert points[0, 1:, 1] == pytest.approx([242 - 232 * (y - low) / (high - low) for y in (3.1, 2.1)], abs=0.06)
    assert re.findall(r'class="end arm-\d"[^>]*>(\d)<', text) == ["1", "2"]


def luminance(colour: str) -> float:
    """Relative luminance of sRGB, as the accessibility guidelines (WCAG 2.2) define it."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_every_arm_stands_out_on_light_and_dark(tmp_path: Path, run_writer: Writer, milestone_row: RowMaker) -> None:
    for recipe in ("baseline", *"abcdefgh"):
        run_writer(tmp_path, recipe, 0, [milestone_row(1, 1, 1, 3.0)], {})
    text = page(read_race(tmp_path))
    (cards,) = re.findall(r"--card: light-dark\((#\w+), (#\w+)\)", text)
    arms = re.findall(r"\.arm-\d\{--arm:light-dark\((#\w+),(#\w+)\);--dash:([^}]+)\}", text)
    assert len(arms) == 9 == len(set(arms))
    for arm in arms:
        for colour, card in zip(arm, cards, strict=False):
            lighter, darker = sorted((luminance(colour), luminance(card)), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 3, (colour, card)


def test_pictures_of_resting_layers_are_inside(resting_race: Path) -> None:
    text = page(read_race(resting_race))
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', text)
    assert [caption.split(",")[0] for _, caption in images] == [
        "Layers that learn between probes",
        "Relevance of every layer",
    ]
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for data, _ in images)
    assert 'data-chart="0"><figcaption><strong>updates/active_layers' in text


def test_the_page_of_a_large_race_is_below_a_megabyte(
    tmp_path: Path, run_writer: Writer, milestone_row: RowMaker, logged_step: RowMaker
) -> None:
    rng = np.random.default_rng(0)
    names = ("loss", "tokens_per_sec", "learning_rate", "grad_norm")
    others = ("system/gpu_memory_allocated", "system/gpu_utilization", "router/entropy", "router/kept_fraction")
    metrics = (*(f"train/{name}" for name in names), *others, "router/confidence", "router/active_params")
    for recipe in ("baseline", "a", "b", "c", "d", "e"):
        for seed in range(3):
            noise = rng.random((150, len(metrics))).tolist()
            rows = [logged_step(step, **dict(zip(metrics, noise[step], strict=True))) for step in range(150)]
            rows += [milestone_row(step, step, step, 3.0) for step in range(0, 150, 15)]
            run_writer(tmp_path, recipe, seed, rows, {})
    assert write_html(read_race(tmp_path), tmp_path / "report.html").stat().st_size < 1_000_000
