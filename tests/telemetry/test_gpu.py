from __future__ import annotations

import platform
from pathlib import Path

import torch

from cggr_ray.telemetry.gpu import cpu_name, device_info, device_row


def test_a_cpu_has_no_device_rows() -> None:
    assert device_row(torch.device("cpu")) == {}
    info = device_info(torch.device("cpu"))
    assert info["type"] == "cpu"
    assert info["name"] == cpu_name()


def test_a_cpu_is_named_by_its_model_where_it_says_it(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2: GHz\n\nprocessor\t: 1\nmodel name\t: Other\n")
    assert cpu_name(file) == "Some CPU @ 2: GHz"
    file.write_text("processor\t: 0\nBogoMIPS\t: 50\n")
    assert cpu_name(file) == cpu_name(tmp_path / "none") == (platform.processor() or platform.machine())
