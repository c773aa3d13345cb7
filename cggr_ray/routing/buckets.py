"""Buckets of depth as a `tokens` part: every labelled position has its loss, and the easier ones teach fewer layers.

A router's `ratio` is here the share of (labelled position, layer) pairs that learn, but for rounding, of which a run
takes one per number of buckets told apart. See `depth` for the equations and `sparse.depth` for what is executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from cggr_ray.data.batch import MicroBatch
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress, ramp
from cggr_ray.routing.curriculum import Curriculum
from cggr_ray.routing.depth import deepest_bucket, depth_buckets, keep_layers
from cggr_ray.routing.route import Depth, TokenRoute
from cggr_ray.routing.routers import RatioRouter, Router, statistics_of
from cggr_ray.routing.scorers import Setting, own_scores
from cggr_ray.routing.scores import SCORE_BINS, HeadScore
from cggr_ray.schema import ROUTER_KEPT_FRACTION, ROUTER_SCORES, ROUTER_USAGE
from cggr_ray.sparse.depth import DepthGates, DepthRows
from cggr_ray.sparse.layers import Detach
from cggr_ray.sparse.plan import Plan, Seen


@dataclass(frozen=True)
class DepthBuckets:
    """Every labelled position has its loss; the easier its bucket, the fewer layers, from the top, learn from it.

    `engine`: `sparse` and `every` are one gradient, stopped at every layer from a position's cut down; `faithful` stops
    it at the cut layers alone, as upstream does. `every` and `faithful` cost a full backward pass, and take a
    `leak_rate`, the share that passes where the gradient stops. `detach`: what a stopped position is a constant of, see
    `sparse.plan`. `warm_up_until`: fraction of the budget over which buckets are told apart, one after the other.
    """

    IS_PART: ClassVar[bool] = True

    num_buckets: int = 4
    score: HeadScore = "entropy_confidence"
    engine: Literal["sparse", "every", "faithful"] = "sparse"
    leak_rate: float = 0.0
    detach: Detach = "live"
    warm_up_until: float = 0.1

    def __post_init__(self) -> None:
        if self.num_buckets < 1:
            raise ValueError(f"num_buckets = {self.num_buckets}; accepted: at least 1")
        if not (0 <= self.leak_rate <= 1 and 0 <= self.warm_up_until <= 1):
            raise ValueError(f"leak_rate = {self.leak_rate}, warm_up_until = {self.warm_up_until}; accepted: 0 to 1")
        if self.engine == "sparse" and self.leak_rate > 0:
            raise ValueError(f"leak_rate = {self.leak_rate} with engine 'sparse'; accepted: 0, or every, faithful")
        if self.engine != "sparse" and self.detach != "live":
            raise ValueError(
                f"detach {self.detach!r} with engine {self.engine!r}; accepted: 'live', or engine 'sparse'"
            )

    def build(self, seed: int, setting: Setting) -> Router:
        return DepthRouter(self, seed, setting)

    def runs_all_positions(self) -> bool:
        return self.engine != "sparse"

    def plan_for(self, adapter: Adapter) -> Plan:
        if self.engine == "sparse":
            return DepthRows(adapter, self.num_buckets, self.detach)
        return DepthGates(adapter, self.num_buckets, self.leak_rate, cuts_only=self.engine == "faithful")


class DepthRouter(RatioRouter):
    """Buckets by the model's own scores."""

    def __init__(self, config: DepthBuckets, seed: int, setting: Setting) -> None:
        super().__init__(1.0, Curriculum(), seed, setting)
        self.config, self._num_layers = config, setting.num_layers
        self._shares = learning_shares(setting.num_layers, config.num_buckets)
        # By bucket, the part of the layers that learns from a position in it.
        keep = keep_layers(setting.num_layers, config.num_buckets)
        self._parts = torch.tensor(keep, dtype=torch.float64, device=setting.device) / setting.num_layers

    def levels(self) -> tuple[float, ...]:
        """Everything first. With fewer layers than buckets, some buckets are as deep as the next."""
        return tuple(dict.fromkeys(self._shares))

    def ratio(self, progress: Progress) -> float:
        passed = ramp(progress.fraction, 0.0, self.config.warm_up_until)
        return self._shares[deepest_bucket(self.config.num_buckets, passed)]

    def reads(self, ratio: float) -> int:
        return self._num_layers if ratio < 1 else 0

    def edges(self) -> dict[str, list[float]]:
        return {ROUTER_SCORES: SCORE_BINS[self.config.score].edges}

    @torch.no_grad()
    def route(self, seen: Seen | None, micro: MicroBatch, ratio: float) -> TokenRoute | None:
        if ratio == 1:
            return None
        assert seen is not None
        scored = own_scores(self.config.score, seen, micro, scope="row")
        labelled_B = (micro.labels_BT >= 0).sum(1)
        last = self._shares.index(ratio)
        bucket_BT = depth_buckets(scored.scores_BT, labelled_B, self.config.num_buckets).clamp_max(last)
        every = torch.arange(bucket_BT.shape[1], device=bucket_BT.device).expand_as(bucket_BT)
        ones = torch.ones(bucket_BT.shape, device=bucket_BT.device)
        used = torch.zeros(self.config.num_buckets, device=bucket_BT.device)
        used.index_add_(0, bucket_BT.flatten(), (micro.labels_BT >= 0).flatten().float())
        counted = {ROUTER_USAGE: used, ROUTER_KEPT_FRACTION: (used * self._parts).sum()}
        return TokenRoute(every, ones, statistics_of(scored, self.config.score) | counted, Depth(bucket_BT, last))


def learning_shares(num_layers: int, num_buckets: int) -> list[float]:
    """The share of (labelled position, layer) pairs that learn, by the easiest bucket that is told apart."""
    keep = keep_layers(num_layers, num_buckets)
    pairs = [sum(keep[:last]) + keep[last] * (num_buckets - last) for last in range(num_buckets)]
    return [n / (num_layers * num_buckets) for n in pairs]
