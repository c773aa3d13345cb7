"""The queries of the README, run as they stand there on generated sweeps."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sweep_folders import drawn, ended, planted, result, write_run_of, write_sweep
from written_rows import milestone

README = Path(__file__).resolve().parents[2] / "README.md"
SECTION = "Query the results of sweeps"


def answers(source: str) -> list[Any]:
    """The value of each block's last expression, all blocks in one namespace."""
    section = source.split(f"## {SECTION}\n")[1].split("\n## ")[0]
    known: dict[str, Any] = {}
    found = []
    for block in re.findall(r"```python\n(.*?)```", section, flags=re.S):
        *statements, last = ast.parse(block).body
        assert isinstance(last, ast.Expr)
        exec(compile(ast.Module(statements, []), "README.md", "exec"), known)
        found.append(eval(compile(ast.Expression(last.value), "README.md", "eval"), known))
    return found


def test_the_readme_s_queries_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(tmp_path / "outputs" / "sweep-one")
    events = [drawn(0, x=1.0), result(0, 20.0, 1.25), ended(0, "finished", 1.25, 20.0)]
    other = write_sweep(tmp_path / "outputs" / "sweep-two", events, space="other")
    write_run_of(other, 0, [milestone(5, 5.0, 500, 3.0), milestone(20, 20.0, 2000, 1.25)])
    write_sweep(tmp_path / "outputs" / "sweep-begun", [])
    monkeypatch.chdir(tmp_path)
    best, important, losses, curve, failures = answers(README.read_text())
    assert isinstance(best, pd.DataFrame) and len(best) == 4
    assert best.loc[("other", "sweep-two", "t0000"), "val/loss"] == 1.25
    assert best.loc["mine"]["val/loss"].is_monotonic_increasing
    assert important.loc["sweep-one"]["hyperparameter"].iloc[0] == "lr"
    assert losses.loc[("sweep-two", 20.0)].tolist() == [1, 1.25, 1.25, 1.25]
    assert losses.loc["sweep-one"].index.tolist() == [5.0, 10.0, 20.0] and losses["count"].iloc[0] == 38
    assert curve["val/loss"].tolist() == [3.0, 1.25]
    assert failures.loc[("sweep-one", "out_of_memory", "CUDA out of memory. Tried 2 GiB")].tolist() == [1, "t0007"]
    assert failures.loc[("sweep-one", "unfinished", "has not ended")].tolist() == [1, "t0039"]
