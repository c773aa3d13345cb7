"""What the peak of a run counts."""

from __future__ import annotations

import gc

import pytest
import torch
from on_gpu import DEVICE

from cggr_ray.telemetry.gpu import peak_bytes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SIZE = 64 << 20


def test_what_a_graph_works_in_counts_as_what_a_launch_allocates() -> None:
    x = torch.ones(SIZE // 4, device=DEVICE)

    def work() -> torch.Tensor:
        # Three tensors of the size at once, of which one stays.
        return (x + 1) * (x + 2)

    work()
    torch.cuda.synchronize()
    # Other tests ran in this process, and their pools may go any time.
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = peak_bytes(DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    graph.replay()
    torch.cuda.synchronize()
    # The result stays allocated, beside what was there.
    assert 2 * SIZE <= peak_bytes(DEVICE) - torch.cuda.max_memory_allocated(DEVICE) <= 3 * SIZE
    assert peak_bytes(DEVICE) >= before and result[0].item() == 6
