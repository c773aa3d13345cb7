"""What a run counts, and takes up again from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

# Consecutive steps without a finite gradient after which a run has diverged.
NOT_FINITE_LIMIT = 20


@dataclass(kw_only=True)
class Counts:
    """Of all workers, up to now.

    `labelled`: positions read that have a label. `not_finite`: the last steps in a row without a finite gradient;
    `skipped`: all of them. `micro_rows`: rows of a micro-batch from here on; `out_of_memory`: how often they became
    fewer.
    """

    step: int = 0
    labelled: int = 0
    not_finite: int = 0
    skipped: int = 0
    micro_rows: int
    out_of_memory: int = 0

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Counts:
        """Those of a checkpoint, which holds them by name."""
        return cls(**{field.name: state[field.name] for field in fields(cls)})

    def stepped(self, labelled: int) -> None:
        """A step has begun, with so many labelled positions in its rows."""
        self.step += 1
        self.labelled += labelled

    def landed(self, finite: bool) -> None:
        """A step has finished, with a finite gradient or without."""
        self.not_finite = 0 if finite else self.not_finite + 1
        self.skipped += not finite

    @property
    def diverged(self) -> bool:
        return self.not_finite >= NOT_FINITE_LIMIT
