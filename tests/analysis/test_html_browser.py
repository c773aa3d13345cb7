"""The HTML report in a headless Chromium: phone and desk, light and dark, keys and buttons; skipped without one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, find_browser, headless
from sweep_folders import planted

from analysis.frames import read_race
from analysis.html import write_html
from analysis.html.sweep import write_sweep_html
from analysis.sweeps import read_sweep

EXECUTABLE = find_browser()
pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium or Chrome is installed")
WIDTHS = (390, 1280)
MEANS = "document.querySelector('figure.chart').querySelectorAll('path.mean').length"
READ = "document.querySelector('figure.chart output').textContent"
CLICK = "[...document.querySelectorAll('figure.chart button')].find((b) => b.textContent === '{}').click()"
AXIS = "document.querySelector('figure.chart text.title').textContent"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert EXECUTABLE is not None
    with headless(EXECUTABLE, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def report(pair_race: Path, tmp_path: Path) -> Path:
    """The report of a race one of whose runs failed with a message that is longer than a line, and hostile."""
    summary = pair_race / "runs" / "quick-1" / "summary.json"
    message = "</script><script>console.error(1)</script>" + "w" * 300
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": "failed", "message": message}))
    return write_html(read_race(pair_race), tmp_path / "report.html")


@pytest.fixture(scope="module")
def sweep_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    return write_sweep_html(read_sweep(planted(folder / "planted")), folder / "report.html")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_a_sweep_is_whole_at_every_width(tab: Page, sweep_report: Path, width: int) -> None:
    tab.messages.clear()
    tab.requests.clear()
    tab.open(sweep_report, width, dark=width == WIDTHS[0])
    assert tab.messages == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [sweep_report.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # Pictures are decoded, the best trials' curves drawn, and a trial's line has the colour of its shade.
    assert tab.evaluate("[...document.images].every((i) => i.naturalWidth > 0)") and tab.evaluate(MEANS) == 8
    stroke = "getComputedStyle([...document.querySelectorAll('.coordinates .trial')].at(-1)).stroke"
    assert tab.evaluate(stroke).startswith("rgb(")
    assert tab.evaluate("document.querySelectorAll('.coordinates .trial').length") == 38
    # The box of the coordinates scrolls by itself where it is wider than the page.
    box = tab.evaluate("(() => { const b = document.querySelector('.coordinates').parentElement;"
                       " return [b.scrollWidth, b.clientWidth]; })()")  # fmt: skip
    assert box[1] <= width and (width == WIDTHS[1] or box[0] > box[1])


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_whole_at_every_width(tab: Page, report: Path, width: int, dark: bool) -> None:
    tab.messages.clear()
    tab.requests.clear()
    tab.open(report, width, dark)
    assert tab.messages == []
    assert tab.requests == [report.as_uri()]
    assert tab.evaluate("innerWidth") == width
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # On a desk no table has to be moved to be read, not even the fifteen columns of the ledgers.
    tables = tab.evaluate("[...document.querySelectorAll('.scroll')].map((s) => [s.scrollWidth, s.clientWidth])")
    assert len(tables) > 5 and (width == WIDTHS[0] or all(inner <= outer for inner, outer in tables))
    # Every chart has been drawn at the width it has, and its lines lie in its frame.
    widths = "[...document.querySelectorAll('svg.plot')].map((s) => [s.viewBox.baseVal.width, s.clientWidth])"
    sizes = tab.evaluate(widths)
    assert len(sizes) == 3 and all(abs(drawn - shown) <= 1 for drawn, shown in sizes)
    assert tab.evaluate(MEANS) == 2
    line = tab.evaluate("document.querySelector('path.mean').getAttribute('d')")
    ends = [float(point.split(",")[0]) for point in line.removeprefix("M").split("L")]
    assert ends == pytest.approx([54, 54 + (sizes[0][0] - 76) / 2, sizes[0][0] - 22], abs=0.1)
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")


def test_arms_axes_and_keys_answer(tab: Page, report: Path) -> None:
    tab.messages.clear()
    tab.open(report, 390)
    assert tab.evaluate(AXIS) == "train time (s)"
    assert "the end of each line 1 baseline 2.1 ± 1.3 2 quick 1.5" in tab.evaluate(READ)
    tab.evaluate("document.querySelector('figure.chart svg').focus()")
    tab.press("Home")
    assert "train time (s): 0" in tab.evaluate(READ) and "quick 4" in tab.evaluate(READ)
    tab.press("ArrowRight")
    assert "train time (s): 10" in tab.evaluate(READ) and "baseline 3.1" in tab.evaluate(READ)
    tab.evaluate(CLICK.format("tokens seen"))
    assert tab.evaluate(AXIS) == "tokens seen (millions)"
    tab.evaluate(CLICK.format("log x"))
    tab.evaluate(CLICK.format("log y"))
    assert tab.evaluate(MEANS) == 2
    tab.evaluate("document.querySelector('.arms input').click()")
    assert tab.evaluate(MEANS) == 1 and "baseline" not in tab.evaluate(READ)
    tab.evaluate("document.querySelector('.arms input').click()")
    assert tab.evaluate(MEANS) == 2
    tab.evaluate("document.querySelector('.arms input').click()")
    tab.evaluate("[...document.querySelectorAll('.arms input')].at(-1).click()")
    assert tab.evaluate(MEANS) == 0 and tab.evaluate(AXIS).startswith("no arm is shown")
    assert tab.messages == []


def test_the_pointer_reads_the_nearest_milestone(tab: Page, report: Path) -> None:
    tab.open(report, 1280)
    tab.evaluate("document.querySelector('figure.chart').scrollIntoView()")
    x, y, wide = tab.evaluate(
        "(() => { const r = document.querySelector('figure.chart svg').getBoundingClientRect();"
        " return [r.x, r.y, r.width]; })()"
    )
    # The frame lies between 54 and 22 pixels of margin; 0.4 of it is nearest to 10 s of 20 s.
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + 54 + 0.4 * (wide - 76), y=y + 60)
    assert "train time (s): 10" in tab.evaluate(READ)


def test_the_theme_button_turns_the_page_over(tab: Page, report: Path) -> None:
    tab.open(report, 390, dark=True)
    paper = "getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate("document.querySelector('.theme').textContent") == "Light"
    tab.evaluate("document.querySelector('.theme').click()")
    assert tab.evaluate(paper) == "rgb(255, 255, 255)"
    tab.evaluate("document.querySelector('.theme').click()")
    assert tab.evaluate(paper) == "rgb(20, 23, 26)"


def test_without_script_the_curves_are_there(tab: Page, report: Path) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(report, 390)
        assert tab.evaluate(MEANS) == 2 and tab.evaluate("document.querySelector('.controls')") is None
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        colour = "getComputedStyle(document.querySelector('path.mean')).stroke"
        assert tab.evaluate(colour).startswith("rgb(")
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
