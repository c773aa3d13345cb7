"""Two workers with a row each, joined by DistributedDataParallel, against the mean of both gradients by hand."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from small_models import small_model
from torch.nn.parallel import DistributedDataParallel

from cggr_ray import CGGRModel

pytestmark = pytest.mark.slow

ROWS, POSITIONS, KEPT = 2, 24, 0.25
HOST, PATIENCE = "127.0.0.1", timedelta(seconds=90)


def kept_model(plan: str) -> CGGRModel:
    model = small_model("llama")
    kept = CGGRModel(
        model, min_tokens_ratio=KEPT, warmup_steps=1, dynamic_threshold=False, scoring="loss", plan=plan, detach="live"
    )
    kept.step()
    return kept


def tokens() -> torch.Tensor:
    return torch.randint(96, (ROWS, POSITIONS), generator=torch.Generator().manual_seed(3))


def worker(rank: int, port: int, folder: str, plan: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore(HOST, port, is_master=False, timeout=PATIENCE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=PATIENCE)
    torch.set_num_threads(1)
    wrapped = DistributedDataParallel(kept_model(plan))
    row = tokens()[rank : rank + 1]
    wrapped(row, labels=row).backward()
    gradients = {name: p.grad for name, p in wrapped.module.model.named_parameters()}
    save_file({name: g.contiguous() for name, g in gradients.items()}, f"{folder}/gradients-{rank}.safetensors")
    dist.barrier()
    # The interpreter's own exit waits for Gloo's threads, and now and then they for it.
    os._exit(0)


@pytest.mark.parametrize("plan", ["after", "two_pass"])
def test_workers_average_the_gradients_of_their_kept_rows(plan: str, tmp_path: Path) -> None:
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    mp.spawn(worker, (store.port, str(tmp_path), plan), nprocs=2, daemon=True)
    found = [load_file(tmp_path / f"gradients-{rank}.safetensors") for rank in range(2)]
    expected = []
    for rank in range(2):
        kept = kept_model(plan)
        row = tokens()[rank : rank + 1]
        kept(row, labels=row).backward()
        expected.append({name: p.grad for name, p in kept.model.named_parameters()})
    for name, gradient in expected[0].items():
        mean = (gradient + expected[1][name]) / 2
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], mean, rtol=1e-5, atol=1e-6)
