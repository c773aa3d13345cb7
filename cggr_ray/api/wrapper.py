"""CGGRWrapper: the easier a position, the fewer layers, counted from the top, learn from it. See `routing.depth`.

Buckets are made of the logits of a forward and used in the backward of that same forward. Their ranks are those of the
whole batch. `sparse` computes the rows that learn, and no others; the hooks of `every` and `faithful` work on any stack
of layers and save no time: they multiply a dense gradient by 0 and 1.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cggr_ray.api.borrowed import Borrowed
from cggr_ray.api.curriculum import StepCount
from cggr_ray.api.hooks import GatedLayers, find_layers
from cggr_ray.api.loss import NEEDS_NO_LABELS
from cggr_ray.api.model import as_output, copy_tied, mean_loss, of_step, tokens_alone
from cggr_ray.api.selection import check_name, on_host, score_name, seen_by
from cggr_ray.data.batch import IGNORE
from cggr_ray.kernels.logit_stats.op import logit_stats
from cggr_ray.models.adapter import Adapter
from cggr_ray.models.families import SUPPORTED
from cggr_ray.routing.buckets import DepthBuckets
from cggr_ray.routing.depth import cut_layers, deepest_bucket, depth_buckets
from cggr_ray.routing.route import Depth, TokenRoute
from cggr_ray.routing.scorers import Scored, own_scores
from cggr_ray.routing.scores import score
from cggr_ray.schema import TRAIN_LOSS
from cggr_ray.sparse.plan import Dense, Plan, Seen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENGINES = ("sparse", "every", "faithful")


class CGGRWrapper(nn.Module):
    """Sends the gradient of easy positions through the upper layers only.

        model = CGGRWrapper(model, num_buckets=4, warmup_steps=1000)
        logits = model(input_ids)                            # what the model itself returns
        criterion(logits, targets).backward()                # gated: the usual cost
        loss = model(input_ids, labels=labels)               # engine 'sparse' alone: the loss, at the cost of its rows
        loss.backward(); optimizer.step(); model.step()

    The first of B buckets holds the hardest positions and reaches all L layers; bucket b reaches floor(L (B - b) / B).
    Over the warm-up one bucket after the other is told apart. In eval mode a call is a call on `model`.

    Args:
        model: any module that returns logits (B, T, V), or an output with `logits`, from layers on (B, T, D).
        leak_rate: what passes a gate that is shut. More than 0 needs a full backward pass.
        scoring: as for `CGGRLoss`; all but the first three need `labels`, unshifted, with every call.
        engine: `sparse` for the families that `CGGRModel` supports: a call with labels runs rows that learn alone, any
            other is hooked as `every`. `every` shuts gates at every layer, `faithful` at the cut layers alone, as
            upstream does, below which attention refills the gradient. None takes the first that fits model and leak,
            with a warning where the model rules `sparse` out.
        detach: of `sparse`, as for `CGGRModel`; `live` is the gradient of `every`.
        layers: the stack, where it cannot be found in the model.
        gradient_checkpointing: of `sparse`, recomputes layers in the backward pass; the hooks take the model's own.
        return_dict: for `transformers.Trainer`, as for `CGGRModel`.

    Raises:
        ValueError: options that are not accepted together, no stack of layers or several, a model that an engine asked
            for cannot run; in a call, logits that are not (B, T, V), or no labels for a score that needs them.
    """

    def __init__(
        self,
        model: nn.Module,
        num_buckets: int = 4,
        warmup_steps: int = 1000,
        leak_rate: float = 0.0,
        scoring: str = "entropy_confidence",
        engine: str | None = None,
        detach: str = "live",
        layers: Sequence[nn.Module] | None = None,
        gradient_checkpointing: bool = False,
        return_dict: bool = False,
    ) -> None:
        super().__init__()
        engine = engine or _first_engine(model, leak_rate)
        check_name("engine", engine, ENGINES)
        check_name("detach", detach, ("const", "live"))
        if gradient_checkpointing and engine != "sparse":
            raise ValueError(f"gradient_checkpointing with engine {engine!r}; accepted: the model's own, or 'sparse'")
        options: dict[str, Any] = {"engine": engine, "leak_rate": leak_rate, "detach": detach}
        self.depth = DepthBuckets(num_buckets, score_name(scoring), **options)
        self.model, self.return_dict = model, return_dict
        self.borrowed: Borrowed | None = None
        if engine == "sparse":
            self.borrowed = Borrowed(cast("PreTrainedModel", model), gradient_checkpointing)
        self.curriculum = StepCount(warmup_steps)
        found = list(layers or (self.borrowed.adapter.layers if self.borrowed else find_layers(model)))
        only = set(cut_layers(len(found), num_buckets)) if engine == "faithful" else None
        self._gates = GatedLayers(found, leak_rate, only)
        self._plan: tuple[Adapter, Plan] | None = None
        self._metrics: dict[str, Tensor] = {}
        self.register_state_dict_post_hook(copy_tied)

    @property
    def config(self) -> Any:
        """The wrapped model's."""
        return self.model.config

    @property
    def loss_type(self) -> Any:
        """Read by `transformers.Trainer`: how labels are counted, as the wrapped model has it."""
        return getattr(self.model, "loss_type", None)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Read by `transformers.Trainer`: whether `num_items_in_batch` is understood, here or by the model."""
        taken = inspect.signature(self.model.forward).parameters.values()
        by_model = getattr(self.model, "accepts_loss_kwargs", any(p.kind is p.VAR_KEYWORD for p in taken))
        return self.borrowed is not None or bool(by_model)

    def step(self) -> None:
        """Advances the curriculum; to be called once an optimizer step."""
        self.curriculum.step()

    def metrics(self) -> dict[str, float]:
        """What the last training call saw, by the names of `cggr_ray.schema`. Waits for the device."""
        return on_host(self._metrics)

    def forward(
        self,
        *args: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """What the model returns; with engine `sparse` and labels, in train mode, the loss, or an output that holds it.

        Engine `sparse` takes `num_items_in_batch` and `return_dict` too, as `CGGRModel` does.
        """
        # Arguments have names because `transformers.Trainer` drops the columns of a batch that have none here.
        named = {"input_ids": input_ids, "labels": labels}
        named |= {"attention_mask": attention_mask, "position_ids": position_ids}
        keywords = others | {name: value for name, value in named.items() if value is not None}
        if not (self.training and torch.is_grad_enabled()):
            return self.model(*args, **keywords)
        self._metrics = {}
        last = deepest_bucket(self.depth.num_buckets, self.curriculum.passed)
        if self.borrowed is not None and labels is not None:
            return self._sparse(self.borrowed, last, *args, **keywords)
        return self.model(*args, **keywords) if last == 0 else self._hooked(last, *args, **keywords)

    def _hooked(self, last: int, *args: Any, **keywords: Any) -> Any:
        labels = keywords.get("labels")
        if labels is None and self.depth.score not in NEEDS_NO_LABELS:
            raise ValueError(f"scoring {self.depth.score!r} without labels; accepted: {', '.join(NEEDS_NO_LABELS)}")
        with self._gates.hung() as gates:
            out = self.model(*args, **keywords)
        logits = logits_of(out)
        gates.check(logits)
        labels_BT = labels_of(logits, keywords.get("attention_mask"), labels)
        stats = logit_stats(logits.detach().flatten(0, 1), labels_BT.flatten())
        scored = Scored(score(self.depth.score, stats).view(labels_BT.shape), stats)
        bucket_BT = self._buckets(scored, labels_BT, last).view(labels_BT.shape)
        gates.open_by(bucket_BT, self._gates.num_layers, self.depth.num_buckets)
        return out

    def _sparse(
        self,
        borrowed: Borrowed,
        last: int,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        assert labels is not None
        micro = borrowed.micro_batch(tokens_alone(input_ids, others), attention_mask, labels, position_ids)

        @torch.no_grad()
        def decide(seen: Seen | None) -> TokenRoute:
            assert seen is not None
            scored = own_scores(self.depth.score, seen, micro)
            return route_of_buckets(self._buckets(scored, micro.labels_BT, last), last)

        with borrowed.running() as adapter:
            if last == 0:
                planned = Dense(adapter).forward(micro, 0, lambda seen: None)
            else:
                planned = self._plan_on(adapter).forward(micro, len(adapter.layers), decide)
            loss = mean_loss(planned, micro)
        self._metrics[TRAIN_LOSS] = loss.detach()
        loss = of_step(loss, micro, num_items_in_batch)
        return as_output(loss) if (self.return_dict if return_dict is None else return_dict) else loss

    def _buckets(self, scored: Scored, labels_BT: Tensor, last: int) -> Tensor:
        """(1, N): ranks are those of the whole batch."""
        self._metrics |= seen_by(scored)
        labelled = (labels_BT >= 0).sum().view(1)
        return depth_buckets(scored.scores_BT.view(1, -1), labelled, self.depth.num_buckets).clamp_max(last)

    def _plan_on(self, adapter: Adapter) -> Plan:
        if self._plan is None or self._plan[0] is not adapter:
            self._plan = adapter, self.depth.plan_for(adapter)
        return self._plan[1]


def _first_engine(model: nn.Module, leak_rate: float) -> str:
    """`sparse` where it can be had; says so where family or model has no such engine."""
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    misfit = f"families with an engine that does: {', '.join(SUPPORTED)}" if family not in SUPPORTED else None
    if misfit is None and leak_rate == 0:
        misfit = _misfit(cast("PreTrainedModel", model))
    if misfit is not None:
        warnings.warn(f"CGGRWrapper on {family!r} gates gradients by hooks, which saves no time; {misfit}",
                      stacklevel=3)  # fmt: skip
    if leak_rate > 0:
        return "faithful"
    return "sparse" if misfit is None else "every"


def _misfit(model: PreTrainedModel) -> str | None:
    """Why a model of a supported family cannot be run by its sparse engine."""
    try:
        Borrowed(model)
    except ValueError as error:
        return f"for one that does: {error}"
    return None


def route_of_buckets(bucket_1N: Tensor, last: int) -> TokenRoute:
    """Every position, each as deep as its bucket."""
    every = torch.arange(bucket_1N.shape[1], device=bucket_1N.device).unsqueeze(0)
    return TokenRoute(every, torch.ones(every.shape, device=every.device), {}, Depth(bucket_1N, last))


def logits_of(out: Any) -> Tensor:
    """Logits (B, T, V): an output itself, its `logits`, or its first element."""
    logits = getattr(out, "logits", None)
    if logits is None and isinstance(out, dict):
        logits = out.get("logits")
    if logits is None:
        logits = out[0] if isinstance(out, tuple) else out
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(out).__name__
        raise ValueError(f"a model that returns {what}; accepted: logits (B, T, V), or an output with them")
    return logits


def labels_of(logits: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """Which positions are ranked, and their labels where they are known (unshifted), else 0."""
    if labels is not None:
        found = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    else:
        found = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
    if attention_mask is None or attention_mask.shape != found.shape:
        return found
    return torch.where(attention_mask != 0, found, IGNORE)
