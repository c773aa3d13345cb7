"""Collider: every layer's backward pass on the positions of high loss alone (arXiv:2502.00340; v2: Centrifuge).

The forward is whole, the model's own loss decides (plan `after`), and kept positions alone have a backward pass: in
every layer the rows of dropped positions are left out of each matrix product and of attention's backward.

    quantile    exactly round(keep labelled) positions of a row, those of the largest loss
    upstream    of these, the ones whose loss, scaled to [0, 1] within its row, reaches `threshold` too

Differs from the paper: scores are the model's loss, not its excess over a reference model's (which is the score
`excess` of `SelectedTokens`). Differs from upstream (E3's `collider_threshold`, `collider_sparsity`): its filter masks
the gradient of the logits alone, after which attention gives every position a gradient again, and nothing is saved.
Shapes: B rows of T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cggr_ray.models.adapter import Adapter
from cggr_ray.routing.curriculum import Curriculum
from cggr_ray.routing.routers import Router, ScoreRouter, counts
from cggr_ray.routing.scorers import Scorer, Setting
from cggr_ray.routing.tokens import SelectedTokens
from cggr_ray.sparse.layers import Detach
from cggr_ray.sparse.plan import Plan


@dataclass(frozen=True)
class Collider:
    """Backward on the labelled positions of the largest loss, in every layer.

    `detach`: what dropped positions are constants of, see `sparse.plan`.
    """

    IS_PART: ClassVar[bool] = True

    keep: float = 0.65
    mode: Literal["quantile", "upstream"] = "quantile"
    threshold: float = 0.3
    detach: Detach = "const"
    curriculum: Curriculum = Curriculum(target_at=0.0)

    def __post_init__(self) -> None:
        self._selected()
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold = {self.threshold}; accepted: in [0, 1], of a loss scaled to that")
        if self.mode == "quantile" and self.threshold != Collider.threshold:
            raise ValueError(
                f"threshold = {self.threshold} with mode 'quantile', which has none; accepted: mode 'upstream'"
            )
        if self.mode == "upstream" and self.keep == 1:
            raise ValueError("keep = 1 with mode 'upstream', whose threshold chooses among kept positions; "
                             "accepted: keep below 1")  # fmt: skip

    def _selected(self) -> SelectedTokens:
        return SelectedTokens(self.keep, "loss", plan="after", detach=self.detach, curriculum=self.curriculum)

    def runs_all_positions(self) -> bool:
        return False

    def build(self, seed: int, setting: Setting) -> Router:
        chosen = self._selected()
        if self.mode == "quantile":
            return chosen.build(seed, setting)
        return ThresholdRouter(self.threshold, chosen, chosen.router.build(chosen.score, setting, seed), seed, setting)

    def plan_for(self, adapter: Adapter) -> Plan:
        return self._selected().plan_for(adapter)


class ThresholdRouter(ScoreRouter):
    """Of the positions that a ratio keeps, those above a threshold too. Slots of the others stay empty."""

    def __init__(self, threshold: float, config: SelectedTokens, scorer: Scorer, seed: int, setting: Setting) -> None:
        super().__init__(config, scorer, seed, setting)
        self._threshold = threshold

    def counts(self, scores_BT: Tensor, labels_BT: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        keep_B, labelled_B = counts(labels_BT, ratio)
        scored = labels_BT >= 0
        low = torch.where(scored, scores_BT, torch.inf).amin(1, keepdim=True)
        high = torch.where(scored, scores_BT, -torch.inf).amax(1, keepdim=True)
        # A row whose losses are all equal has none above another: they count as 0, and one is kept.
        above = scored & (scores_BT - low >= self._threshold * (high - low)) & (high > low)
        return keep_B.minimum(above.sum(1).maximum(labelled_B.clamp_max(1))), labelled_B
