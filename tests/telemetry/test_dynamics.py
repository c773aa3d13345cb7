"""What a step says of single positions, layers and buckets, against Hugging Face's own losses and torch's gradients."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_batches import LENGTHS, document_spans, packed
from small_models import small_model

from cggr_ray.data.batch import Batch
from cggr_ray.flight import Flight
from cggr_ray.learner import Learner
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress
from cggr_ray.recipe import Recipe
from cggr_ray.routing.scores import NATS

WIDTH = 21
MICROS = (packed(LENGTHS, WIDTH), packed(LENGTHS, WIDTH, seed=1, index=1))
BATCH = Batch(MICROS, sum(m.labelled for m in MICROS))
AT = Progress(0, 50.0, 100.0, 10**6)


def step(values: dict[str, Any], family: str = "llama") -> dict[str, Any]:
    """The values of one step on two micro-batches as a row has them."""
    recipe = Recipe("x").with_values(values)
    learner = Learner(recipe, Adapter(copy.deepcopy(small_model(family))), 0, 1000)
    flight = Flight(torch.device("cpu"))
    flight.push(learner.step(BATCH, AT), lambda: 0.0)
    return flight.land(all_steps=True)[0].values


def token_losses(family: str) -> list[np.ndarray]:
    """Losses of the labelled positions of each micro-batch, one document at a time, by Hugging Face alone."""
    model, found = small_model(family), []
    for micro in MICROS:
        parts = []
        for row, span in document_spans(micro):
            logits = model(input_ids=micro.tokens_BT[row : row + 1, span]).logits[0].detach()
            labels = micro.labels_BT[row, span]
            parts.append(F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")[labels >= 0])
        found.append(torch.cat(parts).numpy())
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_of_single_positions(family: str) -> None:
    row = step({}, family)
    edges = np.array(NATS.edges)
    counts = [np.histogram(losses.clip(edges[0], edges[-1] - 1e-6), edges)[0] for losses in token_losses(family)]
    found = row["train/token_loss_dist"]
    assert found["edges"] == edges.tolist()
    # A loss that two roundings put on two sides of an edge moves one count.
    assert np.abs(np.array(found["counts"]) - np.sum(counts, 0)).sum() <= 2
    assert sum(found["counts"]) == sum(map(len, token_losses(family)))
    assert np.count_nonzero(found["counts"]) > 4


def test_losses_of_kept_positions_alone() -> None:
    row = step({"tokens": {"kind": "selected_tokens", "keep": 0.25, "score": "loss", "plan": "after"}})
    counts, usage = row["train/token_loss_dist"]["counts"], row["router/expert_usage"]
    kept = sum(max(1, round(0.25 * n)) for micro in MICROS for n in micro.labelled_B.tolist() if n)
    # The hardest quarter, by the very loss that is counted.
    assert sum(counts) == sum(usage) == kept and counts == usage
    scores = row["router/difficulty_score_dist"]["counts"]
    lowest = next(i for i, n in enumerate(usage) if n)
    assert (
        0 < sum(usage) < sum(scores)
        and not any(usage[:lowest])
        and all(u <= s for u, s in zip(usage, scores, strict=True))
    )


@pytest.mark.parametrize("part", ["selected_tokens", "depth_buckets"])
def test_a_row_has_the_edges_of_its_own_score(part: str) -> None:
    row = step({"tokens": {"kind": part, "score": "margin"}})
    scores, losses = row["router/difficulty_score_dist"], row["train/token_loss_dist"]
    assert scores["edges"] == [i / 16 for i in range(25)] and losses["edges"] == NATS.edges
    assert sum(scores["counts"]) == sum(micro.labelled for micro in MICROS)


def test_buckets_of_depth_are_counted() -> None:
    row = step({"tokens": {"kind": "depth_buckets", "num_buckets": 3}})
    # Bucket b of a row of N holds the descending ranks floor(b N / 3) to floor((b + 1) N / 3).
    sizes = [[(b + 1) * n // 3 - b * n // 3 for b in range(3)] for micro in MICROS for n in micro.labelled_B.tolist()]
    assert row["router/expert_usage"] == np.sum(sizes, 0).tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_gradient_norms_of_layers(family: str) -> None:
    model = small_model(family)
    labelled = sum(micro.labelled for micro in MICROS)
    for micro in MICROS:
        for row, span in document_spans(micro):
            logits = model(input_ids=micro.tokens_BT[row : row + 1, span]).logits[0]
            labels = micro.labels_BT[row, span]
            (F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / labelled).backward()
    layers = model.transformer.h if family == "gpt2" else model.model.layers
    expected = [torch.cat([p.grad.flatten() for p in layer.parameters()]).norm().item() for layer in layers]
    row = step({}, family)
    assert row["train/grad_norm_by_layer"] == pytest.approx(expected, rel=1e-4)
    whole = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert row["train/grad_norm"] == pytest.approx(whole, rel=1e-4)
    # The embedding and the last norm are in no layer.
    assert sum(n**2 for n in expected) < whole**2 * 0.999


def test_a_layer_at_rest_has_no_gradient() -> None:
    row = step({"updates": {"kind": "static_suffix", "keep": 0.34}})
    resting = [norm == 0 for norm in row["train/grad_norm_by_layer"]]
    assert resting == [True, False, False] or resting == [True, True, False]


def test_a_norm_that_is_not_finite_is_its_own_layer_s() -> None:
    from cggr_ray.optim.layer_norms import LayerNorms

    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(4)]
    norms = LayerNorms([parameters[:2], parameters[2:3]], torch.device("cpu"))
    ids = tuple(map(id, parameters))
    assert norms(torch.tensor([3.0, 4.0, 2.0, 9.0]), ids).tolist() == [5.0, 2.0]
    assert norms(torch.tensor([torch.inf, 4.0, 2.0, 9.0]), ids).tolist() == [torch.inf, 2.0]
    assert norms(torch.tensor([2.0, torch.nan]), (ids[2], ids[3])).tolist() == [0.0, 2.0]
