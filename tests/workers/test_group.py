"""A worker that never comes: the others say so, and wait for no day."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cggr_ray.workers import Group

HOST, PATIENCE, FOLLOWS = "127.0.0.1", timedelta(seconds=60), timedelta(seconds=3)
# What it exits with that waited for the other, and seconds after which it still waits.
LOST, LONGEST = 3, 90


def begin(rank: int, port: int, late: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore(HOST, port, is_master=False, timeout=PATIENCE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=FOLLOWS)
    if rank == 1:
        # Alive, and busy with something else: a mistake of its own, say, that it has not said yet.
        store.wait(["said"], PATIENCE)
        os._exit(0)
    try:
        Group(torch.device("cpu"))
    except RuntimeError as error:
        Path(late).write_text(str(error))
        store.set("said", "1")
        # The interpreter's own exit waits for Gloo's threads.
        os._exit(LOST)


@pytest.mark.slow
def test_a_worker_that_never_comes_is_not_waited_for_all_day(tmp_path: Path) -> None:
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    both = [
        context.Process(target=begin, args=(rank, store.port, str(tmp_path / "said")), daemon=True) for rank in range(2)
    ]
    for process in both:
        process.start()
    both[0].join(LONGEST)
    waits = both[0].is_alive()
    for process in both:
        if waits:
            process.kill()
        process.join(LONGEST)
    assert not waits and [process.exitcode for process in both] == [LOST, 0]
    assert (tmp_path / "said").read_text()
