"""A step's data: packed rows with labels, positions inside their document, and a stable id for every position.

Shapes: B rows of T positions. `labels` are already shifted: the label of a position is the next token of its document.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward consumes. Host fields are known without asking the device."""

    tokens_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    """Position inside its document, from 0; padding is a document of its own."""
    position_ids_BT: Tensor
    """Stable over epochs and arms: the index of the token in its source's stored stream, -1 for padding."""
    document_starts: Tensor
    """int32, offsets of documents in the flattened rows, the total last and repeated."""
    longest_document: int
    labelled_B: np.ndarray
    """Labelled positions of each row as it was read, on the host."""
    index: int
    """Among the micro-batches of the step, those of all workers counted."""
    ids_BT: np.ndarray | None = None
    """`position_ids_BT` on the host, of rows as the loader read them."""
    first: bool = False
    """Whether it is the first micro-batch that this worker has of a step."""

    @property
    def documents_BT(self) -> Tensor:
        """A number per document within its row."""
        return (self.positions_BT == 0).cumsum(dim=1)

    @property
    def labelled(self) -> int:
        return int(self.labelled_B.sum())


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step, already on the device, in micro-batches of equal shape where they divide."""

    micros: tuple[MicroBatch, ...]
    tokens: int
    """Positions read from the stream for the step, those of all workers, padding left out."""

    @property
    def rows(self) -> int:
        return sum(micro.tokens_BT.shape[0] for micro in self.micros)

    @property
    def labelled(self) -> int:
        return sum(micro.labelled for micro in self.micros)
