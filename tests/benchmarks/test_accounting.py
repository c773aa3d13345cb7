"""Bytes that are counted, against the shapes of a model worked out by hand."""

from __future__ import annotations

import pytest
import torch

from cggr_ray.benchmarks.accounting import FIRST, Training, accounting, live_bytes
from cggr_ray.benchmarks.optimizers import OPTIMIZERS
from cggr_ray.benchmarks.rows import Shape
from cggr_ray.benchmarks.step import NOW

CPU = torch.device("cpu")
# The preset `tiny`: 4 layers of width 128, 4 heads and 2 key-value heads of 32, inner width 384, 2048 tokens, tied.
SQUARE, NARROW, WIDE = 128 * 128, 64 * 128, 384 * 128
MATRICES = 4 * (2 * SQUARE + 2 * NARROW + 3 * WIDE)
EMBEDDING, NORMS = 2048 * 128, 9 * 128
PARAMETERS = MATRICES + EMBEDDING + NORMS


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {name: {} for name in OPTIMIZERS}
    for row in accounting(Shape("tiny", 1, 16), CPU):
        found[row.provider][row.unit] = row.value
    return found


def test_weights_and_gradients(rows: dict[str, dict[str, float]]) -> None:
    for name, values in rows.items():
        assert values["weights_bytes"] == 4 * PARAMETERS and values["master_bytes"] == 0
        if name != "e3_full":
            assert values["gradient_bytes"] == 4 * PARAMETERS


def test_states(rows: dict[str, dict[str, float]]) -> None:
    # Every stack of AdamW counts its steps: four shapes of matrices, the embedding, the norms.
    state = {name: values["optimizer_bytes"] for name, values in rows.items()}
    assert state["adamw_fp32"] == 8 * PARAMETERS + 4 * 6
    assert state["muon_fp32"] == 4 * MATRICES + 8 * (EMBEDDING + NORMS) + 4 * 2
    codes = 1 + 2 / 128
    assert state["muon_int8"] == codes * (MATRICES + 2 * EMBEDDING) + 8 * NORMS + 4 * 2
    # A quarter of the shorter side: rank 32 of 128, 16 of 64.
    low = 4 * (2 * 32 * 128 + 2 * 16 * 128 + 3 * 32 * 384)
    bases = 4 * (2 * 32 * 128 + 2 * 16 * 64 + 3 * 32 * 128)
    assert state["galore"] == 4 * (low + bases) + 8 * (EMBEDDING + NORMS) + 4 * 2
    assert rows["e3_full"]["gradient_bytes"] == 4 * (low + EMBEDDING + NORMS)
    assert rows["muon_int8"]["optimizer_of_muon_fp32"] == pytest.approx(
        state["muon_int8"] / state["muon_fp32"], abs=1e-5
    )


def test_views_of_one_storage_count_once() -> None:
    x = torch.zeros(10, 10)
    assert live_bytes([x, x[2:], x.mT, torch.zeros(3, dtype=torch.int8)]) == 403


def test_a_second_step_holds_what_the_first_held() -> None:
    training = Training(Shape("tiny", 1, 16), OPTIMIZERS["e3_full"], CPU, torch.float32)
    training.backward(FIRST)
    first = training.held()
    training.optimizer.step(FIRST)
    training.backward(NOW)
    assert training.held() == first
