"""The interactive report: one HTML file that holds its curves, tables, style and script and asks no network for any."""

from __future__ import annotations

from analysis.html.page import HTML_FILE, write_html

__all__ = ["HTML_FILE", "write_html"]
