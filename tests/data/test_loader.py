from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from cggr_ray.data.batch import Batch
from cggr_ray.data.loader import ORDER_MARK_ROWS, Loader
from cggr_ray.data.packing import OrderState, PackedRow, RowOrder
from cggr_ray.data.store import TokenStore
from cggr_ray.workers import Workers

ROW_TOKENS = 32
CPU = torch.device("cpu")
MakeStore = Callable[..., TokenStore]


@pytest.fixture
def order(make_store: MakeStore) -> RowOrder:
    rng = random.Random(0)
    return RowOrder([make_store([rng.randint(2, 50) for _ in range(80)])], (1.0,), (None,), ROW_TOKENS, True, 3)


def hand_packed(order: RowOrder, count: int) -> list[PackedRow]:
    state, rows = order.start(), []
    for _ in range(count):
        row, state = order.next_row(state)
        rows.append(row)
    return rows


def same(a: Batch, b: Batch) -> bool:
    pairs = zip(a.micros, b.micros, strict=True)
    return a.tokens == b.tokens and all(
        torch.equal(getattr(x, name), getattr(y, name))
        for x, y in pairs
        for name in ("tokens_BT", "labels_BT", "positions_BT", "position_ids_BT", "document_starts")
    )


@pytest.mark.parametrize(("rows", "micro_rows"), [(4, 4), (6, 2), (5, 2), (3, 8)])
def test_batches_are_the_rows_of_the_order(order: RowOrder, rows: int, micro_rows: int) -> None:
    expected = hand_packed(order, 30 * rows)
    with Loader(order, rows, micro_rows, CPU) as loader:
        for step in range(30):
            batch, wanted = loader.next(), expected[step * rows : (step + 1) * rows]
            assert loader.at.rows_read == (step + 1) * rows
            assert batch.rows == rows
            assert batch.tokens == sum(int((r.position_ids >= 0).sum()) for r in wanted)
            assert batch.labelled == sum(int((r.labels >= 0).sum()) for r in wanted)
            assert [m.index for m in batch.micros] == list(range(len(batch.micros)))
            assert all(m.tokens_BT.shape[0] <= micro_rows for m in batch.micros)
            for name in ("tokens", "labels", "positions", "position_ids"):
                stacked = torch.cat([getattr(m, f"{name}_BT") for m in batch.micros])
                assert np.array_equal(stacked, np.stack([getattr(r, name) for r in wanted]))
        assert loader.tokens_seen == sum(r.real for r in expected)


class One(Workers):
    """One of several workers, of which no other is there."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [2, 3])
def test_workers_share_the_micro_batches_of_one(order: RowOrder, size: int) -> None:
    with ExitStack() as stack:
        whole = stack.enter_context(Loader(order, 12, 2, CPU))
        shares = [stack.enter_context(Loader(order, 12, 2, CPU, workers=One(rank, size))) for rank in range(size)]
        for _ in range(10):
            batch, parts = whole.next(), [loader.next() for loader in shares]
            assert same(batch, Batch(tuple(micro for part in parts for micro in part.micros), batch.tokens))
            assert [micro.index for part in parts for micro in part.micros] == list(range(6))
            assert all([micro.first for micro in part.micros] == [True] + [False] * (6 // size - 1) for part in parts)
            assert {part.tokens for part in parts} == {batch.tokens}
            assert {loader.labelled for loader in shares} == {batch.labelled}
        assert len({json.dumps(loader.state_dict()) for loader in (whole, *shares)}) == 1
        smaller = [loader.smaller(1) for loader in shares]
        assert [micro.index for part in smaller for micro in part.micros] == list(range(12))


def test_what_a_micro_batch_says_about_its_rows(order: RowOrder) -> None:
    with Loader(order, 6, 3, CPU) as loader:
        shapes = set()
        for _ in range(40):
            for micro in loader.next().micros:
                labels, positions = micro.labels_BT, micro.positions_BT
                assert micro.labelled_B.tolist() == [sum(x >= 0 for x in row) for row in labels.tolist()]
                flat = [i for i, p in enumerate(positions.flatten().tolist()) if p == 0]
                starts = micro.document_starts.tolist()
                assert starts[: len(flat)] == flat
                assert set(starts[len(flat) :]) == {positions.numel()}
                assert micro.document_starts.dtype == torch.int32
                assert micro.longest_document >= max(b - a for a, b in pairwise(starts))
                for row, documents in zip(positions.tolist(), micro.documents_BT.tolist(), strict=True):
                    assert documents == [sum(p == 0 for p in row[: i + 1]) for i in range(len(row))]
                shapes.add((tuple(labels.shape), len(starts)))
        assert len(shapes) == 1


def test_a_resumed_loader_goes_on_where_the_batches_were_handed_out(order: RowOrder) -> None:
    with Loader(order, 5, 5, CPU) as loader:
        for _ in range(27):
            loader.next()
        time.sleep(0.05)  # the thread packs batches that nobody has asked for yet
        state: dict[str, Any] = json.loads(json.dumps(loader.state_dict()))
        expected = [loader.next() for _ in range(40)]
        after = loader.state_dict()
    assert state["order"]["rows_read"] == 135
    with Loader(order, 5, 5, CPU, state) as resumed:
        assert resumed.tokens_seen == state["tokens_seen"]
        assert all(same(resumed.next(), batch) for batch in expected)
        assert resumed.state_dict() == after


def test_marks_do_not_depend_on_the_rows_of_a_step(order: RowOrder) -> None:
    marks = []
    for rows in (1, 5, 64, 96):
        with Loader(order, rows, 96, CPU) as loader:
            while loader.at.rows_read < 4 * ORDER_MARK_ROWS:
                loader.next()
            marks.append({k: v for k, v in loader.marks.items() if int(k) <= 4 * ORDER_MARK_ROWS})
    assert sorted(map(int, marks[0])) == [ORDER_MARK_ROWS * i for i in (1, 2, 3, 4)]
    assert all(m == marks[0] for m in marks)


class Failing:
    """An order that fails at its n-th row."""

    def __init__(self, order: RowOrder, error: Exception, at: int) -> None:
        self._order, self._error, self._at = order, error, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._order, name)

    def next_row(self, state: OrderState) -> tuple[PackedRow, OrderState]:
        if state.rows_read >= self._at:
            raise self._error
        return self._order.next_row(state)


@pytest.mark.parametrize("error", [ValueError("bad row"), OSError("gone"), IndexError("past the end")])
def test_an_error_of_the_thread_reaches_the_step(order: RowOrder, error: Exception) -> None:
    with Loader(Failing(order, error, 6), 2, 2, CPU) as loader:
        for _ in range(3):
            loader.next()
        with pytest.raises(type(error), match=str(error)):
            loader.next()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_step_does_not_wait_for_a_thread_that_is_gone(order: RowOrder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cggr_ray.data.loader.ALIVE_SECONDS", 0.02)
    with Loader(Failing(order, KeyError("unforeseen"), 4), 2, 2, CPU) as loader:
        loader.next()
        loader.next()
        with pytest.raises(RuntimeError, match="thread has ended"):
            loader.next()


@pytest.mark.parametrize("taken", [0, 1, 10])
def test_close_ends_the_thread(order: RowOrder, taken: int) -> None:
    before = set(threading.enumerate())
    loader = Loader(order, 4, 4, CPU)
    for _ in range(taken):
        loader.next()
    assert set(threading.enumerate()) - before
    loader.close()
    assert not set(threading.enumerate()) - before
    loader.close()
