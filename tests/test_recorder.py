"""What a run says of its speed, where steps end one behind the host or two at once."""

from __future__ import annotations

import pytest
import torch

from cggr_ray.flight import Finished
from cggr_ray.progress import Budget, Progress
from cggr_ray.recorder import Position, Recorder
from cggr_ray.telemetry.tracker import Row

STEPS, SECONDS, ROWS, TOKENS = 20, 0.5, 4, 100


class Kept:
    def __init__(self) -> None:
        self.rows: list[Row] = []

    def log(self, row: Row) -> None:
        self.rows.append(row)

    def finish(self, summary: Row) -> None:
        pass


@pytest.mark.parametrize("drained", [(), (8,), (3, 8, 9, 19)])
@pytest.mark.parametrize("start", [0, 5])
def test_the_rates_are_those_of_steps_that_ended(drained: tuple[int, ...], start: int) -> None:
    """A device that takes half a second a step, one step behind the host but where the host waits for it."""
    kept = Kept()
    began = Position(start, start * TOKENS, start * SECONDS, 0.0, 0.0)
    recorder = Recorder("t", [kept], lambda row: None, Budget(100.0), torch.device("cpu"), ROWS, began, None)
    waiting: list[int] = []

    def land(queued: int, left: int) -> None:
        while len(waiting) > left:
            step = waiting.pop(0)
            # However late the host comes to it.
            now = Position(queued, queued * TOKENS, queued * SECONDS + 0.3, 0.0, 0.0)
            progress = Progress(step, step * SECONDS, 100.0, (step + 1) * TOKENS)
            recorder.step(Finished(progress, {"train/loss": 1.0}, (step + 1) * SECONDS), now, {})

    for step in range(start, start + STEPS):
        waiting.append(step)
        land(step + 1, 0 if step in drained else 1)
    land(start + STEPS, 0)
    recorder.flush()
    assert [row["step"] for row in kept.rows] == list(range(start + 1, start + STEPS + 1))
    assert [row["tokens_seen"] for row in kept.rows] == [row["step"] * TOKENS for row in kept.rows]
    for row in kept.rows:
        assert row["train/tokens_per_sec"] == pytest.approx(TOKENS / SECONDS)
        assert row["train/samples_per_sec"] == pytest.approx(ROWS / SECONDS)
        assert row["train/step_seconds"] == pytest.approx(SECONDS)


def test_steps_that_end_at_one_time_are_one_row_and_the_next_counts_both() -> None:
    kept = Kept()
    began = Position(0, 0, 0.0, 0.0, 0.0)
    recorder = Recorder("t", [kept], lambda row: None, Budget(100.0), torch.device("cpu"), ROWS, began, None)
    for step, seconds in enumerate([0.5, 0.5, 1.5]):
        now = Position(3, 3 * TOKENS, 1.5, 0.0, 0.0)
        progress = Progress(step, 0.0, 100.0, (step + 1) * TOKENS)
        recorder.step(Finished(progress, {"train/loss": 1.0}, seconds), now, {})
    recorder.flush()
    assert [row["step"] for row in kept.rows] == [1, 3]
    assert [row["train/tokens_per_sec"] for row in kept.rows] == [200.0, 200.0]
    assert [row["train/step_seconds"] for row in kept.rows] == [0.5, 0.5]


def test_kept_positions_are_those_of_all_steps_since_the_row_before() -> None:
    """Every eighth step keeps all and takes twice as long, and there is a row for a few steps."""
    kept, seconds, fractions = Kept(), 0.0, []
    recorder = Recorder("t", [kept], lambda row: None, Budget(3000.0), torch.device("cpu"), ROWS,
                        Position(0, 0, 0.0, 0.0, 0.0), None)  # fmt: skip
    for step in range(2000):
        full = step % 8 == 7
        seconds += 1.0 if full else 0.5
        fractions.append(1.0 if full else 0.25)
        now = Position(step + 1, (step + 1) * TOKENS, seconds, 0.0, 0.0)
        values: Row = {"train/loss": 1.0, "router/kept_fraction": fractions[-1]}
        progress = Progress(step, seconds, 3000.0, (step + 1) * TOKENS)
        recorder.step(Finished(progress, values, seconds), now, {})
    recorder.flush()
    ends = [row["step"] for row in kept.rows]
    assert 300 < len(ends) < 600
    for begin, row in zip([0, *ends], kept.rows, strict=False):
        since = fractions[begin : row["step"]]
        assert row["router/kept_fraction"] == pytest.approx(sum(since) / len(since))


@pytest.mark.parametrize("measured", ["updates/relevance", "router/spearman"])
def test_what_few_steps_measure_has_its_row_however_short_they_are(measured: str) -> None:
    """Ten thousand steps in a budget of a thousand rows, one of 64 of which measures."""
    kept = Kept()
    began = Position(0, 0, 0.0, 0.0, 0.0)
    recorder = Recorder("t", [kept], lambda row: None, Budget(5000.0), torch.device("cpu"), ROWS, began, None)
    for step in range(10_000):
        now = Position(step + 1, (step + 1) * TOKENS, (step + 1) * SECONDS, 0.0, 0.0)
        progress = Progress(step, step * SECONDS, 5000.0, (step + 1) * TOKENS)
        values: Row = {"train/loss": 1.0} | ({measured: 0.5} if step % 64 == 0 else {})
        recorder.step(Finished(progress, values, (step + 1) * SECONDS), now, {})
    recorder.flush()
    assert [row["step"] - 1 for row in kept.rows if measured in row] == list(range(0, 10_000, 64))
    assert 1000 <= len(kept.rows) < 1200
    assert all(row["train/tokens_per_sec"] == pytest.approx(TOKENS / SECONDS) for row in kept.rows)
