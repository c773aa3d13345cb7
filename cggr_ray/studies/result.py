"""What a study leaves behind: rows of one dataclass, and what to plot of them; as JSON, PNG and a Markdown table.

In the JSON a number that is not finite is the text `nan`, `inf` or `-inf`; null is what was not measured.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cggr_ray.environment import fingerprint

DPI = 130
# Okabe and Ito's palette, which survives colour blindness.
PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
Point = tuple[float | str, float]


@dataclass(frozen=True)
class Panel:
    """One set of axes. A series is a name and its points; x may be words, which are drawn as the lines of a table.
    `log_y` draws positive values only."""

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[Point]]
    log_y: bool = False


@dataclass(frozen=True)
class Result:
    """`rows` are instances of one dataclass, `facts` what holds for all of them, `notes` how to read the columns,
    `conclusions` what follows from the rows."""

    name: str
    rows: Sequence[Any]
    panels: Sequence[Panel]
    notes: Sequence[str]
    facts: Mapping[str, Any]
    conclusions: Sequence[str]

    def write(self, folder: Path, settings: Any, device: torch.device, seconds: float) -> Path:
        """Writes NAME.json, NAME.png and NAME.md; the path of the last."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [asdict(row) for row in self.rows]
        record = {
            "study": self.name,
            "settings": asdict(settings),
            "versions": fingerprint(),
            "device": device_fingerprint(device),
            "seconds": seconds,
            "conclusions": list(self.conclusions),
            "facts": dict(self.facts),
            "notes": list(self.notes),
            "rows": rows,
        }
        (folder / f"{self.name}.json").write_text(json.dumps(_plain(record), indent=1, allow_nan=False))
        draw(self.panels, folder / f"{self.name}.png")
        path = folder / f"{self.name}.md"
        path.write_text(self._page(rows, device))
        return path

    def _page(self, rows: Sequence[Mapping[str, Any]], device: torch.device) -> str:
        where, versions = device_fingerprint(device), fingerprint()
        ran = f"{where['name']}, torch {versions['torch']}, commit {versions['commit'] or 'unknown'}."
        facts = "".join(f"* {key}: {_cell(value)}\n" for key, value in self.facts.items())
        notes = "".join(f"* {note}\n" for note in self.notes)
        concluded = "".join(f"* {conclusion}\n" for conclusion in self.conclusions)
        plot = f"![{self.name}]({self.name}.png)\n"
        return f"# {self.name}\n\n{ran}\n\n{concluded}\n## Rows\n\n{facts}{notes}\n{table(rows)}\n\n{plot}"


def device_fingerprint(device: torch.device) -> dict[str, Any]:
    """What the study ran on: type, name, and the CPU cores or the bytes of GPU memory."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return {"type": "cuda", "name": torch.cuda.get_device_name(device), "memory_bytes": memory}
    return {"type": device.type, "name": f"CPU ({platform.machine()})", "cores": os.cpu_count()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows with the same keys; columns that are empty in every row are left out."""
    columns = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    lines = [columns, ["---"] * len(columns), *([_cell(row[key]) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(panels: Sequence[Panel], path: Path) -> None:
    """The panels side by side, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = max((len(_words(panel)) for panel in panels), default=0)
    figure = Figure(figsize=((7.0 if lines else 5.2) * len(panels), max(4.0, 1.0 + 0.4 * lines)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        words, scale = _words(panel), "log" if panel.log_y else "linear"
        for i, (name, points) in enumerate(panel.series.items()):
            shown = [point for point in points if math.isfinite(point[1]) and (point[1] > 0 or not panel.log_y)]
            x, y = [point[0] for point in shown], [point[1] for point in shown]
            drawn = (y, [words.index(str(word)) for word in x]) if words else (x, y)
            # Words have no order that a line could follow.
            line, colour = "none" if words else "-", PALETTE[i % len(PALETTE)]
            axes.plot(*drawn, marker="o", linestyle=line, markersize=5, label=name, color=colour)
        along, across = ("x", "y") if words else ("y", "x")
        axes.set(title=panel.title, **{f"{along}label": panel.y, f"{across}label": panel.x, f"{along}scale": scale})
        if words:
            axes.set_yticks(range(len(words)), words)
            axes.invert_yaxis()
        axes.grid(alpha=0.3)
        if panel.series:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)


def _words(panel: Panel) -> list[str]:
    """Every x once, in order, where some of them are words; else nothing."""
    found = [x for points in panel.series.values() for x, _ in points]
    return list(dict.fromkeys(map(str, found))) if any(isinstance(x, str) for x in found) else []


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def _plain(value: Any) -> Any:
    """The same with numbers that JSON does not have as text."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
