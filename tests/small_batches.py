"""Packed micro-batches made by hand, and what a model says about them one document at a time, by Hugging Face alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from cggr_ray.data.batch import Batch, MicroBatch
from cggr_ray.data.loader import micro_batches
from cggr_ray.data.packing import RowOrder

VOCABULARY = 96
# Rows of documents: full ones, padded ones, a document of one position.
LENGTHS = [[5, 11, 5], [21], [1, 1, 18], [9, 4], [20], [7, 7, 7], [3]]


def packed(lengths: list[list[int]], width: int, seed: int = 0, masked: float = 0.2, index: int = 0) -> MicroBatch:
    """Rows of documents of these lengths. What is left of a row is padding: one document, no labels, no ids.

    The last position of a row without padding keeps its label.
    """
    g = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    positions = torch.stack([torch.cat([torch.arange(n) for n in (*row, width - sum(row))]) for row in lengths])
    labels = torch.randint(VOCABULARY, (rows, width), generator=g)
    hidden = torch.rand(rows, width, generator=g) < masked
    ids = torch.randperm(rows * width, generator=g).view(rows, width)
    for b, row in enumerate(lengths):
        hidden[b, -1] = False
        hidden[b, sum(row) :] = True
        ids[b, sum(row) :] = -1
    labels[hidden] = -100
    starts = torch.cat([(positions.flatten() == 0).nonzero().flatten(), torch.tensor([rows * width] * 3)])
    return MicroBatch(
        tokens_BT=torch.randint(VOCABULARY, (rows, width), generator=g),
        labels_BT=labels,
        positions_BT=positions,
        position_ids_BT=ids,
        document_starts=starts.int(),
        longest_document=width,
        labelled_B=(labels >= 0).sum(1).numpy(),
        index=index,
    )


def batches_of(order: RowOrder, count: int, rows: int, micro_rows: int, device: torch.device) -> list[Batch]:
    """The first batches of an order, `rows` each; all have one shape."""
    state, found = order.start(), []
    for _ in range(count):
        read = []
        for _ in range(rows):
            row, state = order.next_row(state)
            read.append(row)
        micros = micro_batches(read, micro_rows, order.shape, device)
        found.append(Batch(tuple(micros), sum(row.real for row in read)))
    return found


def document_spans(micro: MicroBatch) -> Iterator[tuple[int, slice]]:
    """(row, positions) of every document, padding included."""
    for row, positions in enumerate(micro.positions_BT.tolist()):
        starts = [i for i, p in enumerate(positions) if p == 0]
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
            yield row, slice(start, end)


@torch.no_grad()
def hidden_after(model: PreTrainedModel, micro: MicroBatch, layers: int) -> Tensor:
    """(B, T, D) after the first layers, before the last norm; Hugging Face's own forward of each document."""
    pieces: list[list[Tensor]] = [[] for _ in micro.tokens_BT]
    for row, span in document_spans(micro):
        out = model(input_ids=micro.tokens_BT[row : row + 1, span], output_hidden_states=True)
        pieces[row].append(out.hidden_states[layers][0])
    return torch.stack([torch.cat(row) for row in pieces])


@torch.no_grad()
def lens_logits(model: PreTrainedModel, micro: MicroBatch, layers: int) -> Tensor:
    """(B, T, V) in float64: the last norm and the head on the hidden states after the first layers.

    Hugging Face's last hidden state has passed the norm already.
    """
    hidden = hidden_after(model, micro, layers)
    if layers < model.config.num_hidden_layers:
        body = model.transformer if hasattr(model, "transformer") else model.model
        hidden = (body.ln_f if hasattr(body, "ln_f") else body.norm)(hidden)
    return hidden.double() @ model.get_output_embeddings().weight.double().T


def true_scores(logits_BTV: Tensor, labels_BT: Tensor) -> dict[str, Tensor]:
    """Every score by torch's own functions, -inf without a label."""
    p = logits_BTV.softmax(-1)
    entropy = torch.distributions.Categorical(logits=logits_BTV).entropy()
    first, second = p.topk(2, dim=-1).values.unbind(-1)
    target = labels_BT.clamp_min(0)
    nll = F.cross_entropy(logits_BTV.flatten(0, 1), target.flatten(), reduction="none").view(labels_BT.shape)
    found = {
        "entropy": entropy,
        "entropy_confidence": entropy - first,
        "margin": 1 - (first - second),
        "loss": nll,
        "combined": (entropy - first) + (1 - (first - second)) + nll,
        "surprise": nll - entropy,
        "gnorm": (p - F.one_hot(target, p.shape[-1])).norm(dim=-1),
    }
    return {name: torch.where(labels_BT >= 0, values, -torch.inf) for name, values in found.items()}


def document_loss(model: PreTrainedModel, micro: MicroBatch, rows: list[int]) -> Tensor:
    """Mean loss of some rows, differentiable, by Hugging Face's forward of each document."""
    parts = []
    for row, span in document_spans(micro):
        if row in rows:
            logits = model(input_ids=micro.tokens_BT[row : row + 1, span]).logits[0]
            labels = micro.labels_BT[row, span]
            parts.append(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
    return torch.stack(parts).sum() / (micro.labels_BT[rows] >= 0).sum()
