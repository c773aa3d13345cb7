"""Where difficulty scores come from: the model's own forward, its first layers, or the last epoch.

    OwnScores        every layer and the head of this very forward: exact, known when the forward is over
    TruncatedRouter  the first layers, the last norm and the head; the layers' work is shared with the main forward
    StaleScores      the loss that a position had when it was last trained on; the first epoch keeps everything

`trained_scorers` has those with parameters of their own. A scorer `reads` so many layers before it scores. What kept
positions turn out to lose teaches those that learn.
Shapes: B rows, T positions, N = B T, K kept slots, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from cggr_ray.data.batch import MicroBatch
from cggr_ray.kernels.head_stats.op import HeadStats, head_stats
from cggr_ray.models.adapter import Stream
from cggr_ray.routing.scores import ScoreName, score
from cggr_ray.sparse.plan import Seen
from cggr_ray.workers import Workers

Scope = Literal["row", "batch"]


class Setting(NamedTuple):
    """What a router may know of the run it is built for."""

    device: torch.device
    num_layers: int
    width: int
    num_positions: int
    """Positions of the whole data set: ids are below it."""
    reference: Tensor | None = None
    """What a reference model loses at every position id, one entry more for padding; where the score needs it."""
    scope: Scope = "row"
    """Which positions are compared with one another."""


class Scored(NamedTuple):
    """Higher is harder, -inf without a label; the statistics behind the scores where there are any."""

    scores_BT: Tensor
    stats: HeadStats | None


class Scorer(Protocol):
    reads: int
    learns: bool
    first_full_tokens: int
    """Everything is kept until so many tokens have been seen."""

    def begin(self, micro: MicroBatch) -> None:
        """Before a micro-batch: remembers what `learn` may change until the step ends, for `rewind`."""
        ...

    def rewind(self) -> None: ...
    def share(self, workers: Workers) -> None:
        """After the last micro-batch of a step: what all workers have learned in it becomes known to all."""
        ...

    def score(self, seen: Seen | None, micro: MicroBatch, generator: torch.Generator) -> Scored: ...
    def watch(self, stream: Stream, index_K: Tensor) -> None:
        """Between `score` and `learn`, when the forward is over: takes what `learn` needs of it, and no more."""
        ...

    def learn(self, micro: MicroBatch, index_K: Tensor, nll_K: Tensor) -> None: ...
    def tensors(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class OwnScores:
    """The model's own scores: exact, after the whole forward."""

    IS_PART: ClassVar[bool] = True
    EARLY: ClassVar[bool] = False

    def needs_layers(self) -> int:
        return 1

    def build(self, name: ScoreName, setting: Setting, seed: int) -> Scorer:
        return HeadScorer(name, setting.num_layers, setting)


@dataclass(frozen=True)
class TruncatedRouter:
    """Scores by the model cut off after `layers`: their hidden states through the last norm and the head."""

    IS_PART: ClassVar[bool] = True
    EARLY: ClassVar[bool] = True

    layers: int = 4

    def __post_init__(self) -> None:
        check_layers(self.layers)

    def needs_layers(self) -> int:
        return self.layers + 1

    def build(self, name: ScoreName, setting: Setting, seed: int) -> Scorer:
        check_depth(self.layers, setting)
        return HeadScorer(name, self.layers, setting)


@dataclass(frozen=True)
class StaleScores:
    """The loss of the last visit. Positions never seen count as hardest; needs a first epoch at ratio 1."""

    IS_PART: ClassVar[bool] = True
    EARLY: ClassVar[bool] = True

    def needs_layers(self) -> int:
        return 1

    def build(self, name: ScoreName, setting: Setting, seed: int) -> Scorer:
        assert name == "loss", f"score {name!r} from the last epoch"
        return StaleScorer(setting)


def check_layers(layers: int) -> None:
    if layers < 1:
        raise ValueError(f"layers = {layers}; accepted: at least 1")


def check_depth(layers: int, setting: Setting) -> None:
    if layers >= setting.num_layers:
        raise ValueError(f"layers = {layers} of a model with {setting.num_layers}; accepted: fewer than it has")


def own_scores(
    name: ScoreName,
    seen: Seen,
    micro: MicroBatch,
    reference: Tensor | None = None,
    generator: torch.Generator | None = None,
    scope: Scope = "batch",
) -> Scored:
    """Scores by the head, of what it sees. `reference`: by position id, the entry of padding last."""
    stats = head_stats(seen.final_ND, seen.head_VD, micro.labels_BT.flatten())
    reference_N = None if reference is None else reference[micro.position_ids_BT.flatten()].float()
    rows = len(micro.labels_BT) if scope == "row" else 1
    return Scored(score(name, stats, reference_N, generator, rows).view(micro.labels_BT.shape), stats)


def teaching(micro: MicroBatch, index_K: Tensor, nll_K: Tensor) -> Tensor:
    """Slots to learn from: filled, labelled, of a finite loss. The optimizer passes over what is not finite, too."""
    return (micro.labels_BT.flatten().index_select(0, index_K) >= 0) & nll_K.isfinite()


class HeadScorer:
    """Scores through the head, from the hidden states after some layers."""

    learns = False
    first_full_tokens = 0

    def __init__(self, name: ScoreName, reads: int, setting: Setting) -> None:
        self.name, self.reads, self.reference, self.scope = name, reads, setting.reference, setting.scope

    def begin(self, micro: MicroBatch) -> None:
        """Nothing changes."""

    def rewind(self) -> None:
        """Nothing has changed."""

    def share(self, workers: Workers) -> None:
        """Nothing is learned."""

    def score(self, seen: Seen | None, micro: MicroBatch, generator: torch.Generator) -> Scored:
        assert seen is not None
        return own_scores(self.name, seen, micro, self.reference, generator, self.scope)

    def watch(self, stream: Stream, index_K: Tensor) -> None:
        """Nothing to learn."""

    def learn(self, micro: MicroBatch, index_K: Tensor, nll_K: Tensor) -> None:
        """Nothing to learn."""

    def tensors(self) -> dict[str, Tensor]:
        return {}


class StaleScorer:
    """A table of losses by position id."""

    reads, learns = 0, True

    def __init__(self, setting: Setting) -> None:
        self.first_full_tokens = setting.num_positions
        # One entry more than there are positions, for slots that hold none.
        self._losses = torch.full((setting.num_positions + 1,), math.inf, device=setting.device)
        # (ids, losses) of the step's micro-batches so far.
        self._before: list[tuple[Tensor, Tensor]] = []

    def begin(self, micro: MicroBatch) -> None:
        ids = micro.position_ids_BT
        self._before = [*([] if micro.first else self._before), (ids, self._losses[ids])]

    def rewind(self) -> None:
        for ids, losses in reversed(self._before):
            self._losses[ids] = losses
        self._before = []

    def share(self, workers: Workers) -> None:
        if workers.size > 1:
            ids = torch.cat([ids.flatten() for ids, _ in self._before])
            losses = workers.gather(self._losses[ids])
            self._losses[workers.gather(ids)] = losses

    def score(self, seen: Seen | None, micro: MicroBatch, generator: torch.Generator) -> Scored:
        losses = self._losses[micro.position_ids_BT]
        # Finite, so that a position never seen is kept rather than taken for one without a label.
        finite = losses.clamp_max(torch.finfo(torch.float32).max)
        return Scored(torch.where(micro.labels_BT >= 0, finite, -torch.inf), None)

    def watch(self, stream: Stream, index_K: Tensor) -> None:
        """The losses are enough."""

    def learn(self, micro: MicroBatch, index_K: Tensor, nll_K: Tensor) -> None:
        ids = micro.position_ids_BT.flatten().index_select(0, index_K)
        teaches = teaching(micro, index_K, nll_K)
        last = len(self._losses) - 1
        self._losses.index_copy_(0, torch.where(teaches, ids, last), torch.where(teaches, nll_K, math.inf))

    def tensors(self) -> dict[str, Tensor]:
        return {"losses": self._losses}
