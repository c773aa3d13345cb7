"""CGGRLoss and CGGRScorer: the loss of the hardest positions, from logits or from hidden states.

Only the loss is selective here: the layers' backward pass runs in full, whatever is selected. From logits, nothing but
the gradient of the softmax is saved; from hidden states, logits of dropped positions are never kept, nor their head
gradient computed. `CGGRModel` saves the layers' backward pass.
Shapes: B rows of T positions, N = B T, K kept slots, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cggr_ray.api.batches import check_device, check_whole
from cggr_ray.api.curriculum import StepCurriculum
from cggr_ray.api.selection import Chooser, Sight, kept_fraction, on_host, score_name, selected_tokens
from cggr_ray.data.batch import IGNORE
from cggr_ray.kernels.head_stats.op import HeadStats, check_operands, head_stats
from cggr_ray.kernels.logit_stats.op import logit_stats
from cggr_ray.kernels.selected_ce.op import selected_cross_entropy
from cggr_ray.routing.route import TokenRoute
from cggr_ray.routing.scorers import Scored
from cggr_ray.routing.scores import score
from cggr_ray.schema import KEPT_LOSS, TRAIN_LOSS

NEEDS_NO_LABELS = ("entropy", "entropy_confidence", "margin")


class CGGRLoss(nn.Module):
    """Cross-entropy averaged over the positions that are hardest for the model.

        criterion = CGGRLoss(min_tokens_ratio=0.25, warmup_steps=1000)
        loss = criterion(logits, targets)                # targets[t] is the label of logits[t]
        loss = criterion(logits, labels, shift=True)     # labels[t + 1] is, as Hugging Face models take it
        loss.backward(); optimizer.step(); criterion.step()

    Nothing is shifted unless asked. A target that is `ignore_index`, or negative, is no label. In eval mode, and while
    the ratio is 1, every label counts and nothing is scored. A batch without labels has loss 0. Logits with a NaN have
    loss NaN, and so has its gradient, whether or not their position is one of the hardest.

    Args:
        scoring: entropy (H, in nats), entropy_confidence (H - p1), margin (1 - (p1 - p2)), loss, gnorm (|p - onehot|),
            surprise (loss - H), combined, upstream's sum of entropy_confidence, margin and loss, or combined_rank, the
            mean of the percentile ranks of these three in the batch; p1 and p2 are the two largest probabilities.
        selection: topk; stratified, draws from `num_strata` quantiles of difficulty, more from the harder;
            stratified_top, the hardest of each of these, without chance, as upstream has it; sequence_aware, topk with
            `min_tokens_per_sequence` of every row; fixed_quota, topk without the dynamic threshold; importance, draws
            by the score, with scoring loss or gnorm and weights `inverse_probability`.
        weights: `mean` over the kept positions; `inverse_probability`, for stratified and importance, makes the
            expected gradient that of all positions.
        dynamic_threshold: moves the ratio with the mean confidence of two calls before. `threshold_rule`: `upstream`
            can only raise it, `corrected` lowers it as confidence grows past its value at the end of the warm-up.
        min_tokens_ratio: reached after `warmup_steps` calls of `step`, linearly from 1.
        threshold_sensitivity: how far confidence moves the ratio, see `routing.curriculum.DynamicThreshold`.
        seed: of the draws of stratified and importance.

    Raises:
        ValueError: an option, or two together, that are not accepted; in a call, shapes or dtypes that do not fit.
    """

    def __init__(
        self,
        scoring: str = "combined",
        selection: str = "topk",
        num_strata: int = 4,
        min_tokens_per_sequence: int = 1,
        dynamic_threshold: bool = True,
        threshold_sensitivity: float = 0.5,
        min_tokens_ratio: float = 0.25,
        warmup_steps: int = 1000,
        weights: str = "mean",
        ignore_index: int = IGNORE,
        threshold_rule: str = "upstream",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = selected_tokens(
            scoring=scoring,
            selection=selection,
            num_strata=num_strata,
            min_tokens_per_sequence=min_tokens_per_sequence,
            dynamic_threshold=dynamic_threshold,
            threshold_sensitivity=threshold_sensitivity,
            min_tokens_ratio=min_tokens_ratio,
            weights=weights,
            threshold_rule=threshold_rule,
        )
        self.ignore_index = ignore_index
        self.curriculum = StepCurriculum(min_tokens_ratio, warmup_steps, self.config.dynamic)
        self._chooser = Chooser(self.config, seed)
        self._sight = Sight()

    def forward(self, logits: Tensor, targets: Tensor, shift: bool = False) -> Tensor:
        """The loss of logits (B, T, V) or (N, V) against targets (B, T) or (N,)."""
        labels_BT, flat_NV = _rows(logits, targets, self.ignore_index, "logits", shift)
        self._check_sequences(logits)
        route = self._route(labels_BT, lambda labels_N: logit_stats(flat_NV.detach(), labels_N))
        labels_N = labels_BT.flatten()
        if route is None:
            nll = F.cross_entropy(flat_NV.float(), labels_N, ignore_index=IGNORE, reduction="sum")
            return self._finish(nll, labels_BT, None)
        index = route.flat_index(len(labels_N))
        kept = flat_NV.index_select(0, index).float()
        nll_K = F.cross_entropy(kept, labels_N.index_select(0, index), ignore_index=IGNORE, reduction="none")
        return self._finish((nll_K * route.weights_BK.flatten()).sum(), labels_BT, route)

    def from_hidden(self, hidden: Tensor, head_weight: Tensor, labels: Tensor, shift: bool = False) -> Tensor:
        """The same from final hidden states (B, T, D) or (N, D) and the head's weight (V, D).

        The logits of all positions never exist at once: statistics come from the fused head, the loss from kept rows.
        """
        hidden, head_weight = _same_dtype(hidden, head_weight)
        labels_BT, flat_ND = _rows(hidden, labels, self.ignore_index, "hidden states", shift)
        self._check_sequences(hidden)
        check_operands(flat_ND, head_weight, labels_BT.flatten(), None)
        route = self._route(labels_BT, lambda labels_N: head_stats(flat_ND.detach(), head_weight.detach(), labels_N))
        labels_N = labels_BT.flatten()
        if route is None:
            weights = torch.ones(len(labels_N), device=labels_N.device)
        else:
            index, weights = route.flat_index(len(labels_N)), route.weights_BK.flatten()
            flat_ND, labels_N = flat_ND.index_select(0, index), labels_N.index_select(0, index)
        total, _ = selected_cross_entropy(flat_ND, head_weight, labels_N, weights)
        return self._finish(total, labels_BT, route)

    def step(self) -> None:
        """Advances the curriculum; to be called once an optimizer step."""
        self.curriculum.step()

    def metrics(self) -> dict[str, float]:
        """What the last call saw and kept, by the names of `cggr_ray.schema`. Waits for the device."""
        return on_host(self._sight.values)

    @torch.no_grad()
    def _route(self, labels_BT: Tensor, stats_of: Callable[[Tensor], HeadStats]) -> TokenRoute | None:
        """None keeps everything."""
        self._sight = Sight()
        ratio = self.curriculum.ratio() if self.training else 1.0
        if ratio == 1:
            return None
        stats = stats_of(labels_BT.flatten())
        scored = Scored(score(self.config.score, stats).view(labels_BT.shape), stats)
        self.curriculum.observe(self._sight.look(scored, labels_BT))
        one = torch.zeros_like(labels_BT)
        return self._chooser.choose(scored.scores_BT, labels_BT, one, ratio, self.curriculum.steps)

    def _finish(self, total: Tensor, labels_BT: Tensor, route: TokenRoute | None) -> Tensor:
        loss = total / (labels_BT >= 0).sum().clamp_min(1)
        name = TRAIN_LOSS if route is None else KEPT_LOSS
        return self._sight.finish(name, loss, kept_fraction(route, labels_BT))

    def _check_sequences(self, values: Tensor) -> None:
        if self.config.selection == "sequence_aware" and values.ndim == 2:
            raise ValueError(f"selection 'sequence_aware' on rows {tuple(values.shape)}; accepted: (B, T, ...)")


class CGGRScorer(nn.Module):
    """Difficulty of every position: float32, higher is harder, -inf where there is no label.

        scores = CGGRScorer("entropy_confidence")(logits)            # (B, T) from (B, T, V)
        scores = CGGRScorer("loss")(logits[:, :-1], labels[:, 1:])   # targets are those of these very positions

    Without targets every position is scored, by entropy, entropy_confidence or margin. No gradient flows through.
    `scoring` and `ignore_index` are as for `CGGRLoss`.

    Raises:
        ValueError: a score of another name; in a call, shapes or dtypes that do not fit, or no targets for a score that
            needs them.
    """

    def __init__(self, scoring: str = "combined", ignore_index: int = IGNORE) -> None:
        super().__init__()
        self.scoring, self.ignore_index = score_name(scoring), ignore_index

    @torch.no_grad()
    def forward(self, logits: Tensor, targets: Tensor | None = None) -> Tensor:
        """Scores of logits (B, T, V) or (N, V), of shape (B, T) or (N,)."""
        labels_BT, flat_NV = _rows(logits, self._targets(logits, targets), self.ignore_index, "logits")
        return self._scores(logit_stats(flat_NV, labels_BT.flatten()), logits)

    @torch.no_grad()
    def from_hidden(self, hidden: Tensor, head_weight: Tensor, labels: Tensor | None = None) -> Tensor:
        """The same from final hidden states (B, T, D) or (N, D) and the head's weight (V, D), keeping no logits."""
        hidden, head_weight = _same_dtype(hidden, head_weight)
        labels_BT, flat_ND = _rows(hidden, self._targets(hidden, labels), self.ignore_index, "hidden states")
        return self._scores(head_stats(flat_ND, head_weight, labels_BT.flatten()), hidden)

    def _targets(self, values: Tensor, targets: Tensor | None) -> Tensor:
        if targets is not None:
            return targets
        if self.scoring not in NEEDS_NO_LABELS:
            raise ValueError(f"scoring {self.scoring!r} without targets; accepted: {', '.join(NEEDS_NO_LABELS)}")
        # Any label serves: these scores do not read it.
        other = 0 if self.ignore_index != 0 else 1
        return torch.full(values.shape[:-1], other, dtype=torch.int64, device=values.device)

    def _scores(self, stats: HeadStats, values: Tensor) -> Tensor:
        return score(self.scoring, stats).view(values.shape[:-1])


def _rows(values: Tensor, targets: Tensor, ignore_index: int, what: str, shift: bool = False) -> tuple[Tensor, Tensor]:
    """(labels (B, T), -100 where there is none; values as rows). Two dimensions are one row of N positions."""
    if values.ndim not in (2, 3) or targets.shape != values.shape[:-1] or targets.numel() == 0:
        shapes = f"{what} {tuple(values.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes}; accepted: (B, T, ...) with (B, T), or (N, ...) with (N,), none of them empty")
    check_whole("targets", targets)
    check_device("targets", targets, values.device, what)
    labels = torch.where((targets == ignore_index) | (targets < 0), IGNORE, targets).long()
    if shift:
        # Labels move rather than logits: a slice of the logits would have to be copied.
        labels = F.pad(labels[..., 1:], (0, 1), value=IGNORE)
    return (labels.unsqueeze(0) if labels.ndim == 1 else labels), values.flatten(0, -2)


def _same_dtype(hidden: Tensor, head_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast both in its dtype, as a linear layer would have them."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return hidden, head_weight
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), head_weight.to(dtype)
