"""The `rows` parts: which rows are kept, what a micro-batch of some rows is, and that it trains as these rows alone."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from small_batches import LENGTHS, document_loss, lens_logits, packed, true_scores
from small_models import small_model

from cggr_ray.data.batch import MicroBatch
from cggr_ray.learner import Pass
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress
from cggr_ray.recipe import Recipe
from cggr_ray.routing.curriculum import Curriculum
from cggr_ray.routing.rows import AllRows, FewerRows, HardestRows, RandomRows, row_means, rows_of
from cggr_ray.routing.scores import SCORES

MICRO = packed(LENGTHS, width=21)
TENSORS = ("tokens_BT", "labels_BT", "positions_BT", "position_ids_BT")


def at(step: int = 0, fraction: float = 0.5) -> Progress:
    return Progress(step, 100 * fraction, 100.0, 1)


def rows_in(micro: MicroBatch) -> list[int]:
    """Which rows of MICRO a micro-batch holds; no two rows of it are equal."""
    return [[torch.equal(row, other) for other in MICRO.tokens_BT].index(True) for row in micro.tokens_BT]


# Which rows


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_hardest_rows_by_the_mean_score_of_a_truncated_model(family: str, name: str) -> None:
    model = small_model(family)
    for layers in (1, 2):
        scores = true_scores(lens_logits(model, MICRO, layers), MICRO.labels_BT)[name]
        means = [row[row.isfinite()].mean().item() for row in scores]
        order = sorted(range(7), key=lambda b: -means[b])
        picker = HardestRows(0.25, name, layers).build(0, Adapter(model))
        for ratio, count in ((0.14, 1), (0.25, 2), (3 / 7, 3), (0.5, 4), (0.99, 7), (1.0, 7)):
            assert rows_in(picker.pick(MICRO, ratio, at())) == sorted(order[:count]), (layers, ratio)


def test_rows_without_labels_come_last() -> None:
    labels = MICRO.labels_BT.clone()
    labels[[0, 2, 3]] = -100
    scores = torch.where(labels >= 0, -5.0 - torch.arange(7).float().unsqueeze(1), -torch.inf)
    assert row_means(scores, labels).tolist() == [-math.inf, -6, -math.inf, -math.inf, -9, -10, -11]
    picker = HardestRows(0.5, "entropy", 1).build(0, Adapter(small_model("llama")))
    assert rows_in(picker.pick(replace(MICRO, labels_BT=labels), 4 / 7, at())) == [1, 4, 5, 6]
    nothing = replace(MICRO, labels_BT=torch.full_like(labels, -100))
    assert len(picker.pick(nothing, 0.25, at()).tokens_BT) == 2


def test_a_mean_counts_labelled_positions_alone() -> None:
    scores = torch.tensor([[1.0, 3.0, 100.0], [7.0, 100.0, 100.0]])
    labels = torch.tensor([[4, 0, -100], [1, -100, -100]])
    assert row_means(scores, labels).tolist() == [2.0, 7.0]


def test_random_rows_depend_on_seed_step_and_micro_batch_alone() -> None:
    adapter = Adapter(small_model("llama"))

    def kept(seed: int = 0, step: int = 3, index: int = 0) -> list[list[int]]:
        picker = RandomRows(3 / 7).build(seed, adapter)
        micros = [replace(MICRO, index=index + 10 * i) for i in range(4)]
        return [rows_in(picker.pick(micro, 3 / 7, at(step))) for micro in micros]

    used = RandomRows(3 / 7).build(0, adapter)
    for step in range(3):
        used.pick(MICRO, 3 / 7, at(step))
    assert kept() == kept() and rows_in(used.pick(MICRO, 3 / 7, at(3))) == kept()[0]
    assert all(other != kept() for other in (kept(seed=1), kept(step=4), kept(index=1)))


def test_random_rows_are_drawn_uniformly_and_stay_in_order() -> None:
    picker, draws = RandomRows(3 / 7).build(0, Adapter(small_model("llama"))), 600
    counts = torch.zeros(7)
    for step in range(draws):
        rows = rows_in(picker.pick(MICRO, 3 / 7, at(step)))
        assert rows == sorted(rows) and len(rows) == 3
        counts[rows] += 1
    share = 3 / 7
    z = (counts / draws - share) / math.sqrt(share * (1 - share) / draws)
    assert z.abs().max() < 3.5


@pytest.mark.parametrize("part", [HardestRows(0.25, "loss", 1), RandomRows(0.25)])
def test_counts_are_rounded_up_at_every_level(part: HardestRows | RandomRows) -> None:
    picker = part.build(0, Adapter(small_model("llama")))
    levels = picker.levels()
    assert levels[0] == 0.25 and levels[-1] == 1.0 and len(levels) == 5
    for rows in (1, 2, 4, 7):
        micro = rows_of(MICRO, torch.arange(rows))
        for level in levels:
            found = picker.pick(micro, level, at())
            # Rational arithmetic: levels are multiples of 3/16 from a quarter on.
            assert len(found.tokens_BT) == -(-round(32 * level) * rows // 32), (rows, level)
        assert picker.pick(micro, 1.0, at()) is micro


@pytest.mark.parametrize("part", [HardestRows(0.25), RandomRows(0.25)])
def test_a_share_that_is_no_whole_number_of_rows_is_refused(part: HardestRows | RandomRows) -> None:
    for rows in (4, 8, 100):
        part.check_rows(rows)
    for rows in (1, 2, 3, 5, 6):
        with pytest.raises(ValueError, match=rf"keep = 0\.25 of a micro-batch of {rows} rows.*; accepted: "):
            part.check_rows(rows)
    with pytest.raises(ValueError, match="of 8 rows, which would keep 1; accepted: "):
        replace(part, keep=1e-12).check_rows(8)
    assert HardestRows(layers=3).needs_layers() == 4


def test_rounding_errors_add_no_row() -> None:
    """0.28 * 25 is a little more than 7, and 0.56 * 25 than 14."""
    for keep, rows, expected in ((0.28, 25, 7), (0.56, 25, 14)):
        assert keep * rows > expected
        picker = RandomRows(keep).build(0, Adapter(small_model("llama")))
        assert len(picker.pick(packed([[21]] * rows, 21), keep, at()).tokens_BT) == expected


@pytest.mark.parametrize("make", [lambda c: HardestRows(0.5, layers=1, curriculum=c), lambda c: RandomRows(0.5, c)])
def test_rows_follow_their_curriculum(make: Callable[[Curriculum], HardestRows | RandomRows]) -> None:
    picker = make(Curriculum(0.2, 0.6, 0.9)).build(0, Adapter(small_model("llama")))
    # One eighth of the way from 1 to a half each, never below what the line asks for.
    expected = {0.0: 1.0, 0.2: 1.0, 0.3: 0.875, 0.31: 0.875, 0.4: 0.75, 0.6: 0.5, 0.89: 0.5, 0.9: 1.0, 1.0: 1.0}
    assert {f: picker.ratio(at(fraction=f)) for f in expected} == expected


def test_without_a_choice_nothing_is_left_out() -> None:
    adapter = Adapter(small_model("llama"))
    for part, rows in ((AllRows(), 9), (FewerRows(0.5), 4), (FewerRows(0.01), 1), (FewerRows(1.0), 9)):
        picker = part.build(0, adapter)
        assert part.rows_per_step(9) == rows
        assert picker.levels() == (1.0,) and picker.ratio(at(fraction=0.7)) == 1.0
        assert picker.pick(MICRO, 1.0, at()) is MICRO
        part.check_rows(1)
    assert HardestRows().rows_per_step(9) == RandomRows().rows_per_step(9) == 9


# A micro-batch of some rows


@pytest.mark.parametrize("rows", [[0], [6], [0, 2, 3], [1, 4, 5, 6], list(range(7))])
def test_some_rows_are_a_micro_batch_of_their_own(rows: list[int]) -> None:
    found = rows_of(MICRO, torch.tensor(rows))
    for name in TENSORS:
        assert torch.equal(getattr(found, name), getattr(MICRO, name)[rows]), name
    assert found.longest_document == MICRO.longest_document and found.index == MICRO.index
    positions = MICRO.positions_BT[rows].flatten().tolist()
    starts = [i for i, position in enumerate(positions) if position == 0]
    padded = starts + [len(positions)] * (len(MICRO.document_starts) - len(starts))
    assert found.document_starts.tolist() == padded and found.document_starts.dtype == torch.int32
    assert torch.equal(found.documents_BT, MICRO.documents_BT[rows])


@pytest.mark.parametrize("part", [HardestRows(0.5, "loss", 1), RandomRows(0.5)])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_kept_rows_train_as_if_there_were_no_others(family: str, part: HardestRows | RandomRows) -> None:
    model = small_model(family)
    plain = copy.deepcopy(model)
    picked = part.build(0, adapter := Adapter(model)).pick(MICRO, 0.5, at())
    rows = rows_in(picked)
    assert len(rows) == 4
    expected = document_loss(plain, MICRO, rows)
    expected.backward()
    scale = 1 / (picked.labels_BT >= 0).sum()
    loss, _ = Pass(Recipe("x", rows=part), adapter, 0, 147)(picked, scale, 1.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=2e-5, msg=name)


# Mistakes


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda _: HardestRows(0.0), "keep = 0.0"),
        (lambda _: HardestRows(1.01), "keep = 1.01"),
        (lambda _: HardestRows(math.nan), "keep = nan"),
        (lambda _: HardestRows(layers=0), "layers = 0"),
        (lambda _: RandomRows(-0.5), "keep = -0.5"),
        (lambda _: RandomRows(2.0), "keep = 2.0"),
        (lambda _: FewerRows(0.0), "fraction = 0.0"),
        (lambda _: FewerRows(1.5), "fraction = 1.5"),
        (lambda adapter: HardestRows(layers=3).build(0, adapter), "layers = 3 of a model with 3"),
        (lambda adapter: HardestRows().build(0, adapter), "layers = 4 of a model with 3"),
    ],
)
def test_mistakes_name_the_value(make: Callable[[Adapter], object], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        make(Adapter(small_model("llama")))
    assert "accepted: " in str(error.value) and "\n" not in str(error.value)
