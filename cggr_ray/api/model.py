"""CGGRModel: a Hugging Face causal LM whose training step runs its backward pass on the hardest positions alone.

Without a router the model's own loss decides, after a full forward without gradient; with a truncated router the first
layers decide, and the layers above them leave activations of kept positions alone. See `sparse.plan`.
Differs from upstream (git 1762989): the token mode skips the backward of dropped positions instead of choosing whole
sequences, labels are those of the scored positions, and the router's layers are not run twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from cggr_ray.api.borrowed import Borrowed
from cggr_ray.api.curriculum import StepCurriculum
from cggr_ray.api.router import TruncatedModel
from cggr_ray.api.selection import Chooser, Sight, check_name, kept_fraction, on_host, selected_tokens
from cggr_ray.data.batch import MicroBatch
from cggr_ray.models.adapter import Adapter
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.routing.route import TokenRoute
from cggr_ray.routing.rows import row_means, rows_kept, rows_of
from cggr_ray.routing.scorers import OwnScores, Scored, TruncatedRouter, own_scores
from cggr_ray.routing.tokens import build_plan
from cggr_ray.schema import KEPT_LOSS, TRAIN_LOSS
from cggr_ray.sparse.plan import Dense, Plan, Planned, Seen, seen_after

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CGGRModel(nn.Module):
    """Trains a causal LM on its hardest positions, and saves the backward pass of the others.

        cggr_model = CGGRModel(model, min_tokens_ratio=0.25)
        loss = cggr_model(input_ids, labels=input_ids)       # labels as for the model itself: unshifted
        loss.backward(); optimizer.step(); cggr_model.step()

    In eval mode, or without labels, a call is a call on `model`. `state_dict` has the tensors of the model under
    `model.`, and the step count; `cggr_model.model.save_pretrained` saves the trained model. On a GPU the model is bf16
    or fp16, and every new shape of batch is compiled once, so pad to few lengths. A batch without labels has loss 0.

    Args:
        model: llama, mistral, qwen2, qwen3, gemma3 or gpt2 of transformers, without dropout. Its attention is replaced
            inside these calls alone, and kept rows run from its weights: no hook or other `forward` of a module inside
            a layer is called for them.
        router: None decides by the model's own scores, which are exact. `create_truncated_router(model, 4)` decides by
            its first layers: less exact, and the layers above keep activations of kept positions only.
        mode: `token`; or `sequence`: whole rows by their mean score, ceil(ratio B) of them, and full training on those.
        detach: dropped positions stay in attention as constants: their keys and values (`const`), or their hidden
            states, from which key and value matrices still learn (`live`).
        plan: None takes `after` without and `before` with a router. `two_pass` computes kept positions twice and needs
            less memory than `after`; `dense` is the exact gradient of the selected loss, and saves nothing.
        gradient_checkpointing: recomputes layers in the backward pass.
        return_dict: for `transformers.Trainer`: calls return an output with `loss`, not the loss itself, and
            `state_dict` copies tied tensors, as its checkpoints must not share memory.

    The other arguments are those of `CGGRLoss`.

    Raises:
        ValueError: a model that cannot be run like this, see `borrowed.Borrowed`; a router of another model; an option,
            or two together, that are not accepted.
    """

    # Read by `transformers.Trainer`: `num_items_in_batch` is understood, and counts labels as a causal LM does.
    accepts_loss_kwargs: ClassVar[bool] = True
    loss_type: ClassVar[str] = "ForCausalLM"

    def __init__(
        self,
        model: PreTrainedModel,
        router: TruncatedModel | None = None,
        min_tokens_ratio: float = 0.25,
        mode: str = "token",
        scoring: str = "combined",
        selection: str = "topk",
        num_strata: int = 4,
        min_tokens_per_sequence: int = 1,
        dynamic_threshold: bool = True,
        threshold_sensitivity: float = 0.5,
        warmup_steps: int = 1000,
        weights: str = "mean",
        threshold_rule: str = "upstream",
        detach: str = "const",
        plan: str | None = None,
        gradient_checkpointing: bool = False,
        return_dict: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        plan = plan or ("after" if router is None else "before")
        _check(model, router, mode, plan, selection, weights)
        self.tokens = selected_tokens(
            scoring=scoring,
            selection=selection,
            num_strata=num_strata,
            min_tokens_per_sequence=min_tokens_per_sequence,
            dynamic_threshold=dynamic_threshold,
            threshold_sensitivity=threshold_sensitivity,
            min_tokens_ratio=min_tokens_ratio,
            weights=weights,
            threshold_rule=threshold_rule,
            plan=plan,
            detach=detach,
            router=OwnScores() if router is None else TruncatedRouter(router.num_layers),
        )
        self.borrowed = Borrowed(model, gradient_checkpointing)
        self.model, self.mode, self.return_dict = model, mode, return_dict
        self.curriculum = StepCurriculum(min_tokens_ratio, warmup_steps, self.tokens.dynamic)
        self._reads = len(self.borrowed.adapter.layers) if router is None else router.num_layers
        self._chooser = Chooser(self.tokens, seed)
        self._plan: tuple[Adapter, Plan] | None = None
        self._sight = Sight()
        self.register_state_dict_post_hook(copy_tied)

    @property
    def config(self) -> Any:
        """The wrapped model's."""
        return self.model.config

    def step(self) -> None:
        """Advances the curriculum; to be called once an optimizer step."""
        self.curriculum.step()

    def metrics(self) -> dict[str, float]:
        """What the last training call saw and kept, by the names of `cggr_ray.schema`. Waits for the device."""
        return on_host(self._sight.values)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """The loss, 0-d, or an output that holds it as `loss`; in eval mode or without labels the model's own output.

        Args:
            attention_mask: (B, T), padding on the right, or on the left where positions are rotary.
            labels: as for Hugging Face models: unshifted, -100 where there is none.
            position_ids: of packed rows: each document counts from 0. Not needed for padded rows.
            num_items_in_batch: labels of all micro-batches of the step, to divide by instead of this batch's own.
            others: the model's own, in eval mode or without labels.

        Raises:
            ValueError: shapes, dtypes or values that make no batch; `others` in a training call, or no `input_ids`; no
                labels in train mode where outputs are for `transformers.Trainer`.
        """
        if self.training and self.return_dict and labels is None:
            raise ValueError("no labels in train mode with return_dict=True; accepted: labels with every call, which "
                             "Trainer keeps for itself with label_smoothing_factor or compute_loss_func")  # fmt: skip
        if labels is None or not self.training:
            options = {"num_items_in_batch": num_items_in_batch, "return_dict": return_dict}
            given = others | {name: value for name, value in options.items() if value is not None}
            masks = {"attention_mask": attention_mask, "position_ids": position_ids}
            return self.model(input_ids=input_ids, labels=labels, **masks, **given)
        tokens = tokens_alone(input_ids, others)
        micro = self.borrowed.micro_batch(tokens, attention_mask, labels, position_ids)
        with self.borrowed.running() as adapter:
            loss = self._loss(adapter, micro, self.curriculum.ratio())
        loss = of_step(loss, micro, num_items_in_batch)
        return as_output(loss) if (self.return_dict if return_dict is None else return_dict) else loss

    def _loss(self, adapter: Adapter, micro: MicroBatch, ratio: float) -> Tensor:
        """Mean over the kept positions."""
        self._sight, every = Sight(), micro.labels_BT
        if ratio < 1 and self.mode == "sequence":
            micro = self._hardest_rows(adapter, micro, ratio)
        if ratio < 1 and self.mode == "token":
            planned = self._hardest_tokens(adapter, micro, ratio)
        else:
            planned = Dense(adapter).forward(micro, 0, lambda seen: None)
        kept = kept_fraction(planned.route, micro.labels_BT, every)
        return self._sight.finish(KEPT_LOSS if ratio < 1 else TRAIN_LOSS, mean_loss(planned, micro), kept)

    def _hardest_tokens(self, adapter: Adapter, micro: MicroBatch, ratio: float) -> Planned:
        @torch.no_grad()
        def decide(seen: Seen | None) -> TokenRoute:
            assert seen is not None
            scored = self._observed(own_scores(self.tokens.score, seen, micro), micro)
            sequences, steps = micro.documents_BT, self.curriculum.steps
            return self._chooser.choose(scored.scores_BT, micro.labels_BT, sequences, ratio, steps)

        return self._plan_on(adapter).forward(micro, self._reads, decide)

    @torch.no_grad()
    def _hardest_rows(self, adapter: Adapter, micro: MicroBatch, ratio: float) -> MicroBatch:
        rows = rows_kept(ratio, len(micro.tokens_BT))
        scored = self._observed(own_scores(self.tokens.score, seen_after(adapter, micro, self._reads), micro), micro)
        return rows_of(micro, row_means(scored.scores_BT, micro.labels_BT).topk(rows).indices.sort().values)

    def _observed(self, scored: Scored, micro: MicroBatch) -> Scored:
        self.curriculum.observe(self._sight.look(scored, micro.labels_BT))
        return scored

    def _plan_on(self, adapter: Adapter) -> Plan:
        if self._plan is None or self._plan[0] is not adapter:
            self._plan = adapter, build_plan(self.tokens.plan, self.tokens.detach, adapter)
        return self._plan[1]


def tokens_alone(input_ids: Tensor | None, others: dict[str, Any]) -> Tensor:
    """`input_ids`; raises ValueError without them, or for what a model takes and a training call on it does not."""
    if others or input_ids is None:
        raise ValueError(f"{', '.join(others) or 'no input_ids'} with labels in train mode; accepted: input_ids, "
                         "attention_mask, labels, position_ids, num_items_in_batch, return_dict")  # fmt: skip
    return input_ids


def mean_loss(planned: Planned, micro: MicroBatch) -> Tensor:
    """The loss of a planned forward over the labelled positions of its micro-batch."""
    # Divided afterwards: 1 / labelled inside would push the slopes of fp16 logits below its smallest numbers, before a
    # GradScaler's factor can lift them.
    one = torch.ones((), device=micro.labels_BT.device)
    total = NextToken().loss(planned.stream, micro, planned.route, one).total
    return total / (micro.labels_BT >= 0).sum().clamp_min(1)


def of_step(loss: Tensor, micro: MicroBatch, num_items_in_batch: Tensor | int | None) -> Tensor:
    """A mean over a micro-batch's labels as its part of the mean over all labels of the step, where they are given."""
    if num_items_in_batch is None:
        return loss
    # A step without labels would divide 0 by 0, and its gradients would not be finite.
    return loss * ((micro.labels_BT >= 0).sum() / torch.as_tensor(num_items_in_batch).clamp_min(1))


def as_output(loss: Tensor) -> Any:
    """What `transformers.Trainer` takes."""
    from transformers.modeling_outputs import CausalLMOutput

    return CausalLMOutput(loss=loss)


def copy_tied(module: Any, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """A hook of `state_dict`: where a module returns outputs for `transformers.Trainer`, tensors share no memory."""
    seen: set[int] = set()
    for name, value in list(state.items()) if module.return_dict else []:
        if value.data_ptr() in seen - {0}:
            state[name] = value.clone()
        seen.add(value.data_ptr())


def _check(
    model: PreTrainedModel, router: TruncatedModel | None, mode: str, plan: str, selection: str, weights: str
) -> None:
    check_name("mode", mode, ("token", "sequence"))
    check_name("plan", plan, ("dense", "after", "two_pass", "before"))
    if router is not None and (not isinstance(router, TruncatedModel) or router.model is not model):
        raise ValueError(f"router {router!r}; accepted: None, or create_truncated_router of the same model")
    if mode == "sequence" and (selection, weights) != ("topk", "mean"):
        raise ValueError(f"mode 'sequence' with {selection!r}, {weights!r}; accepted: 'topk', 'mean'")
