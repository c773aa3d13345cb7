"""`report.html` of a race: the words and tables of the Markdown report, and curves to hover over and rescale.

One file that asks no network for anything: its style, script, figures and pictures are inside, and its policy forbids
all else. A plotting library would put one to five megabytes into every report that is committed; the curves need three
hundred lines of script instead, and stay visible without it. What comes from a race is text or JSON, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from html import escape
from itertools import groupby
from pathlib import Path

from analysis.frames import Race
from analysis.html.curves import Chart, charts
from analysis.html.markup import Image, inline, to_html
from analysis.html.svg import picture
from analysis.measures import FINISHED
from analysis.plots import ZOOM_FRACTION, styles
from analysis.report import LAYER_PLOTS, render

HTML_FILE = "report.html"
STYLE = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")
# The section of the Markdown report that the interactive curves replace.
CURVES_TITLE = "Curves"
# What stands in for the palette's colours that have less contrast than 3:1 on a dark or a light page.
IN_THE_DARK = {"#000000": "#f2f2f2", "#0072B2": "#4aa8e8", "#D55E00": "#f08032", "#009E73": "#2fc79a"}
ON_PAPER = {"#F0E442": "#9a8f00", "#56B4E9": "#2c93cf", "#E69F00": "#b87f00", "#CC79A7": "#b85c8e"}
DASHES = {"-": "none", "--": "7 4", ":": "2 3", "-.": "7 3 2 3"}
NOTE = """\
A thin line is one run, dotted if it did not finish; a thick line with its number is the mean of a recipe's finished
runs, with the 95 % Student t interval as a band. It ends where the first of them did, up to a step before the tables
measure. Long runs are shown as means of equal parts of the time, so single spikes are flattened: every logged row is
in the CSV files. An axis leaves out what lies beyond all values after the first quarter, until "whole range" is
pressed."""


def write_html(race: Race, path: Path | str) -> Path:
    """Writes the page of a race to `path`, whose folder exists; returns the path. Raises ValueError as `render`."""
    target = Path(path)
    target.write_text(page(race), encoding="utf-8")
    return target


def page(race: Race) -> str:
    """The whole page."""
    drawn = charts(race)
    plots = {file: plot for file, _, plot in LAYER_PLOTS}
    data = {"recipes": race.recipes, "zoom": ZOOM_FRACTION, "charts": [asdict(chart) for chart in drawn]}
    image = partial(embedded, lambda name, path: plots[name](race, path))
    return document(render(race), image, {CURVES_TITLE: _curves(race, drawn)}, arm_style(race.recipes), data)


def document(markdown: str, image: Image, instead: Mapping[str, str], more_style: str, data: object) -> str:
    """A report's Markdown as a page of its own.

    Args:
        image: HTML of a picture by its name and caption.
        instead: HTML of sections by their headings, for those that are more than their Markdown.
        more_style: CSS of this page alone.
        data: what the script reads: arms, `zoom`, charts.
    """
    header, *sections = re.split(r"^## ", markdown, flags=re.M)
    title, _, lead = header.partition("\n")
    pieces, links = [], []
    for number, section in enumerate(sections):
        heading, _, body = section.partition("\n")
        content = instead[heading] if heading in instead else to_html(body, image)
        pieces.append(f'<section id="s{number}"><h2>{inline(heading)}</h2>{content}</section>')
        links.append(f'<li><a href="#s{number}">{inline(heading)}</a></li>')
    name = title.removeprefix("# ")
    style = STYLE.read_text(encoding="utf-8") + more_style
    script = SCRIPT.read_text(encoding="utf-8")
    body = (
        f"<header><h1>{inline(name)}</h1>{to_html(lead, image)}"
        f'<nav aria-label="Sections"><ul>{"".join(links)}</ul></nav></header><main>{"".join(pieces)}</main>'
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(style, script)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{style}</style></head>\n<body>{body}\n"
        f'<script type="application/json" id="race">{script_json(data)}</script>\n<script>{script}</script>'
        "</body></html>\n"
    )


def script_json(value: object) -> str:
    """JSON that can stand inside a script element: no `<` that could end it or open a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(style: str, script: str) -> str:
    """Runs and shows what is in the file, and nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def arm_style(arms: list[str]) -> str:
    """One class an arm, the first of them the baseline, with its colour on light and dark and its dash."""
    lines = []
    for number, (colour, dash) in enumerate(styles(arms, arms[0]).values()):
        light, dark = ON_PAPER.get(colour, colour), IN_THE_DARK.get(colour, colour)
        lines.append(f".arm-{number}{{--arm:light-dark({light},{dark});--dash:{DASHES[dash]}}}")
    return "\n".join(lines) + "\n"


def _curves(race: Race, drawn: Sequence[Chart]) -> str:
    """The arms to toggle, then the charts by group."""
    if not drawn:
        return f"<p>{escape(NOTE)}</p>{_arms(race)}<p>No run measured anything.</p>"
    return f"<p>{escape(NOTE)}</p>{_arms(race)}{chart_groups(drawn, race.recipes)}"


def chart_groups(drawn: Sequence[Chart], arms: Sequence[str]) -> str:
    """The charts under the headings of their groups."""
    pieces = []
    for group, members in groupby(enumerate(drawn), key=lambda member: member[1].group):
        figures = "".join(_figure(number, chart, arms) for number, chart in members)
        pieces.append(f'<h3>{escape(group)}</h3><div class="charts">{figures}</div>')
    return "".join(pieces)


def _arms(race: Race) -> str:
    labels = []
    for recipe in race.recipes:
        status = race.runs.loc[race.runs["recipe"] == recipe, "status"]
        labels.append((recipe, f"{int((status == FINISHED).sum())}/{len(status)} finished"))
    return legend("Arms", labels)


def legend(title: str, labels: Iterable[tuple[str, str]]) -> str:
    """A checkbox an arm, by its name and a few words; the script wakes the boxes."""
    boxes = [
        f'<label class="arm-{number}"><input type="checkbox" checked disabled value="{escape(name)}">'
        f'<b class="key">{number + 1}</b> {escape(name)} <small>{escape(words)}</small></label>'
        for number, (name, words) in enumerate(labels)
    ]
    return f'<fieldset class="arms"><legend>{escape(title)}</legend><div>{"".join(boxes)}</div></fieldset>'


def _figure(number: int, chart: Chart, recipes: Sequence[str]) -> str:
    unit = "" if chart.unit == "1" else escape(chart.unit)
    return (
        f'<figure class="chart" data-chart="{number}"><figcaption><strong>{escape(chart.metric)}</strong> '
        f"<span>{unit}</span><small>{escape(chart.meaning)}</small></figcaption>"
        f"{picture(chart, recipes)}</figure>"
    )


def embedded(draw: Callable[[str, Path], Path], name: str, caption: str) -> str:
    """A picture of the Markdown report, drawn again and put into the page."""
    with tempfile.TemporaryDirectory() as folder:
        data = base64.b64encode(draw(name, Path(folder) / name).read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
