"""All that a method may ask of a model: hidden states, the head, its layers and their parameters.

Runs the layers of a Hugging Face causal LM itself (so that later plans can treat positions differently), one compiled
block for all layers on a GPU. Shapes: B rows, T positions, D width, V vocabulary, N = B T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cggr_ray.compiling import compiled_on
from cggr_ray.data.batch import MicroBatch
from cggr_ray.models.attention import document_mask, register_document_flash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED = ("llama",)


@dataclass(frozen=True)
class Stream:
    """What a forward leaves behind: final hidden states (after the last norm) and the head that reads them."""

    hidden_ND: Tensor
    head_VD: Tensor


def _block(layer: nn.Module, hidden_BTD: Tensor, rotary: tuple[Tensor, Tensor], attention: dict[str, Any]) -> Tensor:
    out = layer(hidden_BTD, position_embeddings=rotary, **attention)
    return out if isinstance(out, Tensor) else out[0]


def _norm(norm: nn.Module, hidden_BTD: Tensor) -> Tensor:
    out: Tensor = norm(hidden_BTD)
    return out


class Adapter:
    """A causal LM of a supported family.

    Raises:
        ValueError: the model's family is not supported, it has dropout, or it is float32 on a GPU.
    """

    def __init__(self, model: PreTrainedModel, gradient_checkpointing: bool = False) -> None:
        family = model.config.model_type
        if family not in SUPPORTED:
            raise ValueError(f"model family {family!r}; accepted: {', '.join(SUPPORTED)}")
        if getattr(model.config, "attention_dropout", 0.0):
            raise ValueError(f"attention_dropout = {model.config.attention_dropout}; accepted: 0, runs repeat exactly")
        self.model, self.body = model, model.model
        self.device = next(model.parameters()).device
        self.flash = self.device.type == "cuda"
        if self.flash and model.dtype == torch.float32:
            raise ValueError("precision 'fp32' on a GPU; accepted: bf16 or auto, FlashAttention has no float32")
        model.config._attn_implementation = register_document_flash() if self.flash else "sdpa"
        self._block, self._norm = compiled_on(self.device, _block), compiled_on(self.device, _norm)
        self._checkpoint = gradient_checkpointing
        self._active = [True] * len(self.layers)
        model.train()

    @property
    def execution_note(self) -> str:
        """How the layers run, for the log."""
        return "compiled blocks, FlashAttention by document" if self.flash else "eager on the CPU, SDPA with a mask"

    @property
    def layers(self) -> Sequence[nn.Module]:
        return list(self.body.layers)

    @property
    def head_VD(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.model.named_parameters())

    def hidden_names(self) -> list[str]:
        """Names of the parameters inside decoder layers."""
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        return [name for name, p in self.named_parameters() if id(p) in inside]

    def set_active_layers(self, active: Sequence[bool]) -> None:
        """A layer that does not learn keeps no gradient and no optimizer update."""
        if list(active) == self._active:
            return
        self._active = list(active)
        for layer, learns in zip(self.layers, active, strict=True):
            layer.requires_grad_(learns)

    def forward(self, micro: MicroBatch) -> Stream:
        """Hidden states of every position. Attention stays inside each document."""
        hidden = self.body.embed_tokens(micro.tokens_BT)
        rotary = self.body.rotary_emb(hidden, position_ids=micro.positions_BT)
        attention = self.attention(micro)
        for layer in self.layers:
            if self._checkpoint and torch.is_grad_enabled():
                hidden = torch.utils.checkpoint.checkpoint(
                    self._block, layer, hidden, rotary, attention, use_reentrant=False
                )
            else:
                hidden = self._block(layer, hidden, rotary, attention)
        return Stream(self._norm(self.body.norm, hidden).flatten(0, 1), self.head_VD)

    def attention(self, micro: MicroBatch) -> dict[str, Any]:
        """What the layers are told about the documents of a micro-batch."""
        if self.flash:
            return {
                "attention_mask": None,
                "document_starts": micro.document_starts,
                "longest_document": micro.longest_document,
            }
        return {"attention_mask": document_mask(micro.documents_BT)}
