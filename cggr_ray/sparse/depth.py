"""Plans of depth buckets: a position's gradient goes down to the cut of its bucket and no further (CGGRWrapper).

With c_t the cut of position t, the gradient that arrives at t's hidden state is multiplied by a gate

    output of layer l      1 where c_t < l, else the leak rate       at every layer, or at the cut layers alone
    input of layer 0       1 where c_t < 0, else the leak rate       with gates at every layer

so that layers c_t + 1 .. L - 1 learn from t. With gates at the cut layers alone, as upstream hangs them, attention
gives a stopped position a gradient again below its cut, and no product of the backward pass is saved.

    DepthRows    gates at every layer, no leak: the same gradient from the rows that have one. Those are
                 A_l = {t : c_t < l} in layer l, nested, and replayed upwards: where the set grows, its new rows enter
                 as constants that the forward left
    DepthGates   either kind of gate as hooks on an ordinary forward and backward: the definition, and the only form
                 with a leak

The loss is the ordinary mean over all labelled positions. Buckets are known when the forward is over.
Shapes: B rows of T positions, N = B T, D width, K slots of a set of rows.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cggr_ray.data.batch import MicroBatch
from cggr_ray.kernels.select.op import compact
from cggr_ray.models.adapter import Adapter
from cggr_ray.routing.depth import cut_layers
from cggr_ray.routing.route import Depth
from cggr_ray.schema import TRAIN_LOSS
from cggr_ray.sparse.kept import kept_rows
from cggr_ray.sparse.layers import Detach, Overlay, SparseLayers, Trace
from cggr_ray.sparse.plan import Decide, Planned, Rows, Trunk, seen


class Stage(NamedTuple):
    """From the layer `first` on, the buckets up to `bucket` learn."""

    first: int
    bucket: int


class RowSet(NamedTuple):
    """The flat positions of some buckets, sorted, an empty slot repeating a position; or simply all positions."""

    index_K: Tensor
    filled_K: Tensor
    whole: bool


def stages(num_layers: int, num_buckets: int, last: int) -> list[Stage]:
    """Where the set of learning rows grows, bottom up; the last stage has all rows and may begin above all layers."""
    entries = {cut + 1: bucket for bucket, cut in enumerate(cut_layers(num_layers, num_buckets)[: last + 1])}
    return [Stage(*entry) for entry in entries.items()]


def rows_up_to(bucket: int, depth: Depth, num_buckets: int) -> RowSet:
    """The rows of the buckets 0 .. bucket, in a number of slots that no data can change."""
    rows, width = depth.bucket_BT.shape
    device = depth.bucket_BT.device
    if bucket == depth.last:
        index = torch.arange(rows * width, device=device)
        return RowSet(index, torch.ones_like(index, dtype=torch.bool), whole=True)
    slots = -(-(bucket + 1) * width // num_buckets)
    index_BK = compact(depth.bucket_BT <= bucket, slots, width)
    offset = torch.arange(rows, device=device).unsqueeze(1) * width
    return RowSet((index_BK.clamp_max(width - 1) + offset).flatten(), (index_BK < width).flatten(), whole=False)


class DepthRows:
    """Backward on the rows that have a gradient, layer by layer."""

    LOSS = TRAIN_LOSS

    def __init__(self, adapter: Adapter, num_buckets: int, detach: Detach) -> None:
        self.adapter, self.num_buckets = adapter, num_buckets
        self.layers = SparseLayers(adapter.device, detach, adapter.checkpointing)
        self._entries = {cut + 1 for cut in cut_layers(len(adapter.layers), num_buckets)}

    def forward(self, micro: MicroBatch, reads: int, decide: Decide) -> Planned:
        run, count = Rows(self.adapter, self.layers, micro), len(self.adapter.layers)
        assert reads == count, "buckets are made of the model's own scores"
        traces, entering = self._capture(run)
        route = decide(seen(self.adapter, run.hidden_ND))
        assert route is not None and route.depth is not None, "a plan for buckets, and no buckets"
        found = stages(count, self.num_buckets, route.depth.last)
        ends = [*(stage.first for stage in found[1:]), count]
        for stage, end in zip(found, ends, strict=True):
            rows = rows_up_to(stage.bucket, route.depth, self.num_buckets)
            self._enter(run, rows, entering.pop(stage.first))
            for i in range(stage.first, end):
                trace = traces.pop()
                run.replay(i, trace if rows.whole else trace.rows(rows.index_K))
        return Planned(self.adapter.finish(run.hidden_KD.view(*micro.tokens_BT.shape, -1)), None, route.statistics)

    def _capture(self, run: Rows) -> tuple[list[Trace], dict[int, Tensor]]:
        """All rows through all layers: (traces, the first layer's last; hidden states wherever rows may enter)."""
        count, traces, entering = len(self.adapter.layers), [], {}
        for i in range(count + 1):
            if i in self._entries:
                entering[i] = run.hidden_ND
            if i < count:
                traces.append(run.capture(i))
        traces.reverse()
        return traces, entering

    def _enter(self, run: Rows, rows: RowSet, hidden_ND: Tensor) -> None:
        """The first rows are embeddings, with gradient; those that join later are constants."""
        index_K, filled_K, whole = rows
        if run.kept is None:
            run.start(index_K, filled_K)
            run.enter()
            return
        base_KD = hidden_ND if whole else hidden_ND.index_select(0, index_K)
        # An empty slot finds whatever row comes next: it takes nothing from there.
        places = torch.searchsorted(index_K, run.slots.index_K).clamp_max(len(index_K) - 1)
        run.hidden_KD = Overlay.apply(run.hidden_KD, base_KD, places, run.slots.filled_K)
        run.kept = kept_rows(index_K, filled_K, run.micro, self.adapter.shapes, run.rotary)


class DepthGates:
    """An ordinary forward and backward with gates on the gradient."""

    LOSS = TRAIN_LOSS

    def __init__(self, adapter: Adapter, num_buckets: int, leak_rate: float, cuts_only: bool) -> None:
        cuts = cut_layers(len(adapter.layers), num_buckets)
        self.adapter, self.leak_rate, self.cuts_only = adapter, leak_rate, cuts_only
        self._cuts = torch.tensor(cuts, device=adapter.device)
        self._gated = set(cuts) if cuts_only else set(range(len(adapter.layers)))

    def forward(self, micro: MicroBatch, reads: int, decide: Decide) -> Planned:
        adapter, documents = self.adapter, self.adapter.documents(micro)
        assert reads == len(adapter.layers), "buckets are made of the model's own scores"
        gates = Gates(self.leak_rate)
        hidden = adapter.embed(micro)
        trunk = Trunk(adapter, hidden)
        if not self.cuts_only:
            gates.hang(hidden, 0)

        def visit(hidden_BTD: Tensor, layer: int) -> None:
            trunk(hidden_BTD, layer)
            if layer in self._gated:
                gates.hang(hidden_BTD, layer)

        hidden = adapter.run_layers(hidden, micro.positions_BT, documents, visit=visit)
        route = decide(seen(adapter, hidden.detach().flatten(0, 1)))
        assert route is not None and route.depth is not None, "a plan for buckets, and no buckets"
        gates.cut_BT = self._cuts[route.depth.bucket_BT]
        return Planned(adapter.finish(hidden, trunk.hidden_BTD), None, route.statistics)


class Gates:
    """Gates hung in the forward; the cuts they open by are put in before the backward."""

    cut_BT: Tensor

    def __init__(self, leak_rate: float) -> None:
        self.leak_rate = leak_rate

    def hang(self, hidden_BTD: Tensor, layer: int) -> None:
        """On the way down, a position passes here whose cut lies below `layer`."""
        if hidden_BTD.requires_grad:
            hidden_BTD.register_hook(partial(self._pass, layer=layer))

    def _pass(self, grad_BTD: Tensor, layer: int) -> Tensor:
        return torch.where((self.cut_BT < layer).unsqueeze(-1), grad_BTD, grad_BTD * self.leak_rate)
