"""Loss on held-out documents: the only loss that compares recipes. Summed over labelled positions, then divided.

nats/token = sum NLL / labelled positions; nats/byte = sum NLL / bytes of the labelled text (prompt bytes count only
where prompts are labelled), which does not depend on the tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cggr_ray.data.batch import MicroBatch
from cggr_ray.data.dataset import PreparedData
from cggr_ray.data.loader import micro_batches
from cggr_ray.data.packing import RowOrder, best_fit, cut, fill_row
from cggr_ray.kernels.selected_ce.op import position_nll
from cggr_ray.models.adapter import Adapter
from cggr_ray.schema import VAL_LOSS, VAL_NATS_PER_BYTE, VAL_TOKENS


@dataclass(frozen=True)
class HeldOutSet:
    """One source's held-out rows, on the device."""

    name: str
    micros: list[MicroBatch]
    labelled: int
    text_bytes: int


class HeldOut:
    """The validation of a run: packed once, evaluated at every milestone with the full forward."""

    def __init__(self, data: PreparedData, order: RowOrder, micro_rows: int, device: torch.device) -> None:
        self._sets = []
        spec = data.spec
        for number, (source, store) in enumerate(zip(spec.sources, data.val, strict=True)):
            cuts = (cut(store, number, d, spec.row_tokens, spec.mask_prompts) for d in range(store.documents))
            pieces = [piece for pieces in cuts for piece in pieces]
            bins = best_fit([piece.positions for piece in pieces], spec.row_tokens, order.shape.most_documents)
            bins += [[] for _ in range(-len(bins) % micro_rows)]
            rows = [fill_row([pieces[i] for i in chosen], data.val, order.shape) for chosen in bins]
            bytes_prompt, bytes_completion = (int(x) for x in store.text_bytes.sum(axis=1))
            self._sets.append(
                HeldOutSet(
                    source.name,
                    micro_batches(rows, micro_rows, order.shape, device),
                    sum(row.labelled for row in rows),
                    bytes_completion + (0 if spec.mask_prompts else bytes_prompt),
                )
            )

    @torch.no_grad()
    def rehearse(self, adapter: Adapter) -> None:
        """One micro-batch of every source: all have one shape, so that `evaluate` has nothing more to compile."""
        for held_out in self._sets:
            for micro in held_out.micros[:1]:
                summed_nll(adapter, micro)

    @torch.no_grad()
    def evaluate(self, adapter: Adapter) -> dict[str, float]:
        """val/loss over all sources together, val/loss/<source> for each, and nats per byte. Synchronises."""
        sums = {s.name: sum(summed_nll(adapter, micro) for micro in s.micros) for s in self._sets}
        nats = {name: float(total) for name, total in sums.items()}
        labelled = sum(s.labelled for s in self._sets)
        total = sum(nats.values())
        apart = {f"{VAL_LOSS}/{s.name}": nats[s.name] / s.labelled for s in self._sets} if len(self._sets) > 1 else {}
        return {
            VAL_LOSS: total / labelled,
            VAL_NATS_PER_BYTE: total / sum(s.text_bytes for s in self._sets),
            VAL_TOKENS: labelled,
            **apart,
        }


def summed_nll(adapter: Adapter, micro: MicroBatch) -> torch.Tensor:
    """Nats of all labelled positions of a micro-batch by the full forward, 0-d float64."""
    stream = adapter.forward(micro)
    return position_nll(stream.hidden_RD, stream.head_VD, micro.labels_BT.flatten()).double().sum()
