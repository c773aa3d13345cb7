"""The kept rows of a micro-batch, as the layers need them: flat positions, what each may see, its rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cggr_ray.data.batch import MicroBatch
from cggr_ray.kernels.row_attention.op import Spans, kept_spans, spans_of
from cggr_ray.models.families import BlockShape
from cggr_ray.sparse.block import Rotary


@dataclass(frozen=True)
class Kept:
    """K kept slots of a flattened micro-batch of N positions, sorted; an empty slot repeats a position."""

    index_K: Tensor
    filled_K: Tensor
    num_positions: int
    spans: dict[int | None, Spans]
    """Which of the N keys each slot sees, by attention window."""
    among: dict[int | None, Spans]
    """Which kept keys each slot sees, by attention window."""
    rotary: dict[str, Rotary]

    def rotary_of(self, shape: BlockShape) -> Rotary:
        return None if shape.rotary is None else self.rotary[shape.rotary]


def kept_rows(
    index_K: Tensor, filled_K: Tensor, micro: MicroBatch, shapes: list[BlockShape], rotary: dict[str, Rotary]
) -> Kept:
    """Built once a micro-batch, shared by all layers. `rotary` is that of all N positions."""
    first_K = index_K - micro.positions_BT.flatten().index_select(0, index_K)
    spans, among = {}, {}
    for window in {shape.window for shape in shapes}:
        first = first_K if window is None else torch.maximum(first_K, index_K - window + 1)
        # An empty slot sees nothing: its first key lies behind its last.
        spans[window] = spans_of(torch.where(filled_K, first, index_K + 1), index_K, micro.tokens_BT.numel())
        among[window] = kept_spans(index_K, spans[window])
    own = {kind: rotary_rows(pair, index_K) for kind, pair in rotary.items()}
    return Kept(index_K, filled_K, micro.tokens_BT.numel(), spans, among, own)


def rotary_rows(rotary: Rotary, index_K: Tensor) -> Rotary:
    return None if rotary is None else (rotary[0].index_select(0, index_K), rotary[1].index_select(0, index_K))
