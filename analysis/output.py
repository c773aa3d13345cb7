"""All files of a race's report, from its run folders alone.

benchmark_results.md and its plots      to be read anywhere
report.html                             the same with curves to hover over, one file, offline
training_log_<recipe>.json              every logged row, with units
runs, steps, milestones                 as CSV and as Parquet
"""

from __future__ import annotations

from pathlib import Path

from analysis.frames import read_race
from analysis.html import HTML_FILE, write_html
from analysis.logs import write_logs, write_tables
from analysis.report import PLOTS, REPORT_FILE, layer_plots, render

REPORT_FOLDER = "report"


def write_report(race_folder: Path | str, out: Path | str | None = None) -> Path:
    """Writes all of them; returns the path of the Markdown file.

    Without `out` they go to `report/` in the race folder. Raises ValueError if the folder holds no run, or two recipes
    whose logs would share a file.
    """
    race = read_race(race_folder)
    target = Path(out) if out is not None else race.folder / REPORT_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    write_logs(race, target)
    write_tables(race, target)
    for name, _, plot in (*PLOTS, *layer_plots(race)):
        plot(race, target / name)
    write_html(race, target / HTML_FILE)
    path = target / REPORT_FILE
    path.write_text(render(race), encoding="utf-8")
    return path
