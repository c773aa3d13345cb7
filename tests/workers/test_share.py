"""Work that several workers share: all of them have what one would have found."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from cggr_ray.optim.polar import orthogonalise
from cggr_ray.workers import Group

SIZE, HOST, PATIENCE = 3, "127.0.0.1", timedelta(seconds=60)
# Fewer than there are workers; a share each; a last share that is short; a worker without a share of its own.
NUMBERS = (2, 3, 5, 4)


def stack(number: int) -> Tensor:
    return torch.randn(number, 6, 10, generator=torch.Generator().manual_seed(number))


def seen_by(rank: int, port: int, folder: Path) -> None:
    # Whatever this machine's name resolves to.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore(HOST, port, is_master=False, timeout=PATIENCE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=PATIENCE)
    group, calls, found = Group(torch.device("cpu")), list[int](), {}

    def square(part: Tensor) -> Tensor:
        calls.append(len(part))
        return part @ part.mT

    for number in NUMBERS:
        found[f"squares {number}"] = group.share(square, stack(number))
        found[f"polar {number}"] = orthogonalise(stack(number), "polar_express", group)
    compiled = torch.compile(
        lambda x: orthogonalise(x, "polar_express", group) + 1, backend="aot_eager", fullgraph=True
    )
    found["compiled"] = compiled(stack(5))
    torch.save(found | {"calls": torch.tensor(calls)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("share")
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    mp.spawn(seen_by, (store.port, folder), nprocs=SIZE)
    return [torch.load(folder / f"{rank}.pt") for rank in range(SIZE)]


@pytest.mark.parametrize("number", NUMBERS)
def test_every_worker_has_all_of_them_in_order(number: int, found: list[dict[str, Tensor]]) -> None:
    squares = torch.einsum("nmk,nlk->nml", stack(number).double(), stack(number).double())
    polar = orthogonalise(stack(number), "polar_express")
    for one in found:
        torch.testing.assert_close(one[f"squares {number}"].double(), squares, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one[f"polar {number}"], polar, rtol=1e-4, atol=1e-5)
        assert torch.equal(one[f"polar {number}"], found[0][f"polar {number}"])


def test_no_worker_finds_more_than_its_share(found: list[dict[str, Tensor]]) -> None:
    for one in found:
        assert one["calls"].tolist() == [2, 1, 2, 2]


def test_what_shares_compiles_into_one_graph(found: list[dict[str, Tensor]]) -> None:
    for one in found:
        torch.testing.assert_close(one["compiled"], one["polar 5"] + 1)
