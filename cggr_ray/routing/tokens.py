"""The `tokens` parts: which positions carry a gradient, and by which plan. Neutral: `AllTokens`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from cggr_ray.codec import kind_of
from cggr_ray.models.adapter import Adapter
from cggr_ray.routing.curriculum import Curriculum, DynamicThreshold
from cggr_ray.routing.routers import RandomRouter, RatioRouter, Router, ScoreRouter
from cggr_ray.routing.scorers import OwnScores, Scope, Setting, StaleScores, TruncatedRouter
from cggr_ray.routing.scores import ScoreName
from cggr_ray.routing.trained_scorers import Probe, TunedLens
from cggr_ray.sparse.layers import Detach
from cggr_ray.sparse.plan import Dense, KeptRows, Plan, Skip, TwoPass

PlanName = Literal["dense", "after", "two_pass", "before"]


def build_plan(name: PlanName, detach: Detach, adapter: Adapter) -> Plan:
    """The running plan of a name."""
    if name == "dense":
        return Dense(adapter)
    return TwoPass(adapter, detach) if name == "two_pass" else KeptRows(adapter, detach)


# Strata and positions are one number on a GPU: two million positions are left to choose from.
MOST_STRATA = 1000


@dataclass(frozen=True)
class AllTokens:
    """Every labelled position carries its gradient."""

    IS_PART: ClassVar[bool] = True

    def build(self, seed: int, setting: Setting) -> Router:
        return RatioRouter(1.0, Curriculum(), seed, setting)

    def runs_all_positions(self) -> bool:
        """Whether every position passes the last layer, as objectives with layers of their own need it."""
        return True

    def plan_for(self, adapter: Adapter) -> Plan:
        return Dense(adapter)


@dataclass(frozen=True)
class RandomTokens:
    """Control: as many positions as the selecting recipe keeps, chosen by chance, no scoring."""

    IS_PART: ClassVar[bool] = True

    keep: float = 0.25
    plan: Literal["dense", "before"] = "before"
    detach: Detach = "const"
    curriculum: Curriculum = Curriculum()

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def build(self, seed: int, setting: Setting) -> Router:
        return RandomRouter(self.keep, self.curriculum, seed, setting)

    def runs_all_positions(self) -> bool:
        return self.plan == "dense"

    def plan_for(self, adapter: Adapter) -> Plan:
        return build_plan(self.plan, self.detach, adapter)


@dataclass(frozen=True)
class SelectedTokens:
    """Positions selected by their difficulty (CGGRLoss by the plan `dense`, CGGRModel's token mode by the others).

    `plan`: `dense` is the exact gradient of the selected loss; `after` and `two_pass` need the model's own scores,
    `before` needs a router that scores early. `detach`: what dropped positions are constants of, see `sparse.plan`.
    `weights`: `mean` averages over kept positions as the seeds do; `inverse_probability` weighs by 1/pi, so that the
    expected gradient is that of all positions (selections that draw at random, plan `dense`).
    `selection`: `stratified` draws by chance within strata of the score, `stratified_top` takes the hardest of each.
    `scope`: exactly k of every row, or of the whole micro-batch as upstream does.
    `drop_easiest`, `drop_hardest`: parts of the labelled positions, by score, that no selection keeps while it selects,
    a mislabelled position being among the hardest.
    `reference`: the folder of the model (safetensors) whose loss the score `excess` subtracts.
    """

    IS_PART: ClassVar[bool] = True

    keep: float = 0.25
    score: ScoreName = "combined"
    selection: Literal["topk", "stratified", "stratified_top", "sequence_aware", "fixed_quota", "importance"] = "topk"
    weights: Literal["mean", "inverse_probability"] = "mean"
    plan: PlanName = "dense"
    detach: Detach = "const"
    router: OwnScores | TruncatedRouter | Probe | TunedLens | StaleScores = field(default_factory=OwnScores)
    scope: Scope = "row"
    num_strata: int = 4
    min_tokens_per_sequence: int = 1
    importance_floor: float = 0.15
    largest_weight: float = 10.0
    drop_easiest: float = 0.0
    drop_hardest: float = 0.0
    curriculum: Curriculum = Curriculum()
    dynamic: DynamicThreshold | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.score == "excess" and self.reference is None:
            raise ValueError("score 'excess' without a reference; accepted: reference = the folder of a model")
        if self.score != "excess" and self.reference is not None:
            raise ValueError(f"reference {self.reference!r} with score {self.score!r}; accepted: with 'excess'")
        check_strata(self.num_strata)
        low, high = self.drop_easiest, self.drop_hardest
        if not (low >= 0 and high >= 0 and self.keep + low + high <= 1 + 1e-9):
            raise ValueError(f"drop_easiest = {low}, drop_hardest = {high} at keep = {self.keep}; accepted: not "
                             "negative, and at most 1 together with keep")  # fmt: skip
        if self.min_tokens_per_sequence < 0:
            raise ValueError(f"min_tokens_per_sequence = {self.min_tokens_per_sequence}; accepted: at least 0")
        if self.selection == "fixed_quota" and self.dynamic is not None:
            raise ValueError("selection 'fixed_quota' with a dynamic threshold; accepted: one of the two")
        random = self.selection in ("stratified", "importance")
        if self.weights == "inverse_probability" and not random:
            raise ValueError(f"weights 'inverse_probability' with {self.selection!r}; accepted: stratified, importance")
        if self.selection == "importance":
            self._check_importance()
        early = self.router.EARLY
        if self.plan in ("after", "two_pass") and early:
            raise ValueError(f"plan {self.plan!r} with a router that scores early; accepted: before, dense")
        if self.plan == "before" and not early:
            raise ValueError("plan 'before' with the model's own scores; accepted: after, two_pass, dense")
        if isinstance(self.router, Probe | StaleScores):
            self._check_loss_alone(kind_of(type(self.router)))

    def _check_loss_alone(self, router: str) -> None:
        """Whether a router will do that knows of a position what it loses, or is to lose, and nothing else."""
        if self.score != "loss":
            raise ValueError(f"score {self.score!r} with router {router!r}, which knows the loss alone; accepted: "
                             "'loss', or own_scores, truncated_router, tuned_lens")  # fmt: skip
        if self.dynamic is not None:
            raise ValueError(f"dynamic threshold with router {router!r}, which sees no confidence; "
                             "accepted: own_scores, truncated_router, tuned_lens")  # fmt: skip

    def _check_importance(self) -> None:
        if self.weights != "inverse_probability":
            raise ValueError("selection 'importance'; accepted: with weights 'inverse_probability'")
        if self.score not in ("gnorm", "loss"):
            raise ValueError(f"selection 'importance' by {self.score!r}; accepted: gnorm, loss, which are not negative")
        smallest = self.keep * (0.5 if self.dynamic else 1.0)
        if not (self.importance_floor > 0 and smallest * self.largest_weight >= 1):
            raise ValueError(f"largest_weight = {self.largest_weight} at keep = {self.keep}; "
                             f"accepted: a weight of at least {1 / smallest:g}, and a positive floor")  # fmt: skip

    def needs_layers(self) -> int:
        return self.router.needs_layers()

    def build(self, seed: int, setting: Setting) -> Router:
        scorer = self.router.build(self.score, setting._replace(scope=self.scope), seed)
        return ScoreRouter(self, scorer, seed, setting)

    def runs_all_positions(self) -> bool:
        return self.plan == "dense"

    def plan_for(self, adapter: Adapter) -> Plan:
        return build_plan(self.plan, self.detach, adapter)


@dataclass(frozen=True)
class SkippedTokens:
    """Kept positions alone pass the middle layers; the others skip them and rejoin behind. Every position has a loss.

    `choice`: any by chance (arXiv 2211.11586), or labelled positions by the loss that a probe behind the entry layers
    expects of them: the largest (`confidence`), or drawn from `num_strata` strata of it, more from the harder ones
    (`stratified`).
    Evaluation always runs the whole model; the curriculum should end with full steps.
    """

    IS_PART: ClassVar[bool] = True

    keep: float = 0.25
    choice: Literal["random", "confidence", "stratified"] = "random"
    entry: int = 2
    exit: int = 2
    num_strata: int = 4
    curriculum: Curriculum = Curriculum(target_at=0.0, full_from=0.5)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.entry < 0 or self.exit < 0:
            raise ValueError(f"entry = {self.entry}, exit = {self.exit}; accepted: at least 0")
        check_strata(self.num_strata)
        if self.choice != "random" and self.entry < 1:
            raise ValueError(
                f"choice {self.choice!r} with entry = 0; accepted: at least one layer for the probe to read"
            )

    def needs_layers(self) -> int:
        return self.entry + self.exit + 1

    def build(self, seed: int, setting: Setting) -> Router:
        if self.choice == "random":
            return RandomRouter(self.keep, self.curriculum, seed, setting, labelled_only=False)
        chosen = SelectedTokens(
            self.keep,
            "loss",
            "topk" if self.choice == "confidence" else "stratified",
            plan="before",
            router=Probe(layers=self.entry),
            num_strata=self.num_strata,
            curriculum=self.curriculum,
        )
        return chosen.build(seed, setting)

    def runs_all_positions(self) -> bool:
        return self.exit > 0

    def plan_for(self, adapter: Adapter) -> Plan:
        return Skip(adapter, self.entry, self.exit)


def check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep = {keep}; accepted: a ratio in (0, 1]")


def check_strata(num_strata: int) -> None:
    if not 1 <= num_strata <= MOST_STRATA:
        raise ValueError(f"num_strata = {num_strata}; accepted: 1 to {MOST_STRATA}")
