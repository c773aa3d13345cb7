"""Multi-token prediction: the next token, and beside it losses of the tokens after that one.

y_{t+k} is the token k steps after position t, NTP the next-token loss (k = 1). A target counts where it lies in the
document of t and has a label, whatever the form. With a route the auxiliary losses are those of the kept positions,
with the route's weights. The reported loss is NTP alone. Shapes: D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cggr_ray.models.adapter import Adapter
from cggr_ray.objectives.extra_heads import IndependentHeads, LayerHeads, NextHead
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.objectives.objective import Objective
from cggr_ray.objectives.shared_logits import SharedLogits
from cggr_ray.progress import Progress, ramp
from cggr_ray.routing.draws import OBJECTIVE, seed_of

# How the seed weighs its heads: each half of the one before, and never less than this.
DECAY, LEAST = 0.5, 0.01


@dataclass(frozen=True)
class Heads:
    """NTP + weight sum_i max(.5^i, .01) CE_i: matrices of their own (V, D) on the model's final hidden states.

    Head i = 0, 1, ... predicts y_{t+2+i}; four of them in the E3 seed, which predicts five tokens so.
    Differs from the seed: no bias, no target in another document, drawn as the model draws its head.
    """

    IS_PART: ClassVar[bool] = True

    num_heads: int = 4
    weight: float = 0.2

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ValueError(f"num_heads = {self.num_heads}; accepted: at least 1")
        _check_weight("weight", self.weight)

    def runs_on_kept_rows(self) -> bool:
        return True

    def build(self, next_token: NextToken, adapter: Adapter, seed: int) -> Objective:
        weights = [self.weight * max(DECAY**i, LEAST) for i in range(self.num_heads)]
        return IndependentHeads(next_token, adapter, seed, weights)


@dataclass(frozen=True)
class TrunkHeads:
    """NTP + weight sum_k CE_k, k = 2 .. num_tokens: a decoder layer for each token ahead, on a trunk that all share.

    Meta's multi-token prediction (arXiv 2404.19737, section 2), with equal weights and one unembedding.
    Differs from the paper: the trunk is all layers but the last, which is the head of the next token. The model keeps
    its depth: the paper takes the layers of the other heads from the trunk, here they are thrown away after training.
    """

    IS_PART: ClassVar[bool] = True

    num_tokens: int = 4
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.num_tokens < 2:
            raise ValueError(f"num_tokens = {self.num_tokens}; accepted: at least 2, the next token is one of them")
        _check_weight("weight", self.weight)

    def runs_on_kept_rows(self) -> bool:
        return False

    def build(self, next_token: NextToken, adapter: Adapter, seed: int) -> Objective:
        return LayerHeads(next_token, adapter, seed, [self.weight] * (self.num_tokens - 1))


@dataclass(frozen=True)
class Sequential:
    """NTP + weight CE: one more layer predicts y_{t+2} from W [norm(embedding(y_{t+1})); norm(h_t)], W of (D, 2 D).

    DeepSeek-V3's module of depth 1 (arXiv 2412.19437, equations 21 to 25), with the model's last norm and head.
    `weight` goes to `weight_end` linearly between two fractions of the budget, in a step where they are equal; the
    default is the paper's .3 for 10 of its 14.8 trillion tokens, then .1.
    Differs from the paper: h_t has passed the model's last norm already, and the module's last norm is the model's.
    """

    IS_PART: ClassVar[bool] = True

    weight: float = 0.3
    weight_end: float = 0.1
    anneal_from: float = 0.676
    anneal_until: float = 0.676

    def __post_init__(self) -> None:
        _check_weight("weight", self.weight)
        _check_weight("weight_end", self.weight_end)
        if not 0 <= self.anneal_from <= self.anneal_until <= 1:
            raise ValueError(f"anneal_from = {self.anneal_from}, anneal_until = {self.anneal_until}; "
                             "accepted: fractions of the budget in this order")  # fmt: skip

    def weight_at(self, progress: Progress) -> float:
        passed = ramp(progress.fraction, self.anneal_from, self.anneal_until)
        return self.weight + (self.weight_end - self.weight) * passed

    def runs_on_kept_rows(self) -> bool:
        return False

    def build(self, next_token: NextToken, adapter: Adapter, seed: int) -> Objective:
        return NextHead(next_token, adapter, seed, self.weight_at)


@dataclass(frozen=True)
class MultiToken:
    """The next token and those after it are predicted; the model that comes out is an ordinary one.

    `form`: several targets of one logits (`shared_logits`), matrices of their own (`heads`), layers on a shared trunk
    (`trunk_heads`), a layer that sees the next token too (`sequential`). `next`: the loss of the next token itself.
    """

    IS_PART: ClassVar[bool] = True

    form: SharedLogits | Heads | TrunkHeads | Sequential = field(default_factory=SharedLogits)
    next: NextToken = field(default_factory=NextToken)

    def runs_on_kept_rows(self) -> bool:
        """Whether a forward that leaves kept rows alone is enough."""
        return self.form.runs_on_kept_rows()

    def build(self, adapter: Adapter, seed: int) -> Objective:
        return self.form.build(self.next, adapter, seed_of(seed, OBJECTIVE))


def _check_weight(name: str, weight: float) -> None:
    if not 0 <= weight < float("inf"):
        raise ValueError(f"{name} = {weight}; accepted: at least 0")
