"""All files of a report, from the folder of a race or a sweep alone. Of a race:

benchmark_results.md and its plots      to be read anywhere
report.html                             the same with curves to hover over, one file, offline
training_log_<recipe>.json              every logged row, with units
runs, steps, milestones                 as CSV and as Parquet

Of a sweep the first two, with trials and results as CSV and as Parquet.
"""

from __future__ import annotations

from pathlib import Path

from analysis.frames import Race, read_race
from analysis.html import HTML_FILE, write_html
from analysis.html.sweep import write_sweep_html
from analysis.logs import write_logs, write_tables
from analysis.report import REPORT_FILE, layer_plots, race_plots, render, summary_table
from analysis.sweep_report import best_table, headline, render_sweep, sweep_plots
from analysis.sweeps import Sweep, is_sweep, read_sweep

REPORT_FOLDER = "report"


def write_report(folder: Path | str, out: Path | str | None = None) -> Path:
    """Writes all of them; returns the path of the Markdown file.

    Without `out` they go to `report/` in the folder of the race or sweep. Raises ValueError if two recipes' logs would
    share a file and, before anything is written, if there is no run and no trial, or runs that cannot be compared.
    """
    found = read_sweep(folder) if is_sweep(folder) else read_race(folder)
    if isinstance(found, Sweep) and not len(found.trials):
        raise ValueError(f"no trial in {found.folder}; accepted: a sweep that has drawn one")
    text = render_sweep(found) if isinstance(found, Sweep) else render(found)
    target = Path(out) if out is not None else found.folder / REPORT_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    if isinstance(found, Sweep):
        _write_sweep(found, target)
    else:
        _write_race(found, target)
    path = target / REPORT_FILE
    path.write_text(text, "utf-8")
    return path


def report_summary(folder: Path | str) -> str:
    """The same in a few lines of plain text, for a terminal."""
    if not is_sweep(folder):
        return summary_table(read_race(folder))
    sweep = read_sweep(folder)
    return f"{headline(sweep)}\n\n{best_table(sweep, 'simple')}"


def _write_race(race: Race, target: Path) -> None:
    """Writes all but the Markdown."""
    write_logs(race, target)
    write_tables(race, target)
    for name, _, plot in (*race_plots(race), *layer_plots(race)):
        plot(race, target / name)
    write_html(race, target / HTML_FILE)


def _write_sweep(sweep: Sweep, target: Path) -> None:
    write_tables(sweep, target)
    for name, _, plot in sweep_plots(sweep):
        plot(sweep, target / name)
    write_sweep_html(sweep, target / HTML_FILE)
