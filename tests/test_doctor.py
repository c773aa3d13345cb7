"""What doctor says of a machine, and its exit code."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from cggr_ray import cli, doctor_command


@pytest.mark.parametrize(
    ("package", "installed", "problem"),
    [
        ("transformers", "", "problem: transformers is missing"),
        ("torch", "", "problem: torch is missing"),
        ("torch", "2.9.1+cpu", "problem: torch 2.9.1+cpu is older than 2.10"),
        ("torch", "2.13.0+cpu", None),
        ("ray", "0.1", None),
    ],
)
def test_what_is_missing_or_too_old_is_a_problem(
    package: str, installed: str, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    have = doctor_command.version
    monkeypatch.setattr(doctor_command, "version", lambda name: installed if name == package else have(name))
    monkeypatch.setattr(doctor_command.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**40}))
    done = CliRunner().invoke(cli.app, ["doctor"])
    assert f"{package:14} {installed or 'missing'}" in done.output
    if problem is None:
        assert done.exit_code == 0 and "problem" not in done.output
    else:
        assert done.exit_code == 1 and problem in done.output
