"""What `CGGRLoss` and `CGGRModel` share: their options, checked, and the choice of positions by their scores.

Exactly k = round(ratio labelled) positions of the whole batch are kept, at least one. The number of slots that hold
them is known before the scores are: ceil(r positions), r the next of a few ratios, each of which is a shape of its own.
Shapes: B rows of T positions, N = B T.
"""

from __future__ import annotations

from typing import Any, cast, get_args, get_type_hints

import torch
from torch import Tensor

from cggr_ray.routing.curriculum import DynamicThreshold, ratio_levels, snap
from cggr_ray.routing.draws import TOKENS, seed_of
from cggr_ray.routing.route import TokenRoute
from cggr_ray.routing.routers import choose, counts, route_of
from cggr_ray.routing.scorers import Scored
from cggr_ray.routing.scores import HeadScore
from cggr_ray.routing.tokens import SelectedTokens
from cggr_ray.schema import ROUTER_CONFIDENCE, ROUTER_ENTROPY, ROUTER_KEPT_FRACTION
from cggr_ray.seeds import check_seed


def check_name(option: str, value: str, accepted: tuple[str, ...]) -> None:
    """Raises ValueError for a name that is none of the accepted ones."""
    if value not in accepted:
        raise ValueError(f"{option} = {value!r}; accepted: {', '.join(accepted)}")


def score_name(value: str) -> HeadScore:
    """The name of a score, checked."""
    check_name("scoring", value, get_args(HeadScore))
    return cast(HeadScore, value)


def selected_tokens(
    *,
    scoring: str,
    min_tokens_ratio: float,
    dynamic_threshold: bool,
    threshold_rule: str,
    threshold_sensitivity: float,
    **others: Any,
) -> SelectedTokens:
    """The options as a part of a recipe, whose checks they pass.

    `fixed_quota` is `topk` without the dynamic threshold, whether that was asked for or not.
    """
    score = score_name(scoring)
    if not 0 < min_tokens_ratio <= 1:
        raise ValueError(f"min_tokens_ratio = {min_tokens_ratio}; accepted: a ratio in (0, 1]")
    hints = get_type_hints(SelectedTokens)
    for option in ("selection", "weights", "detach"):
        if option in others:
            check_name(option, others[option], get_args(hints[option]))
    check_name("threshold_rule", threshold_rule, get_args(get_type_hints(DynamicThreshold)["rule"]))
    rule: Any = threshold_rule
    dynamic = DynamicThreshold(rule, threshold_sensitivity) if dynamic_threshold else None
    if others["selection"] == "fixed_quota":
        dynamic = None
    return SelectedTokens(min_tokens_ratio, score, dynamic=dynamic, scope="batch", **others)


class Chooser:
    """Positions by their scores, over the whole batch. Draws depend on seed, step and call within the step alone."""

    def __init__(self, config: SelectedTokens, seed: int) -> None:
        check_seed("seed", seed)
        self.config, self._seed = config, seed
        self._levels = ratio_levels(config.keep, below=config.dynamic is not None and config.dynamic.below)
        self._at, self._call = 0, 0

    def choose(
        self, scores_BT: Tensor, labels_BT: Tensor, sequences_BT: Tensor, ratio: float, steps: int
    ) -> TokenRoute:
        """A route of one row that holds all N positions. `sequences_BT` numbers the sequences of each row."""
        rows, width = labels_BT.shape
        offset = torch.arange(rows, device=labels_BT.device).unsqueeze(1) * (width + 1)
        scores, labels, sequences = (x.reshape(1, -1) for x in (scores_BT, labels_BT, sequences_BT + offset))
        keep, labelled = counts(labels, ratio)
        selection = choose(self.config, scores, keep, labelled, sequences, self._generator(scores.device, steps))
        unbiased = self.config.weights == "inverse_probability"
        return route_of(selection, keep, labelled, snap(ratio, self._levels), unbiased)

    @torch.compiler.disable
    def _generator(self, device: torch.device, steps: int) -> torch.Generator:
        self._at, self._call = steps, self._call + 1 if steps == self._at else 0
        return torch.Generator(device).manual_seed(seed_of(self._seed, TOKENS, steps, self._call))


def seen_by(scored: Scored) -> dict[str, Tensor]:
    """Means over the scored positions, by schema name."""
    assert scored.stats is not None
    return {ROUTER_ENTROPY: scored.stats.entropy.nanmean(), ROUTER_CONFIDENCE: scored.stats.confidence.nanmean()}


class Sight:
    """What one call sees: `values` by schema name, and whether all labelled positions have logits that are numbers."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._sound: Tensor | None = None

    def look(self, scored: Scored, labels_BT: Tensor) -> Tensor:
        """Takes in the scores by which positions are chosen; their mean confidence."""
        self.values = seen_by(scored)
        # A position whose logits are no numbers has no score, and a selection passes it by.
        lost = ((labels_BT >= 0) & (scored.scores_BT == -torch.inf)).any()
        self._sound = torch.where(lost, torch.nan, 1.0)
        return self.values[ROUTER_CONFIDENCE]

    def finish(self, name: str, loss: Tensor, kept: Tensor) -> Tensor:
        """The loss, NaN where a labelled position had no score; `values` has it by `name`, and the kept fraction."""
        loss = loss if self._sound is None else loss * self._sound
        self.values |= {name: loss.detach(), ROUTER_KEPT_FRACTION: kept}
        return loss


def kept_fraction(route: TokenRoute | None, labels_BT: Tensor, all_labels_BT: Tensor | None = None) -> Tensor:
    """Kept / labelled positions, 0-d, on the device; `all_labels_BT` where rows were left out before."""
    labelled = (labels_BT >= 0).sum()
    kept = labelled if route is None else route.filled_BK.sum()
    return kept / (labelled if all_labels_BT is None else (all_labels_BT >= 0).sum()).clamp_min(1)


def on_host(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Waits for the device."""
    return {name: float(value) for name, value in metrics.items()}
