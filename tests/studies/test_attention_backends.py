"""Masks and flops counted pair by pair, every backend that runs here against float64, reasons where one does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cggr_ray.studies.attention import BACKENDS, MASKS, AttentionShape, Cell, exact
from cggr_ray.studies.attention_backends import Settings, cell_rows, try_backend

CPU = torch.device("cpu")
SHAPES = ("2x24x4x2x8", "1x17x3x3x16")


def seen_by_hand(cell: Cell, row: int, i: int, j: int) -> bool:
    first = max(start for start in range(i + 1) if int(cell.first_BT[row, start]) == start)
    return {
        "causal": j <= i,
        "documents": first <= j <= i,
        "window": i - cell.shape.positions // 4 < j <= i,
    }[cell.mask]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("text", SHAPES)
def test_masks_starts_and_flops_pair_by_pair(text: str, mask: str) -> None:
    cell = Cell.of(AttentionShape.parse(text), mask, CPU)
    rows, positions = cell.shape.rows, cell.shape.positions
    pairs = 0
    for row in range(rows):
        for i in range(positions):
            for j in range(positions):
                assert bool(cell.seen_B1TT[row, 0, i, j]) == seen_by_hand(cell, row, i, j)
                pairs += seen_by_hand(cell, row, i, j)
    assert cell.forward_flops == 4 * cell.shape.heads * cell.shape.head_dim * pairs
    documents = 8 if mask == "documents" else 1
    assert len(cell.starts) == rows * documents + 1 and cell.starts[-1] == rows * positions
    assert cell.longest == int(cell.starts.diff().max()) <= positions


def test_flops_of_plain_causal_attention_by_hand() -> None:
    # Two products of 16 heads of 64 for 1024 * 1025 / 2 pairs in each of 4 rows.
    cell = Cell.of(AttentionShape.parse("4x1024x16x4x64"), "causal", CPU)
    assert cell.forward_flops == 4 * 2 * 2 * 16 * 64 * 524800


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("text", SHAPES)
def test_exact_is_softmax_in_float64_query_by_query(text: str, mask: str) -> None:
    cell = Cell.of(AttentionShape.parse(text), mask, CPU)
    inputs, gradient = cell.inputs(torch.float32)
    q, k, v = (x.detach().double().requires_grad_() for x in inputs)
    s = cell.shape
    out = torch.zeros(s.rows, s.positions, s.heads, s.head_dim, dtype=torch.float64)
    for row in range(s.rows):
        for head in range(s.heads):
            group = head // (s.heads // s.kv_heads)
            for i in range(s.positions):
                keys = [j for j in range(s.positions) if seen_by_hand(cell, row, i, j)]
                weights = (k[row, keys, group] @ q[row, i, head] * s.head_dim**-0.5).softmax(0)
                out[row, i, head] = weights @ v[row, keys, group]
    gradients = torch.autograd.grad(out, (q, k, v), gradient.double())
    for found, wanted in zip(exact(cell, inputs, gradient), (out, *gradients), strict=True):
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("text", SHAPES)
def test_backends_that_run_here_agree_and_the_others_say_why_not(text: str, mask: str) -> None:
    cell = Cell.of(AttentionShape.parse(text), mask, CPU)
    rows = {row.backend: row for row in cell_rows(cell, list(BACKENDS), 1, torch.float32)}
    assert list(rows) == list(BACKENDS)
    for name in ("math", "flash"):
        assert rows[name].unavailable is None and (rows[name].forward_ms or 0) > 0 and (rows[name].backward_ms or 0) > 0
    for row in rows.values():
        assert (row.error is None) == (row.forward_ms is None)
        assert row.error is None or row.error < 1e-5
        assert row.gradient_error is None or row.gradient_error < 1e-4
        if row.backward_ms is None:
            assert row.unavailable is not None and ":" in row.unavailable
    # flex_attention has no backward on a CPU, so its masks are compared without one.
    inputs, gradient = cell.inputs(torch.float32)
    flex = BACKENDS["flex"](cell)(*(x.detach() for x in inputs))
    torch.testing.assert_close(flex, exact(cell, inputs, gradient)[0])
    math = rows["math"]
    assert math.forward_ms and math.forward_tflops == pytest.approx(cell.forward_flops / math.forward_ms / 1e9)
    assert math.backward_ms and math.backward_tflops == pytest.approx(2.5 * cell.forward_flops / math.backward_ms / 1e9)


def test_a_reason_is_kept_and_a_fault_of_ours_is_not_hidden() -> None:
    cell = Cell.of(AttentionShape.parse(SHAPES[0]), "causal", CPU)
    inputs, gradient = cell.inputs(torch.float32)
    wanted = exact(cell, inputs, gradient)

    def refuses(_: Cell) -> object:
        raise NotImplementedError("no kernel for this\nand a long trace")

    def faulty(_: Cell) -> object:
        raise KeyError("ours")

    trial = try_backend(refuses, cell, inputs, gradient, wanted)  # type: ignore[arg-type]
    assert trial.forward is None and trial.columns == {"unavailable": "NotImplementedError: no kernel for this"}
    with pytest.raises(KeyError, match="ours"):
        try_backend(faulty, cell, inputs, gradient, wanted)  # type: ignore[arg-type]

    def wrong(_: Cell) -> object:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return q + 1

        return attend

    assert try_backend(wrong, cell, inputs, gradient, wanted).columns["error"] > 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shapes": ("4x16x3x2x8",)}, "2 key-value heads do not divide 3 heads"),
        ({"shapes": ("1x4x1x1x8",)}, "4 positions; accepted: at least 8"),
        ({"masks": ("causl",)}, "did you mean 'causal'"),
        ({"backends": ()}, "backends: none; accepted: math"),
        ({"rounds": 0}, "rounds = 0; accepted: at least 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings(**settings)  # type: ignore[arg-type]
