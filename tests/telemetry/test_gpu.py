from __future__ import annotations

import torch

from cggr_ray.telemetry.gpu import device_info, device_row


def test_a_cpu_has_no_device_rows() -> None:
    assert device_row(torch.device("cpu")) == {}
    info = device_info(torch.device("cpu"))
    assert info["type"] == "cpu"
    assert info["name"]
