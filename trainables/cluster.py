"""Starting and stopping Ray: local and bound to loopback unless an address is given."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants, services, utils
from ray._private.services import canonicalize_bootstrap_address
from ray.air.execution._internal.actor_manager import RayActorManager, TrackedActor, TrackedActorTask
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.execution import class_cache, tune_controller

from cggr_ray.stopping import Signals, StoppedError, signals
from trainables.address import settle_address

# Trials pass next to nothing through Ray's object store; its smallest size leaves the memory to them.
OBJECT_STORE_BYTES = 256 << 20
# Seconds that a cluster has to be reached in.
REACHED_IN = 10.0
# Tune hands these of the driver to its workers by a way that Ray writes into its logs. Nodes have credentials of their
# own; those of a local session have the driver's environment.
class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}


class Deaths(RayActorManager):
    """Where a machine has hardly any memory left, Ray ends a process on it and says so by an error that Tune takes for
    its own mistake: all trials would end with that one. Here it is a death like others."""

    def _actor_start_failed(self, tracked_actor: TrackedActor, exception: Exception) -> None:
        super()._actor_start_failed(tracked_actor, as_death(exception))

    def _actor_task_failed(self, tracked_actor_task: TrackedActorTask, exception: Exception) -> None:
        super()._actor_task_failed(tracked_actor_task, as_death(exception))


def as_death(error: Exception) -> Exception:
    """The error itself, if it is not that one; of that its first line, without Ray's advice."""
    return RayActorError(error_msg=str(error).splitlines()[0]) if isinstance(error, OutOfMemoryError) else error


tune_controller.RayActorManager = Deaths  # type: ignore[misc]


class Apart(services.ConsolePopen):
    """A process that a Ray session starts, in a process group of its own: what a terminal, `timeout` or a shell's
    `kill %1` send to the group of this process is not for Ray's."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named, process_group=0)


services.ConsolePopen = Apart  # type: ignore[misc]


def check_reached(address: str) -> None:
    """Whether anything listens at the address of a cluster. Ray would ask for a quarter of an hour.

    Raises:
        ValueError: nothing does, or it is no address.
    """
    if address != "auto" and not re.fullmatch(r"[^/\s]+:\d+", address):
        raise ValueError(f"address {address!r}; accepted: auto or host:port of a Ray cluster that runs")
    try:
        host, colon, port = (canonicalize_bootstrap_address(address) or "").rpartition(":")
        if not colon:
            raise ConnectionError
        socket.create_connection((host.strip("[]"), int(port)), REACHED_IN).close()
    except OSError:
        raise ValueError(f"address {address!r}: no Ray cluster answers there; "
                         "accepted: auto or host:port of one that runs") from None  # fmt: skip


@contextmanager
def starting() -> Iterator[Signals]:
    """Inside, the first SIGTERM or Ctrl-C waits until Ray has started, which leaves behind what it has begun to start;
    the second ends the process at once. Ray would take SIGTERM for itself, and end there."""
    own = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        with signals() as asked:
            yield asked
    finally:
        utils.set_sigterm_handler = own


@contextmanager
def cluster(address: str | None, dashboard: bool = False) -> Iterator[list[dict[str, float]]]:
    """A Ray session; yields the resources of each of its machines and shuts down what it started.

    Args:
        address: of a running cluster (`auto`, `host:port`); None starts a local one on 127.0.0.1.
        dashboard: needed where trials with workers are stopped early, or die: Ray frees their GPU through it.

    Raises:
        ValueError: nothing answers at the address.
        StoppedError: SIGTERM or Ctrl-C while Ray started.
    """
    with starting() as asked:
        _start(address, dashboard)
    try:
        if asked():
            name = signal.Signals(asked.signum).name
            raise StoppedError(f"stopped by {name} before anything ran; --resume goes on", asked.signum)
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def _start(address: str | None, dashboard: bool) -> None:
    own = {"worker_process_setup_hook": settle_address}
    if address:
        os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "1"
        ray_constants.ENABLE_RAY_CLUSTER = True
        try:
            ray.init(address=address, runtime_env=own, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError:
            raise ValueError(f"address {address!r}: no Ray cluster answers there; "
                             "accepted: auto or host:port of one that runs") from None  # fmt: skip
    else:
        ray.init(
            # Else it would join a cluster that somebody else has started on this machine.
            address="local",
            runtime_env=own,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
