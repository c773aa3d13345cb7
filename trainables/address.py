"""Which cluster a process of it belongs to, where several run on a machine."""

from __future__ import annotations

import os

import ray


def settle_address() -> None:
    """Run by every process of a cluster when it starts. Ray frees what a dead trial's workers hold by asking its own
    dashboard, which it looks for among all of a machine; it gives up where it finds those of two races."""
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
