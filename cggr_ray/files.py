"""Small files that are whole or absent: written aside, renamed."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes UTF-8 text, in place of what is there. A process that is killed leaves the old file, or none."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
