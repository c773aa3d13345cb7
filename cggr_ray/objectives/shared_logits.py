"""Several targets from one chunk of logits: multi-token prediction without a parameter.

    L_t = sum_k w_k (lse(z_t) - z_t[y_{t+k}]),   k = 1 .. n,   w_1 = 1

The idea and the schedule are those of the modded-nanogpt speedrun (its records 53 and 60). It begins with all
targets and ends with the next token alone. Shapes: K rows of the loss, J = n targets of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from cggr_ray.data.batch import MicroBatch
from cggr_ray.kernels.selected_ce.op import selected_cross_entropy
from cggr_ray.models.adapter import Adapter, Stream
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.objectives.objective import Loss, Objective, OwnsNothing, labels_ahead, rows_of
from cggr_ray.progress import Progress, ramp
from cggr_ray.routing.route import TokenRoute


@dataclass(frozen=True)
class SharedLogits:
    """The logits of a position are scored against the tokens after the next one too, until the weights are zero.

    `weights`: those of the tokens two, three, ... steps ahead. `phase_ends`: fractions of the budget, one for every
    weight. The farthest target falls to zero over the first phase, the one before it over the second, and so on; until
    its phase a weight stays what it is. The default is [1, .5, .25 -> 0], [1, .5 -> 0], [1] over thirds.

    Differs from the speedrun: phases are fractions of seconds, logits are not capped, and no target lies in another
    document.
    """

    IS_PART: ClassVar[bool] = True

    weights: tuple[float, ...] = (0.5, 0.25)
    phase_ends: tuple[float, ...] = (1 / 3, 2 / 3)

    def __post_init__(self) -> None:
        if not self.weights or not all(0 <= weight < float("inf") for weight in self.weights):
            raise ValueError(f"weights = {list(self.weights)}; accepted: at least one, none negative")
        ascending = all(a < b for a, b in pairwise((0.0, *self.phase_ends)))
        if len(self.phase_ends) != len(self.weights) or not ascending or self.phase_ends[-1] > 1:
            raise ValueError(f"phase_ends = {list(self.phase_ends)}; accepted: {len(self.weights)} ascending fractions "
                             "of the budget in (0, 1], one for every weight")  # fmt: skip

    def weights_at(self, fraction: float) -> list[float]:
        """Of the targets two, three, ... steps ahead."""
        phases = reversed(list(pairwise((0.0, *self.phase_ends))))
        return [w * (1 - ramp(fraction, *phase)) for w, phase in zip(self.weights, phases, strict=True)]

    def runs_on_kept_rows(self) -> bool:
        return True

    def build(self, next_token: NextToken, adapter: Adapter, seed: int) -> Objective:
        return SharedLogitsLoss(self, next_token, adapter.device)


class SharedLogitsLoss(OwnsNothing):
    """The running objective."""

    def __init__(self, form: SharedLogits, next_token: NextToken, device: torch.device) -> None:
        self.form, self.next = form, next_token
        self._weights_J = torch.ones(1 + len(form.weights), device=device)

    def begin(self, progress: Progress) -> None:
        for steps, weight in enumerate(self.form.weights_at(progress.fraction), start=1):
            self._weights_J[steps].fill_(weight)

    def loss(self, stream: Stream, micro: MicroBatch, route: TokenRoute | None, scale: Tensor) -> Loss:
        rows = rows_of(micro, route, scale)
        targets = range(1, 1 + len(self._weights_J))
        labels_KJ = torch.stack([rows.of(labels_ahead(micro, steps)) for steps in targets], dim=-1)
        weights_KJ = rows.weights_K.unsqueeze(-1) * self._weights_J
        extra = self.next.label_smoothing, self.next.entropy_bonus
        total, nll_KJ = selected_cross_entropy(rows.hidden(stream), stream.head_VD, labels_KJ, weights_KJ, *extra)
        return rows.loss(total, nll_KJ[:, 0], (nll_KJ[:, 0] * rows.weights_K).sum())
