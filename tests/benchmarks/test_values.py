"""What the rows of benchmarks say of given times; and that the baselines of a step do the same step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cggr_ray.benchmarks import head_stats, logit_stats, loop, memory, optimizer, peers, step, workload
from cggr_ray.benchmarks.rows import BenchRow, Shape
from cggr_ray.benchmarks.timing import Timing
from cggr_ray.data.sources import Problems
from cggr_ray.models.adapter import Adapter
from cggr_ray.routing.tokens import AllTokens

CPU = torch.device("cpu")
Values = dict[tuple[str, str], float]


def values(
    module: ModuleType, bench: Callable[..., list[BenchRow]], shape: Shape, given: Mapping[str, float], folder: Path
) -> Values:
    """What a benchmark finds when its providers take the milliseconds given, and the others, which do not run, 1000."""

    def timed(providers: Mapping[str, Callable[[], None]], *_: Any, **__: Any) -> dict[str, Timing]:
        for name in given:
            providers[name]()
        return {name: Timing(1.0, given.get(name, 1000.0), 2000.0, 0.0) for name in providers}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "interleaved", timed)
        return {(row.provider, row.unit): row.value for row in bench(shape, "cpu", 1, folder)}


@pytest.fixture
def small_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "Problems", lambda count: Problems(count=200))
    monkeypatch.setattr(loop, "STEPS_A_CALL", 2)
    monkeypatch.setattr(peers, "PEERS", {})


def test_head_stats_are_a_part_of_the_rate_of_a_product(tmp_path: Path) -> None:
    given = {"ours": 4.0, "eager": 8.0, "matmul_512": 2.0}
    found = values(head_stats, head_stats.bench_head_stats, Shape("v50", 20, 8), given, tmp_path)
    rate = 2 * 512**3 / 2.0
    # A multiplication and an addition for every weight of the head and every row.
    assert found["ours", "of_matmul"] == pytest.approx(2 * 20 * 8 * 50 / 4.0 / rate, abs=1e-5)
    assert found["matmul_512", "TFLOP/s"] == pytest.approx(rate * 1e3 / 1e12, abs=1e-5)
    assert found["ours", "nll_error_micronats"] < 10


def test_logit_stats_read_once_what_a_copy_reads_and_writes(tmp_path: Path) -> None:
    given = {"ours": 3.0, "copy": 4.0}
    found = values(logit_stats, logit_stats.bench_logit_stats, Shape("fp32", 20, 50), given, tmp_path)
    assert found["ours", "of_copy"] == pytest.approx(4.0 / (2 * 3.0), abs=1e-5)
    assert found["copy", "GB/s"] == pytest.approx(2 * 20 * 50 * 4 / 4e-3 / 1e9, abs=1e-5)


def test_a_step_is_measured_against_the_fastest_baseline(tmp_path: Path) -> None:
    given = {"full_blocks": 90.0, "full_blocks_chunked": 60.0, "full_whole": 80.0, "kept_0.25_own_const": 40.0}
    found = values(step, step.bench_step, Shape("tiny", 1, 16), given, tmp_path)
    assert found["full_blocks", "speedup"] == pytest.approx(60 / 90, abs=1e-5)
    assert found["kept_0.25_own_const", "speedup"] == pytest.approx(60 / 40)
    assert found["suffix_0.5", "limit_share"] == pytest.approx(
        60 / 1000 / found["suffix_0.5", "arithmetic_limit"], abs=1e-4
    )
    assert 1 < found["kept_0.25_own_live", "arithmetic_limit"] < found["kept_0.25_own_const", "arithmetic_limit"]


@pytest.mark.usefixtures("small_run")
def test_our_loop_is_measured_against_a_bare_one(tmp_path: Path) -> None:
    given = {"ours": 300.0, "bare_blocks": 200.0}
    found = values(loop, loop.bench_loop, Shape("tiny", 1, 16), given, tmp_path)
    assert found["bare_blocks", "ours_over_this"] == pytest.approx(1.5)
    assert found["bare_whole", "ours_over_this"] == pytest.approx(0.3)


@pytest.mark.usefixtures("small_run")
def test_an_update_is_a_part_of_a_step_with_it(tmp_path: Path) -> None:
    given = {"muon_fp32": 20.0, "muon_int8": 40.0, "forward_backward": 60.0}
    found = values(optimizer, optimizer.bench_optimizer, Shape("tiny", 1, 16), given, tmp_path)
    assert found["muon_fp32", "step_fraction"] == pytest.approx(20 / 80)
    assert found["muon_int8", "step_fraction"] == pytest.approx(40 / 100)
    assert found["muon_int8", "of_muon_fp32"] == pytest.approx(2)


def test_baselines_of_a_step_have_the_gradients_of_the_plain_model() -> None:
    torch.manual_seed(0)
    work = step.Work(Shape("tiny", 2, 24), CPU)
    logits = work.model(input_ids=work.micro.tokens_BT).logits
    F.cross_entropy(logits.flatten(0, 1), work.micro.labels_BT.flatten()).backward()
    expected = [p.grad for p in work.parameters]
    found: list[list[Tensor | None]] = []

    def drop() -> None:
        found.append([p.grad for p in work.parameters])
        for p in work.parameters:
            p.grad = None

    with pytest.MonkeyPatch.context() as patch:
        drop()
        patch.setattr(work, "_drop_gradients", drop)
        calls = work.full()
        for call in calls.values():
            call()
    assert {"full_blocks", "full_blocks_chunked", "full_whole"} <= calls.keys()
    for gradients in found[1:]:
        for gradient, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("most", [1, 3, 8, 13, 100])
def test_the_search_for_the_largest_micro_batch_ends_within_its_promise(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a device that fails beyond so many rows, at a quarter of its memory."""
    tried: list[int] = []

    def peak(part: AllTokens, adapter: Adapter, shape: Shape) -> float | None:
        tried.append(shape.rows)
        return None if shape.rows > most else 10.0 + shape.rows

    monkeypatch.setattr(memory, "peak_of", peak)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: type("", (), {"total_memory": (12 + 4 * most) << 20})
    )
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10 << 20)
    work = Adapter(step.random_model("tiny", CPU, torch.float32))
    rows, used = memory.most_rows(AllTokens(), work, Shape("tiny", 8, 16), 12)
    assert used == 10.0 + rows and rows <= most <= rows + max(0, round(0.03 * rows) - 1) and len(tried) <= 10
