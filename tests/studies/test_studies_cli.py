"""Every study from the command line to its three files, on a small model and small shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_studies import Folders
from typer.testing import CliRunner

from cggr_ray import cli

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


def run(out: Path, device: str, name: str, *options: str) -> dict[str, Any]:
    """The JSON of a study that ran through the command line."""
    done = CliRunner().invoke(cli.app, ["study", name, "--out", str(out), "--device", device, *options])
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.json", f"{name}.md", f"{name}.png"]
    assert f"# {name}" in done.output and str(out) in done.output
    record: dict[str, Any] = json.loads((out / f"{name}.json").read_text(), parse_constant=pytest.fail)
    assert record["study"] == name and record["versions"]["torch"] and record["device"]["type"] == device
    page = (out / f"{name}.md").read_text()
    # A line for what is found, before the table.
    heard = done.output[: done.output.index(f"# {name}")]
    assert all(said(name, row) in heard for row in record["rows"])
    assert len(page.splitlines()) > len(record["rows"]) and record["conclusions"]
    assert all(f"* {line}\n" in page and line in done.output for line in record["conclusions"])
    return record


def said(name: str, row: dict[str, Any]) -> str:
    """What a study says of a row as soon as it is measured."""
    if name == "attention-backends":
        return f"{row['shape']} {row['mask']}: "
    return f"{row['method']} {row['kind']} at {row['fraction']:.3g}: loss {row['loss_change']:+.4f} nats/token\n"


@on_every_device
def test_low_rank(device: str, folders: Folders, tmp_path: Path) -> None:
    options = ["--fractions", "0.25,1", "--kinds", "q,gate,all", "--steps", "2"]
    rows = run(tmp_path / "out", device, "low-rank", *folders.options(), *options)["rows"]
    found = {(row["method"], row["fraction"], row["kind"]): row for row in rows}
    assert len(found) == len(rows) == 4 * 2 * 3
    for name in ("svd", "data_aware", "plus_diag"):
        for kind in ("q", "gate", "all"):
            low, full = found[name, 0.25, kind], found[name, 1.0, kind]
            assert full["weight_error"] < 1e-3 and full["output_error"] < 1e-3
            # On a GPU the replacement is rounded to bf16 where it lies between two values.
            assert abs(full["loss_change"]) < (1e-3 if device == "cpu" else 2e-2)
            assert 0 < low["output_error"] < 1.5 and low["ms"] > 0 and low["ms_full"] > 0
            assert low["weight_error"] > 0.1 and math.isfinite(low["loss"])
    # Rank 8 of a 48 x 32 gate at 32 tokens: 2 * 32 * 8 * (48 + 32) flops for 2 * 32 * 48 * 32.
    gate = found["svd", 0.25, "gate"]
    assert (gate["kept"], gate["break_even"]) == (8, pytest.approx(19.2))
    assert (gate["flops"], gate["flops_full"]) == (40960, 98304)
    assert found["plus_diag", 0.25, "q"]["flops"] == 2 * 32 * (8 * 64 + 32)
    assert found["svd", 0.25, "all"]["break_even"] is None
    assert found["svd", 0.25, "gate"]["weight_error"] < found["data_aware", 0.25, "gate"]["weight_error"]


@on_every_device
def test_structured_mlp(device: str, folders: Folders, tmp_path: Path) -> None:
    options = ["--fractions", "0.5,1", "--block", "8"]
    rows = run(tmp_path / "out", device, "structured-mlp", *folders.options(), *options)["rows"]
    found = {(row["method"], row["fraction"]): row for row in rows}
    assert set(found) == {(m, f) for m in ("drop", "refit") for f in (0.5, 1.0)} | {("two_four", 0.5)}
    half = found["drop", 0.5]
    assert half["kept"] == 24 and half["flops"] * 2 == half["flops_full"] == 3 * 2 * 32 * 32 * 48
    assert half["ms"] > 0 and found["two_four", 0.5]["ms"] is None
    assert found["drop", 1.0]["output_error"] == 0 and found["drop", 1.0]["loss_change"] == 0
    assert found["refit", 1.0]["output_error"] < 1e-3
    assert 0 < found["two_four", 0.5]["output_error"] < half["output_error"]


def test_fractions_are_what_whole_blocks_come_to(folders: Folders, tmp_path: Path) -> None:
    # Three blocks of 16 channels: two fractions come to two of them, the largest to all.
    options = ["--fractions", "0.4,0.6,0.75,0.9", "--block", "16", "--methods", "drop"]
    rows = run(tmp_path / "out", "cpu", "structured-mlp", *folders.options(), *options)["rows"]
    drops = [(row["fraction"], row["kept"]) for row in rows if row["method"] == "drop"]
    assert drops == [(pytest.approx(16 / 48), 16), (pytest.approx(32 / 48), 32), (1.0, 48)]
    assert all(row["flops"] == row["fraction"] * row["flops_full"] for row in rows if row["method"] == "drop")


@on_every_device
def test_attention_backends(device: str, tmp_path: Path) -> None:
    options = ["--shapes", "1x32x2x1x16", "--masks", "causal,window", "--rounds", "2"]
    record = run(tmp_path / "out", device, "attention-backends", *options)
    rows = {(row["mask"], row["backend"]): row for row in record["rows"]}
    assert len(rows) == 2 * 7 and record["settings"]["shapes"] == ["1x32x2x1x16"]
    assert rows["causal", "math"]["forward_tflops"] > 0 and rows["window", "math"]["backward_ms"] > 0
    for row in rows.values():
        ran = [row[name] is not None for name in ("forward_ms", "backward_ms", "error", "gradient_error")]
        assert all(ran) == (row["unavailable"] is None), row
        assert row["error"] is None or row["error"] < (1e-5 if device == "cpu" else 5e-2)
    if device == "cuda":
        assert {"math", "flex", "varlen"} <= {name for (_, name), row in rows.items() if row["backward_ms"]}


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    done = CliRunner().invoke(cli.app, ["study", "attention-backends", "--out", str(tmp_path)])
    assert isinstance(done.exception, ValueError) and "is not an empty folder; accepted" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_word_for_a_device_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["study", "attention-backends", "--device", "gpu", "--out", str(tmp_path / "a")])
    assert isinstance(done.exception, ValueError) and "device 'gpu'; accepted: auto, cpu, cuda" in str(done.exception)
    assert not (tmp_path / "a").exists()
