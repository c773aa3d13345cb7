"""Next-token prediction: the neutral objective. A sum over positions; the learner divides by the global count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cggr_ray.data.batch import MicroBatch
from cggr_ray.kernels.selected_ce.op import selected_cross_entropy
from cggr_ray.models.adapter import Adapter, Stream
from cggr_ray.objectives.objective import Loss, Objective, OwnsNothing, rows_of
from cggr_ray.progress import Progress
from cggr_ray.routing.route import TokenRoute


@dataclass(frozen=True)
class NextToken(OwnsNothing):
    """L = (1 / labelled) sum_t w_t nll_t over kept positions t; w = 1 on all labelled positions without a route.

    With `label_smoothing` e and `entropy_bonus` b, what is minimised is (1 - e) nll + e mean_v(-log p_v) - b H in place
    of nll. Differs from the E3 seed, whose reported loss has both in it: here they are in no reported number.
    """

    IS_PART: ClassVar[bool] = True

    label_smoothing: float = 0.0
    entropy_bonus: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing = {self.label_smoothing}; accepted: a share in [0, 1)")
        if not 0 <= self.entropy_bonus < float("inf"):
            raise ValueError(f"entropy_bonus = {self.entropy_bonus}; accepted: a factor of at least 0")

    @property
    def plain(self) -> bool:
        """Whether the next-token loss is all that is minimised."""
        return not (self.label_smoothing or self.entropy_bonus)

    def build(self, adapter: Adapter, seed: int) -> Objective:
        """Itself: it has no state."""
        return self

    def runs_on_kept_rows(self) -> bool:
        return True

    def begin(self, progress: Progress) -> None:
        """Nothing changes from step to step."""

    def loss(self, stream: Stream, micro: MicroBatch, route: TokenRoute | None, scale: Tensor) -> Loss:
        rows = rows_of(micro, route, scale)
        labels_K, weights_K = rows.of(micro.labels_BT), rows.weights_K
        total, nll_K = selected_cross_entropy(
            rows.hidden(stream), stream.head_VD, labels_K, weights_K, self.label_smoothing, self.entropy_bonus
        )
        return rows.loss(total, nll_K, None if self.plain else (nll_K * weights_K).sum())
