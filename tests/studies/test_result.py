"""What is written can be read: strict JSON, a PNG, a table of the same rows; times are of the calls alone."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cggr_ray.studies.result import Panel, Result, table
from cggr_ray.studies.timing import interleaved, peak_mib

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    name: str
    value: float | None
    missing: float | None = None


@dataclass(frozen=True)
class Settings:
    sizes: tuple[int, ...] = (1, 2)


def test_a_result_is_written_whole(tmp_path: Path) -> None:
    rows = [Row("a|b", 0.123456), Row("c", float("nan")), Row("d", None)]
    panels = [Panel("t", "x", "y", {"a": [(1, 2.0), (2, -1.0)], "b": [("word", 1.0)]}, log_y=True)]
    result = Result("demo", rows, panels, ["a note"], {"fact": 1.5}, ["it follows"])
    path = result.write(tmp_path / "new", Settings(), CPU, 2.0)
    record = json.loads((tmp_path / "new" / "demo.json").read_text(), parse_constant=pytest.fail)
    assert [row["value"] for row in record["rows"]] == [0.123456, "nan", None]
    assert record["settings"] == {"sizes": [1, 2]} and record["seconds"] == 2.0 and record["facts"] == {"fact": 1.5}
    assert record["conclusions"] == ["it follows"] and "* it follows\n" in path.read_text()
    assert record["versions"]["torch"] and record["device"]["type"] == "cpu" and record["device"]["cores"] >= 1
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "| a\\|b | 0.1235 |" in path.read_text() and "missing" not in path.read_text()


def test_a_table_has_a_line_a_row() -> None:
    lines = table([{"a": 1, "b": None}, {"a": 2, "b": "x"}]).splitlines()
    assert lines == ["| a | b |", "| --- | --- |", "| 1 |  |", "| 2 | x |"]


def test_rounds_are_interleaved_and_preparing_is_not_timed() -> None:
    order: list[str] = []

    def slow_to_prepare(name: str, milliseconds: float):  # type: ignore[no-untyped-def]
        def prepare():  # type: ignore[no-untyped-def]
            time.sleep(0.05)
            return lambda: (order.append(name), time.sleep(milliseconds / 1e3))

        return prepare

    found = interleaved({"a": slow_to_prepare("a", 1), "b": slow_to_prepare("b", 6)}, 3, CPU)
    assert order == ["a", "b"] * 5
    assert (
        1 <= found["a"].low <= found["a"].median <= found["a"].high and found["a"].low < 40 and found["b"].median >= 6
    )
    assert peak_mib(lambda: None, CPU) is None
