"""Routers: the running objects of the `tokens` parts. Each turns what it sees of a micro-batch into a route.

A ratio of 1 means that no route is made. All counts and draws stay on the device. Shapes as in `selectors`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from cggr_ray.data.batch import MicroBatch
from cggr_ray.kernels.select.op import compact
from cggr_ray.models.adapter import Stream
from cggr_ray.progress import Progress
from cggr_ray.routing import selectors
from cggr_ray.routing.agreement import recall_at_k, spearman
from cggr_ray.routing.curriculum import Curriculum, ratio_levels, snap
from cggr_ray.routing.draws import TOKENS, seed_of
from cggr_ray.routing.route import TokenRoute
from cggr_ray.routing.scorers import Scored, Scorer, Setting, own_scores
from cggr_ray.routing.scores import SCORE_BINS, ScoreName
from cggr_ray.routing.selectors import Selection
from cggr_ray.schema import (
    ROUTER_CONFIDENCE,
    ROUTER_ENTROPY,
    ROUTER_KEPT_FRACTION,
    ROUTER_RECALL,
    ROUTER_SCORES,
    ROUTER_SPEARMAN,
    ROUTER_USAGE,
)
from cggr_ray.sparse.plan import Seen
from cggr_ray.workers import Workers

if TYPE_CHECKING:
    from cggr_ray.routing.tokens import SelectedTokens

# Steps between two comparisons of a router with the model's own scores. Each costs one pass of the head.
STEPS_PER_COMPARISON = 64


class Router(Protocol):
    """The running object of a `tokens` part."""

    def levels(self) -> tuple[float, ...]: ...
    def ratio(self, progress: Progress) -> float: ...
    def reads(self, ratio: float) -> int:
        """Layers to run before `route`; 0 shows it nothing."""
        ...

    def begin(self, micro: MicroBatch, progress: Progress) -> None:
        """What the host has to say before a micro-batch: the seed of its draws."""
        ...

    def rewind(self) -> None:
        """Puts back what `learn` has changed since `begin` of the step's first micro-batch."""
        ...

    def share(self, workers: Workers) -> None:
        """After the last micro-batch of a step: what all workers have learned in it becomes known to all."""
        ...

    def generators(self) -> list[torch.Generator]: ...
    def route(self, seen: Seen | None, micro: MicroBatch, ratio: float) -> TokenRoute | None: ...
    def watch(self, stream: Stream, index_K: Tensor) -> None:
        """Takes in what the forward ended with, before the backward pass: final hidden states of the loss's rows."""
        ...

    def learn(self, micro: MicroBatch, index_K: Tensor, nll_K: Tensor) -> None:
        """Takes in what the loss of a micro-batch was, position by position. On the device."""
        ...

    def compares(self, ratio: float, progress: Progress) -> bool:
        """Whether this step shows the model's own scores to `agreement`."""
        ...

    def agreement(self, whole: Seen, micro: MicroBatch, ratio: float) -> dict[str, Tensor]:
        """Of the last route with the model's own scores."""
        ...

    def edges(self) -> dict[str, list[float]]:
        """Of the bins of the histograms in a route's statistics, by schema name."""
        ...

    def observe(self, values: dict[str, float], progress: Progress) -> None: ...
    def tensors(self) -> dict[str, Tensor]:
        """State on the device, to be saved and restored in place."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RatioRouter:
    """Shared by all: the ratio of the step, and random numbers that depend on seed, step and micro-batch alone."""

    def __init__(self, keep: float, curriculum: Curriculum, seed: int, setting: Setting) -> None:
        self.keep, self.curriculum, self._seed = keep, curriculum, seed
        self._generator = torch.Generator(setting.device)

    def levels(self) -> tuple[float, ...]:
        return ratio_levels(self.keep, False, self.curriculum.ramps, self.curriculum.full)

    def ratio(self, progress: Progress) -> float:
        return snap(self.curriculum.ratio(self.keep, progress), self.levels())

    def reads(self, ratio: float) -> int:
        return 0

    def route(self, seen: Seen | None, micro: MicroBatch, ratio: float) -> TokenRoute | None:
        assert ratio == 1, "every position is kept"
        return None

    def begin(self, micro: MicroBatch, progress: Progress) -> None:
        self._generator.manual_seed(seed_of(self._seed, TOKENS, progress.step, micro.index))

    def rewind(self) -> None:
        """Chance learns nothing."""

    def share(self, workers: Workers) -> None:
        """Chance learns nothing."""

    def generators(self) -> list[torch.Generator]:
        return [self._generator]

    def watch(self, stream: Stream, index_K: Tensor) -> None:
        """Chance learns nothing."""

    def learn(self, micro: MicroBatch, index_K: Tensor, nll_K: Tensor) -> None:
        """Chance learns nothing."""

    def compares(self, ratio: float, progress: Progress) -> bool:
        return False

    def agreement(self, whole: Seen, micro: MicroBatch, ratio: float) -> dict[str, Tensor]:
        raise AssertionError("nothing to compare")

    def edges(self) -> dict[str, list[float]]:
        return {}

    def observe(self, values: dict[str, float], progress: Progress) -> None:
        """Nothing to learn from a finished step."""

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


class RandomRouter(RatioRouter):
    """Positions by chance: of the labelled ones, or of all that are not padding."""

    def __init__(
        self, keep: float, curriculum: Curriculum, seed: int, setting: Setting, labelled_only: bool = True
    ) -> None:
        super().__init__(keep, curriculum, seed, setting)
        self._labelled_only = labelled_only

    def route(self, seen: Seen | None, micro: MicroBatch, ratio: float) -> TokenRoute | None:
        if ratio == 1:
            return None
        draw = torch.rand(micro.labels_BT.shape, generator=self._generator, device=micro.labels_BT.device)
        eligible = micro.labels_BT if self._labelled_only else micro.position_ids_BT
        keys = torch.where(eligible >= 0, draw, -torch.inf)
        keep_B, eligible_B = counts(eligible, ratio)
        route = route_of(selectors.top_k(keys, keep_B), keep_B, eligible_B, ratio, inverse_probability=False)
        route.statistics[ROUTER_KEPT_FRACTION] = route.kept(micro.labels_BT)
        return route


class ScoreRouter(RatioRouter):
    """Positions by their scores."""

    def __init__(self, config: SelectedTokens, scorer: Scorer, seed: int, setting: Setting) -> None:
        super().__init__(config.keep, config.curriculum, seed, setting)
        self.config, self.scorer, self._reference_nll = config, scorer, setting.reference
        self._confidence: float | None = None
        self._reference: float | None = None
        self._early = config.router.EARLY
        self._last_BT: Tensor

    def levels(self) -> tuple[float, ...]:
        dynamic = self.config.dynamic
        if dynamic is not None:
            return ratio_levels(self.keep, below=dynamic.below)
        return tuple(sorted({*super().levels(), *([1.0] if self.scorer.first_full_tokens else [])}))

    def ratio(self, progress: Progress) -> float:
        if progress.tokens_seen < self.scorer.first_full_tokens:
            return 1.0
        base = self.curriculum.ratio(self.keep, progress)
        dynamic = self.config.dynamic
        if dynamic is not None and base < 1 and self._confidence is not None:
            base = dynamic.ratio(base, self._confidence, self._reference or self._confidence)
        return snap(base, self.levels())

    def begin(self, micro: MicroBatch, progress: Progress) -> None:
        super().begin(micro, progress)
        self.scorer.begin(micro)

    def rewind(self) -> None:
        self.scorer.rewind()

    def share(self, workers: Workers) -> None:
        self.scorer.share(workers)

    def reads(self, ratio: float) -> int:
        return self.scorer.reads if ratio < 1 or self.scorer.learns else 0

    @torch.no_grad()
    def route(self, seen: Seen | None, micro: MicroBatch, ratio: float) -> TokenRoute | None:
        if ratio == 1 and not self.scorer.learns:
            return None
        scored = self.scorer.score(seen, micro, self._generator)
        self._last_BT = scored.scores_BT
        return None if ratio == 1 else self._route(scored, micro, ratio)

    def _route(self, scored: Scored, micro: MicroBatch, ratio: float) -> TokenRoute:
        scores_BT, documents_BT, labels_BT = self._in_scope(scored.scores_BT, micro)
        keep_B, labelled_B = self.counts(scores_BT, labels_BT, ratio)
        left_B = labelled_B
        if self.config.drop_easiest or self.config.drop_hardest:
            tails = self.config.drop_easiest, self.config.drop_hardest
            scores_BT, left_B = selectors.without_tails(scores_BT, labelled_B, *tails)
            keep_B = keep_B.minimum(left_B)
        selection = choose(self.config, scores_BT, keep_B, left_B, documents_BT, self._generator)
        route = route_of(selection, keep_B, labelled_B, ratio, self.config.weights == "inverse_probability")
        kept_BK = torch.where(route.filled_BK, scores_BT.gather(1, route.index_BK), -torch.inf)
        usage = SCORE_BINS[self.config.score].counts(kept_BK)
        counted = {ROUTER_USAGE: usage, ROUTER_KEPT_FRACTION: route.kept(labels_BT)}
        route.statistics.update(statistics_of(scored, self.config.score) | counted)
        return route

    def counts(self, scores_BT: Tensor, labels_BT: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """(positions to keep, labelled positions) of each row of the scope; at most what `ratio` keeps."""
        return counts(labels_BT, ratio)

    def _in_scope(self, scores_BT: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(scores, documents, labels) in rows of the selection's scope."""
        documents_BT, labels_BT = micro.documents_BT, micro.labels_BT
        if self.config.scope == "row":
            return scores_BT, documents_BT, labels_BT
        row = torch.arange(len(labels_BT), device=scores_BT.device).unsqueeze(1)
        documents = (documents_BT + row * documents_BT.shape[1]).view(1, -1)
        return scores_BT.view(1, -1), documents, labels_BT.view(1, -1)

    @torch.no_grad()
    def watch(self, stream: Stream, index_K: Tensor) -> None:
        self.scorer.watch(stream, index_K)

    def learn(self, micro: MicroBatch, index_K: Tensor, nll_K: Tensor) -> None:
        self.scorer.learn(micro, index_K, nll_K)

    def compares(self, ratio: float, progress: Progress) -> bool:
        # With a draw there is nothing to agree.
        routed = self.config.score != "random" and (ratio < 1 or self.scorer.learns)
        return self._early and routed and progress.step % STEPS_PER_COMPARISON == 0

    @torch.no_grad()
    def agreement(self, whole: Seen, micro: MicroBatch, ratio: float) -> dict[str, Tensor]:
        """Of the scores of the last `route` with the model's own, and of the positions that top-k would keep."""
        found_BT = self._last_BT
        own_BT = own_scores(self.config.score, whole, micro, self._reference_nll, scope=self.config.scope).scores_BT
        keep_B = counts(self._in_scope(own_BT, micro)[2], min(ratio, self.keep))[0]
        kept = [selectors.top_k(self._in_scope(scores, micro)[0], keep_B).mask_BT for scores in (found_BT, own_BT)]
        return {ROUTER_SPEARMAN: spearman(found_BT, own_BT), ROUTER_RECALL: recall_at_k(*kept)}

    def edges(self) -> dict[str, list[float]]:
        return {ROUTER_SCORES: SCORE_BINS[self.config.score].edges}

    def observe(self, values: dict[str, float], progress: Progress) -> None:
        """Takes the mean confidence of a step that has finished; its delay is fixed, so a resumed run sees the same."""
        dynamic, seen = self.config.dynamic, values.get(ROUTER_CONFIDENCE)
        if dynamic is None or seen is None or seen != seen:
            return
        keep = 0.0 if dynamic.rule == "upstream" or self._confidence is None else dynamic.smoothing
        self._confidence = keep * (self._confidence or 0.0) + (1 - keep) * seen
        if self._reference is None and progress.fraction >= self.curriculum.target_at:
            self._reference = self._confidence

    def tensors(self) -> dict[str, Tensor]:
        return self.scorer.tensors()

    def state_dict(self) -> dict[str, Any]:
        return {"confidence": self._confidence, "reference": self._reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._confidence, self._reference = state["confidence"], state["reference"]


def statistics_of(scored: Scored, score: ScoreName) -> dict[str, Tensor]:
    """What a route tells of the scores it was made of."""
    found = {ROUTER_SCORES: SCORE_BINS[score].counts(scored.scores_BT)}
    if scored.stats is not None:
        found[ROUTER_ENTROPY] = scored.stats.entropy.nanmean()
        found[ROUTER_CONFIDENCE] = scored.stats.confidence.nanmean()
    return found


def choose(
    c: SelectedTokens,
    scores_BT: Tensor,
    keep_B: Tensor,
    labelled_B: Tensor,
    documents_BT: Tensor,
    generator: torch.Generator,
) -> Selection:
    """The selection of a configuration, keep_B positions of each row."""
    if c.selection == "stratified":
        unbiased = c.weights == "inverse_probability"
        return selectors.stratified(scores_BT, keep_B, labelled_B, c.num_strata, generator, unbiased)
    if c.selection == "stratified_top":
        return selectors.stratified_top(scores_BT, keep_B, labelled_B, c.num_strata)
    if c.selection == "sequence_aware":
        return selectors.sequence_aware(scores_BT, keep_B, documents_BT, c.min_tokens_per_sequence)
    if c.selection == "importance":
        importance = torch.where(scores_BT > -torch.inf, scores_BT.clamp_min(c.importance_floor), 0.0)
        pi = selectors.inclusion_probabilities(importance, keep_B, 1 / c.largest_weight)
        return selectors.systematic(pi, keep_B, generator)
    return selectors.top_k(scores_BT, keep_B)


def counts(labels_BT: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """(positions to keep, labelled positions) of each row, int64; at least one where there is a label."""
    labelled_B = (labels_BT >= 0).sum(1)
    return (ratio * labelled_B.double()).round().long().maximum(labelled_B.clamp_max(1)), labelled_B


def route_of(
    selection: Selection, keep_B: Tensor, labelled_B: Tensor, ratio: float, inverse_probability: bool
) -> TokenRoute:
    """Kept positions as sorted slots, with their weights; rows with fewer than K leave slots of weight 0."""
    width = selection.mask_BT.shape[1]
    index = compact(selection.mask_BT, max(1, math.ceil(ratio * width - 1e-9)), width)
    filled, index = index < width, index.clamp_max(width - 1)
    if inverse_probability:
        assert selection.probability_BT is not None
        weights = 1 / selection.probability_BT.gather(1, index).float()
    else:
        weights = (labelled_B / keep_B.clamp_min(1)).float().unsqueeze(1).expand_as(index)
    return TokenRoute(index, torch.where(filled, weights, 0.0))
