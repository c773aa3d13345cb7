"""Starting and stopping Ray: local and bound to loopback unless an address is given."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants

# Trials pass next to nothing through Ray's object store; its smallest size leaves the memory to them.
OBJECT_STORE_BYTES = 256 << 20


@contextmanager
def cluster(address: str | None, dashboard: bool = False) -> Iterator[dict[str, float]]:
    """A Ray session; yields the cluster's resources and shuts down what it started.

    Args:
        address: of a running cluster (`auto`, `host:port`); None starts a local one on 127.0.0.1.
        dashboard: needed where trials with workers are stopped early: Ray frees their GPU through it.
    """
    if address:
        os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "1"
        ray_constants.ENABLE_RAY_CLUSTER = True
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(
            include_dashboard=dashboard,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()
