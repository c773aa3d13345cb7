from __future__ import annotations

import random

import pytest

from cggr_ray.clock import RaceClock, SteppedClock
from cggr_ray.schema import LEDGERS

ON_BUDGET = {"train", "data_wait"}


class Hand:
    """A clock turned by hand, in sixty-fourths of a second so that sums are exact."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def turn(self, ticks: int) -> float:
        self.now += ticks / 64
        return ticks / 64


@pytest.mark.parametrize("seed", range(20))
def test_ledgers_add_up_to_the_wall_clock_for_any_sequence_of_switches(seed: int) -> None:
    rng, hand = random.Random(seed), Hand()
    clock = RaceClock(now=hand)
    expected = dict.fromkeys(LEDGERS, 0.0)
    running = "idle"
    for _ in range(200):
        expected[running] += hand.turn(rng.randrange(1000))
        if rng.random() < 0.3:
            assert clock.ledgers == expected
        if rng.random() < 0.3:
            assert clock.train_seconds == expected["train"] + expected["data_wait"]
        running = rng.choice(LEDGERS)
        clock.switch(running)
    assert clock.ledgers == expected
    assert sum(clock.ledgers.values()) == hand.now - 1000.0


@pytest.mark.parametrize("seed", range(5))
def test_the_device_is_synchronised_at_the_edge_of_the_budget_and_nowhere_else(seed: int) -> None:
    rng, calls = random.Random(seed), []
    clock = RaceClock(synchronise=lambda: calls.append(1), now=Hand())
    running = "idle"
    for _ in range(200):
        target = rng.choice(LEDGERS)
        before = len(calls)
        clock.switch(target)
        assert len(calls) - before == ((running in ON_BUDGET) != (target in ON_BUDGET))
        before = len(calls)
        assert sum(clock.ledgers.values()) == clock.train_seconds == 0
        assert len(calls) == before
        running = target


def test_waiting_for_the_device_is_charged_to_the_ledger_that_queued_the_work() -> None:
    hand = Hand()
    clock = RaceClock(synchronise=lambda: hand.turn(64), now=hand)
    clock.switch("train")
    clock.switch("evaluation")
    clock.switch("train")
    ledgers = clock.ledgers
    assert (ledgers["idle"], ledgers["train"], ledgers["evaluation"]) == (1.0, 1.0, 1.0)


class Queue:
    """A device that does what it was given in order, and a host that runs ahead of it. Times in sixty-fourths."""

    def __init__(self, hand: Hand) -> None:
        self.hand, self.free_at = hand, hand.now

    def give(self, ticks: int) -> None:
        self.free_at = max(self.free_at, self.hand.now) + ticks / 64

    def synchronise(self) -> None:
        self.hand.now = max(self.hand.now, self.free_at)

    def event(self) -> Recorded:
        return Recorded(max(self.free_at, self.hand.now))


class Recorded:
    def __init__(self, passed_at: float) -> None:
        self.passed_at = passed_at

    def elapsed_time(self, later: Recorded) -> float:
        return 1000 * (later.passed_at - self.passed_at)


@pytest.mark.parametrize("seed", range(20))
def test_a_mark_is_when_the_device_passed_it_however_far_the_host_was_ahead(seed: int) -> None:
    """Steps that are queued faster than they are done, with work off the budget between some of them."""
    rng, hand = random.Random(seed), Hand()
    queue = Queue(hand)
    clock = RaceClock(queue.synchronise, hand, queue.event)
    clock.restore({**dict.fromkeys(LEDGERS, 0.0), "train": 5.0})
    marks, expected, done = [], [], 5.0
    clock.switch("train")
    for _ in range(100):
        ticks = rng.randrange(8, 64)
        queue.give(ticks)
        # The host is a part of the step's time busy with it, so that the device is never without work.
        hand.turn(rng.randrange(8))
        done += ticks / 64
        marks.append(clock.mark())
        expected.append(done)
        if rng.random() < 0.2:
            with clock.ledger(rng.choice(["evaluation", "reporting"])):
                queue.give(rng.randrange(640))
                hand.turn(rng.randrange(640))
    clock.switch("idle")
    assert [mark() for mark in marks] == expected
    assert clock.train_seconds == expected[-1]


def test_without_a_device_a_mark_is_now() -> None:
    hand = Hand()
    clock = RaceClock(now=hand)
    clock.switch("train")
    hand.turn(64)
    mark = clock.mark()
    hand.turn(64)
    assert mark() == 1.0


def test_a_ledger_context_returns_to_the_ledger_before_it_even_after_an_error() -> None:
    hand = Hand()
    clock = RaceClock(now=hand)
    clock.switch("train")
    hand.turn(64)
    with clock.ledger("evaluation"):
        hand.turn(128)
        with pytest.raises(RuntimeError), clock.ledger("reporting"):
            hand.turn(256)
            raise RuntimeError
        hand.turn(512)
    hand.turn(1024)
    ledgers = clock.ledgers
    assert (ledgers["train"], ledgers["evaluation"], ledgers["reporting"]) == (1 + 16, 2 + 8, 4)
    assert clock.train_seconds == 17


def test_an_unknown_ledger_is_refused_and_changes_nothing() -> None:
    hand = Hand()
    clock = RaceClock(now=hand)
    clock.switch("train")
    with pytest.raises(ValueError, match=r"'trian'.*data_wait"):
        clock.switch("trian")
    hand.turn(64)
    assert clock.ledgers["train"] == 1


def test_earlier_parts_of_a_run_are_carried() -> None:
    hand = Hand()
    clock = RaceClock(now=hand)
    clock.restore({**dict.fromkeys(LEDGERS, 0.0), "train": 5.0, "data_wait": 0.5})
    clock.switch("data_wait")
    hand.turn(32)
    assert clock.train_seconds == 6.0
    assert clock.ledgers["evaluation"] == 0


def test_what_ran_before_restoring_is_forgotten_and_the_ledger_runs_on() -> None:
    hand = Hand()
    clock = RaceClock(now=hand)
    clock.switch("warm_up")
    before = clock.ledgers
    hand.turn(64)
    with clock.ledger("train"):
        hand.turn(128)
    clock.restore(before)
    assert clock.ledgers == dict.fromkeys(LEDGERS, 0.0)
    hand.turn(64)
    assert clock.ledgers["warm_up"] == 1.0


def test_a_stepped_clock_moves_by_ticks_alone() -> None:
    clock = SteppedClock(0.25)
    clock.restore({**dict.fromkeys(LEDGERS, 0.0), "train": 1.0})
    clock.switch("train")
    assert clock.train_seconds == 1.0
    for _ in range(3):
        clock.tick()
    with clock.ledger("evaluation"):
        assert clock.train_seconds == 1.75
    assert clock.ledgers == {**dict.fromkeys(LEDGERS, 0.0), "train": 1.75}


def test_a_real_clock_agrees_with_time_itself() -> None:
    import time

    start = time.perf_counter()
    clock = RaceClock()
    clock.switch("train")
    time.sleep(0.02)
    seconds = clock.train_seconds
    assert 0.02 <= seconds <= time.perf_counter() - start
