"""The `tokens` parts: which positions carry a gradient. Neutral: `AllTokens`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from cggr_ray.data.batch import MicroBatch
from cggr_ray.kernels.head_stats.op import head_stats
from cggr_ray.models.adapter import Stream
from cggr_ray.progress import Progress
from cggr_ray.routing import selectors
from cggr_ray.routing.curriculum import Curriculum, DynamicThreshold, ratio_levels, snap
from cggr_ray.routing.route import TokenRoute
from cggr_ray.routing.scores import ScoreName, score, score_histogram
from cggr_ray.routing.selectors import Selection
from cggr_ray.schema import ROUTER_CONFIDENCE, ROUTER_ENTROPY, ROUTER_SCORES


class Router(Protocol):
    """The running object of a `tokens` part. A ratio of 1 means that no route is made at all."""

    def levels(self) -> tuple[float, ...]: ...
    def ratio(self, progress: Progress) -> float: ...
    def after(self, stream: Stream, micro: MicroBatch, ratio: float, progress: Progress) -> TokenRoute: ...
    def observe(self, values: dict[str, float], progress: Progress) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class AllTokens:
    """Every labelled position carries its gradient."""

    IS_PART: ClassVar[bool] = True

    def build(self, seed: int, device: torch.device) -> Router:
        return RatioRouter(1.0, Curriculum(), seed, device)


@dataclass(frozen=True)
class RandomTokens:
    """Control: as many positions as the selecting recipe keeps, chosen by chance, no scoring."""

    IS_PART: ClassVar[bool] = True

    keep: float = 0.25
    curriculum: Curriculum = Curriculum()

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def build(self, seed: int, device: torch.device) -> Router:
        return RandomRouter(self.keep, self.curriculum, seed, device)


@dataclass(frozen=True)
class SelectedTokens:
    """Positions selected by their difficulty under the model's own forward (CGGRLoss; plan `dense`: exact gradient).

    `weights`: `mean` averages over kept positions as the seeds do; `inverse_probability` weighs by 1/pi, so that the
    expected gradient is that of all positions (selections that draw at random only).
    `scope`: exactly k of every row, or of the whole micro-batch as upstream does.
    """

    IS_PART: ClassVar[bool] = True

    keep: float = 0.25
    score: ScoreName = "combined"
    selection: Literal["topk", "stratified", "sequence_aware", "fixed_quota", "importance"] = "topk"
    weights: Literal["mean", "inverse_probability"] = "mean"
    scope: Literal["row", "batch"] = "row"
    num_strata: int = 4
    min_tokens_per_sequence: int = 1
    importance_floor: float = 0.15
    largest_weight: float = 10.0
    curriculum: Curriculum = Curriculum()
    dynamic: DynamicThreshold | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.num_strata < 1 or self.min_tokens_per_sequence < 0:
            raise ValueError(f"num_strata = {self.num_strata}, min_tokens_per_sequence = {self.min_tokens_per_sequence}"
                             "; accepted: at least 1, at least 0")  # fmt: skip
        if self.selection == "fixed_quota" and self.dynamic is not None:
            raise ValueError("selection 'fixed_quota' with a dynamic threshold; accepted: one of the two")
        random = self.selection in ("stratified", "importance")
        if self.weights == "inverse_probability" and not random:
            raise ValueError(f"weights 'inverse_probability' with {self.selection!r}; accepted: stratified, importance")
        if self.selection == "importance":
            self._check_importance()

    def _check_importance(self) -> None:
        if self.score != "gnorm" or self.weights != "inverse_probability":
            raise ValueError("selection 'importance'; accepted: with score 'gnorm' and weights 'inverse_probability'")
        smallest = self.keep * (0.5 if self.dynamic else 1.0)
        if not (self.importance_floor > 0 and smallest * self.largest_weight >= 1):
            raise ValueError(f"largest_weight = {self.largest_weight} at keep = {self.keep}; "
                             f"accepted: a weight of at least {1 / smallest:g}, and a positive floor")  # fmt: skip

    def build(self, seed: int, device: torch.device) -> Router:
        return ScoreRouter(self, seed, device)


def check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep = {keep}; accepted: a ratio in (0, 1]")


class RatioRouter:
    """Shared by all: the ratio of the step, and random numbers that depend on seed, step and micro-batch alone."""

    def __init__(self, keep: float, curriculum: Curriculum, seed: int, device: torch.device) -> None:
        self.keep, self.curriculum, self._seed = keep, curriculum, seed
        self._generator = torch.Generator(device)

    def levels(self) -> tuple[float, ...]:
        return ratio_levels(self.keep, below=False)

    def ratio(self, progress: Progress) -> float:
        return snap(self.curriculum.ratio(self.keep, progress), self.levels())

    def generator(self, micro: MicroBatch, progress: Progress) -> torch.Generator:
        seed = np.random.SeedSequence((self._seed, progress.step, micro.index)).generate_state(1, np.uint64)
        return self._generator.manual_seed(int(seed[0] >> np.uint64(1)))

    def observe(self, values: dict[str, float], progress: Progress) -> None:
        """Nothing to learn from a finished step."""

    def after(self, stream: Stream, micro: MicroBatch, ratio: float, progress: Progress) -> TokenRoute:
        raise AssertionError("every position is kept, so no route is asked for")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


class RandomRouter(RatioRouter):
    def after(self, stream: Stream, micro: MicroBatch, ratio: float, progress: Progress) -> TokenRoute:
        draw = torch.rand(
            micro.labels_BT.shape, generator=self.generator(micro, progress), device=micro.labels_BT.device
        )
        keys = torch.where(micro.labels_BT >= 0, draw, -torch.inf)
        keep_B, labelled_B = counts(micro.labelled_B, ratio, keys.device)
        return route_of(selectors.top_k(keys, keep_B), keep_B, labelled_B, ratio, inverse_probability=False)


class ScoreRouter(RatioRouter):
    def __init__(self, config: SelectedTokens, seed: int, device: torch.device) -> None:
        super().__init__(config.keep, config.curriculum, seed, device)
        self.config = config
        self._confidence: float | None = None
        self._reference: float | None = None

    def levels(self) -> tuple[float, ...]:
        return ratio_levels(self.keep, below=self.config.dynamic is not None)

    def ratio(self, progress: Progress) -> float:
        base = self.curriculum.ratio(self.keep, progress)
        dynamic = self.config.dynamic
        if dynamic is not None and base < 1 and self._confidence is not None:
            base = dynamic.ratio(base, self._confidence, self._reference or self._confidence)
        return snap(base, self.levels())

    def observe(self, values: dict[str, float], progress: Progress) -> None:
        """Takes the mean confidence of a step that has finished; its delay is fixed, so a resumed run sees the same."""
        dynamic, seen = self.config.dynamic, values.get(ROUTER_CONFIDENCE)
        if dynamic is None or seen is None or seen != seen:
            return
        keep = 0.0 if dynamic.rule == "upstream" or self._confidence is None else dynamic.smoothing
        self._confidence = keep * (self._confidence or 0.0) + (1 - keep) * seen
        if self._reference is None and progress.fraction >= self.curriculum.target_at:
            self._reference = self._confidence

    @torch.no_grad()
    def after(self, stream: Stream, micro: MicroBatch, ratio: float, progress: Progress) -> TokenRoute:
        stats = head_stats(stream.hidden_ND, stream.head_VD, micro.labels_BT.flatten())
        scores_BT = score(self.config.score, stats).view(micro.labels_BT.shape)
        documents_BT, labelled = micro.documents_BT, micro.labelled_B
        if self.config.scope == "batch":
            row = torch.arange(len(labelled), device=scores_BT.device).unsqueeze(1)
            documents_BT = (documents_BT + row * documents_BT.shape[1]).view(1, -1)
            scores_BT, labelled = scores_BT.view(1, -1), labelled.sum(keepdims=True)
        keep_B, labelled_B = counts(labelled, ratio, scores_BT.device)
        generator = self.generator(micro, progress)
        selection = self._select(scores_BT, keep_B, labelled_B, documents_BT, generator)
        route = route_of(selection, keep_B, labelled_B, ratio, self.config.weights == "inverse_probability")
        route.statistics[ROUTER_ENTROPY] = stats.entropy.nanmean()
        route.statistics[ROUTER_CONFIDENCE] = stats.confidence.nanmean()
        route.statistics[ROUTER_SCORES] = score_histogram(scores_BT)
        return route

    def _select(
        self, scores_BT: Tensor, keep_B: Tensor, labelled_B: Tensor, documents_BT: Tensor, generator: torch.Generator
    ) -> Selection:
        c = self.config
        if c.selection == "stratified":
            return selectors.stratified(scores_BT, keep_B, labelled_B, c.num_strata, generator)
        if c.selection == "sequence_aware":
            return selectors.sequence_aware(scores_BT, keep_B, documents_BT, c.min_tokens_per_sequence)
        if c.selection == "importance":
            importance = torch.where(scores_BT > -torch.inf, scores_BT.clamp_min(c.importance_floor), 0.0)
            pi = selectors.inclusion_probabilities(importance, keep_B, 1 / c.largest_weight)
            return selectors.systematic(pi, keep_B, generator)
        return selectors.top_k(scores_BT, keep_B)

    def state_dict(self) -> dict[str, Any]:
        return {"confidence": self._confidence, "reference": self._reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._confidence, self._reference = state["confidence"], state["reference"]


def counts(labelled: np.ndarray, ratio: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(positions to keep, labelled positions) of each row, int64 on `device`; at least one where there is a label."""
    keep = np.maximum(np.rint(ratio * labelled), np.minimum(labelled, 1)).astype(np.int64)
    both = torch.from_numpy(np.stack([keep, labelled.astype(np.int64)]))
    moved = (both.pin_memory() if device.type == "cuda" else both).to(device, non_blocking=True)
    return moved[0], moved[1]


def route_of(
    selection: Selection, keep_B: Tensor, labelled_B: Tensor, ratio: float, inverse_probability: bool
) -> TokenRoute:
    """Kept positions as sorted slots, with their weights; rows with fewer than K leave slots of weight 0."""
    width = selection.mask_BT.shape[1]
    slots = max(1, math.ceil(ratio * width - 1e-9))
    positions = torch.arange(width, device=keep_B.device)
    index = torch.where(selection.mask_BT, positions, width).sort(dim=1).values[:, :slots]
    filled, index = index < width, index.clamp_max(width - 1)
    if inverse_probability:
        assert selection.probability_BT is not None
        weights = 1 / selection.probability_BT.gather(1, index).float()
    else:
        weights = (labelled_B / keep_B.clamp_min(1)).float().unsqueeze(1).expand_as(index)
    return TokenRoute(index, torch.where(filled, weights, 0.0))
