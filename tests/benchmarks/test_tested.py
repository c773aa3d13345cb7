"""A benchmark runs its tests once for the same files."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from cggr_ray import benchmarks


def test_tests_run_until_they_pass_and_again_when_a_file_has_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package, tests = tmp_path / "cggr_ray" / "benchmarks", tmp_path / "tests" / "optim"
    for folder in (package, tests):
        folder.mkdir(parents=True)
    (code := package / "__init__.py").write_text("x = 1\n")
    (tests / "test_x.py").write_text("")
    codes, commands = [1, 0, 0], []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=codes[len(commands) - 1], stdout="one failed")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(benchmarks, "__file__", str(code))
    with pytest.raises(ValueError, match=r"(?s)'optimizer' refused, its tests fail.*one failed"):
        benchmarks.check_tests("optimizer")
    for _ in range(3):
        benchmarks.check_tests("optimizer")
    assert len(commands) == 2 and commands[0][-1] == str(tests)
    code.write_text("x = 2\n")
    benchmarks.check_tests("optimizer")
    assert len(commands) == 3
