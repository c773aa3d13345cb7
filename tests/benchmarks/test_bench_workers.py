"""`bench workers`: what it makes of the times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cggr_ray.benchmarks import timing, workers, workload
from cggr_ray.benchmarks.rows import Shape
from cggr_ray.data.sources import Problems
from cggr_ray.workers import ALONE


def test_efficiency_is_what_all_do_over_what_as_many_alone_would(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(workload, "Problems", lambda count: Problems(count=200))
    monkeypatch.setattr(timing, "WARM_UP_ROUNDS", 0)
    monkeypatch.setattr("cggr_ray.benchmarks.loop.STEPS_A_CALL", 2)
    monkeypatch.setattr(workers, "STEPS_A_CALL", 2)
    one, several, efficiency = workers.rows_of(
        "baseline", Shape("tiny", 1, 16), torch.device("cpu"), 1, tmp_path, ALONE
    )
    assert [row.unit for row in (one, several, efficiency)] == ["tokens_per_s", "tokens_per_s", "scaling_efficiency"]
    for row in (one, several):
        assert row.value == pytest.approx(16e3 / row.ms_p50, rel=1e-3)
    assert efficiency.value == pytest.approx(one.ms_p50 / several.ms_p50, rel=1e-3)


def test_one_gpu_is_not_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="accepted: at least 2, or device cpu"):
        next(workers.bench_workers(Shape("llama-24m", 1, 16), "cuda", 1, tmp_path))


def test_a_model_that_a_recipe_cannot_run_is_refused_before_any_process_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens need a model of at least 5 layers, 'tiny' has 4"):
        next(workers.bench_workers(Shape("tiny", 1, 16), "cpu", 1, tmp_path))
    assert not [*tmp_path.iterdir()]
