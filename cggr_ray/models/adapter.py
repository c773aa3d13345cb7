"""All that a method may ask of a model: hidden states, the head, its layers and their parameters.

Runs the layers of a Hugging Face causal LM itself, one compiled block for all layers on a GPU; `cggr_ray.sparse` runs
the same layers piece by piece. Shapes: B rows, T positions, D width, V vocabulary, N = B T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cggr_ray.compiling import compiled_on
from cggr_ray.data.batch import MicroBatch
from cggr_ray.models.attention import Documents, check_dtype, document_mask, documents_of, register_document_flash
from cggr_ray.models.checkpointing import Checkpointing, keep_products
from cggr_ray.models.families import FUSED_NAME, Family
from cggr_ray.models.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stream:
    """What a forward leaves behind: final hidden states (after the last norm) and the head that reads them."""

    hidden_RD: Tensor
    head_VD: Tensor
    index_R: Tensor | None = None
    """Flat positions of the rows; None when they are all positions of the micro-batch."""
    trunk_BTD: Tensor | None = None
    """What entered the last layer, where a plan ran that layer on all positions."""

    def at(self, index_K: Tensor) -> Tensor:
        """The rows of some positions; of a stream that holds kept rows only, exactly these."""
        return self.hidden_RD if self.index_R is not None else self.hidden_RD.index_select(0, index_K)


def _block(layer: nn.Module, hidden_BTD: Tensor, keywords: dict[str, Any]) -> Tensor:
    out = layer(hidden_BTD, **keywords)
    return out if isinstance(out, Tensor) else out[0]


def _norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    out: Tensor = norm(hidden)
    return out


def _selective(layer: nn.Module, hidden_BTD: Tensor, keywords: dict[str, Any]) -> Tensor:
    out: Tensor = torch.utils.checkpoint.checkpoint(
        _block, layer, hidden_BTD, keywords, use_reentrant=False, preserve_rng_state=False, context_fn=keep_products
    )
    return out


class Adapter:
    """A causal LM of a supported family.

    Raises:
        ValueError: the model's family is not supported, it has dropout, or it is float32 on a GPU.
    """

    def __init__(self, model: PreTrainedModel, checkpointing: Checkpointing = "none") -> None:
        self.model, self.family = model, Family(model)
        self.device = next(model.parameters()).device
        self.flash = self.device.type == "cuda"
        check_dtype(self.device.type, model.dtype)
        self._attention = register_document_flash() if self.flash else "sdpa"
        self.family.config._attn_implementation = self._attention
        self._block, self._norm = compiled_on(self.device, _block), compiled_on(self.device, _norm)
        # A compiler sees what to keep only where it compiles the checkpoint with the block.
        self._selective = compiled_on(self.device, _selective) if self.flash else self._selective_eager
        self.checkpointing = checkpointing
        self.layers: Sequence[nn.Module] = self.family.layers
        self.shapes = [self.family.shape(i) for i in range(len(self.layers))]
        self._active = [True] * len(self.layers)
        self.cache: PrefixCache | None = None
        self._parameters = [list(layer.parameters()) for layer in self.layers]
        self._parameters[0] += [p for p in self.family.input_parameters() if p is not self.head_VD]
        model.train()

    @property
    def execution_note(self) -> str:
        """How the layers run, for the log."""
        return "compiled blocks, FlashAttention by document" if self.flash else "eager on the CPU, SDPA with a mask"

    @property
    def head_VD(self) -> Tensor:
        return self.family.head_VD

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those of the language model; a vision tower beside it has nothing to learn from text."""
        modules = (self.family.body, self.model.get_input_embeddings(), self.model.get_output_embeddings())
        inside = {id(p) for module in modules for p in module.parameters()}
        return [(name, p) for name, p in self.model.named_parameters() if id(p) in inside]

    def hidden_names(self) -> list[str]:
        """Names of the parameters inside decoder layers."""
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        return [name for name, p in self.named_parameters() if id(p) in inside]

    def fused_names(self) -> list[str]:
        """Of these, the matrices that hold the projections of queries, keys and values one after the other."""
        return [name for name in self.hidden_names() if name.endswith(FUSED_NAME)]

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Inside, the model's layers attend as this adapter needs; afterwards as before, for others who use them."""
        config = self.family.config
        before = config._attn_implementation
        if before != self._attention:
            config._attn_implementation = self._attention
        try:
            yield
        finally:
            if before != self._attention:
                config._attn_implementation = before

    def _recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a checkpointed block: its forward, and its second forward inside the backward."""
        return nullcontext(), self.attention()

    def _recomputing_but_products(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        forward, again = keep_products()

        @contextmanager
        def both() -> Iterator[None]:
            with self.attention(), again:
                yield

        return forward, both()

    def set_active_layers(self, active: Sequence[bool]) -> None:
        """A layer that does not learn keeps no gradient and no optimizer update; the embedding follows the first one.

        A head that is tied to the embedding goes on learning.
        """
        if list(active) == self._active:
            return
        if list(active).index(True) != self.first_active:
            self.forget()
        self._active = list(active)
        for i, learns in enumerate(active):
            for parameter in self.layer_parameters(i):
                parameter.requires_grad_(learns)

    def forget(self) -> None:
        """Weights below the first layer that learns have changed, or others are below it: nothing kept is of use."""
        if self.cache is not None:
            self.cache.clear()

    def layer_parameters(self, layer: int) -> list[nn.Parameter]:
        """Those of a decoder layer, and of the first one what makes its input, but for a head that is tied to it."""
        return self._parameters[layer]

    @property
    def first_active(self) -> int:
        """The lowest layer that learns: below it there is no backward pass."""
        return self._active.index(True)

    def forward(self, micro: MicroBatch) -> Stream:
        """Hidden states of every position. Attention stays inside each document."""
        documents = self.documents(micro)
        hidden, below = self.enter(micro, documents)
        return self.finish(self.run_layers(hidden, micro.positions_BT, documents, slice(below, None)))

    def enter(self, micro: MicroBatch, documents: Documents, most: int | None = None) -> tuple[Tensor, int]:
        """(what enters the first layer that learns, the number of layers below it); after `most` layers at most.

        It is a constant where there are layers below, and read back where it is kept; not in a forward without
        gradient, which may be of other data.
        """
        below = self.first_active if most is None else min(most, self.first_active)
        if below == 0:
            return self.embed(micro), 0
        keep = self.cache if torch.is_grad_enabled() and below == self.first_active else None
        run = partial(self._run_below, micro, documents, below)
        return run() if keep is None else keep.fetch(micro, run), below

    def _run_below(self, micro: MicroBatch, documents: Documents, layers: int) -> Tensor:
        return self.run_layers(self.embed(micro), micro.positions_BT, documents, slice(0, layers))

    def embed(self, micro: MicroBatch) -> Tensor:
        """(B, T, D), what enters the first layer."""
        return self.embed_tokens(micro.tokens_BT, micro.positions_BT)

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The same of any tokens; a constant where the first layer does not learn."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._active[0]):
            return self.family.embed(tokens, positions)

    def finish(self, hidden_BTD: Tensor, trunk_BTD: Tensor | None = None) -> Stream:
        """The last norm, and the head that reads it."""
        return Stream(self.final_norm(hidden_BTD).flatten(0, 1), self.head_VD, trunk_BTD=trunk_BTD)

    def final_norm(self, hidden: Tensor) -> Tensor:
        out: Tensor = self._norm(self.family.norm, hidden)
        return out

    def documents(self, micro: MicroBatch) -> Documents:
        return documents_of(micro.positions_BT, micro.document_starts, micro.longest_document)

    def run_layers(
        self,
        hidden_BTD: Tensor,
        positions_BT: Tensor,
        documents: Documents,
        span: slice = slice(None),
        visit: Callable[[Tensor, int], None] | None = None,
    ) -> Tensor:
        """Hidden states after the layers of `span`, without gradient below the first that learns. `visit` is shown what
        each layer returns, and its number."""
        keywords = self.keywords(hidden_BTD, positions_BT, documents)
        for i in range(len(self.layers))[span]:
            layer, shape = self.layers[i], self.shapes[i]
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= self.first_active):
                hidden_BTD = self._run_layer(layer, hidden_BTD, keywords[shape.window, shape.rotary])
            if visit is not None:
                visit(hidden_BTD, i)
        return hidden_BTD

    def run_beside(self, layer: nn.Module, hidden_BTD: Tensor, micro: MicroBatch) -> Tensor:
        """Runs a layer of `layer_beside` as the model's last layer is run."""
        keywords, shape = self.keywords(hidden_BTD, micro.positions_BT, self.documents(micro)), self.shapes[-1]
        return self._run_layer(layer, hidden_BTD, keywords[shape.window, shape.rotary])

    def layer_beside(self) -> nn.Module:
        """A decoder layer built like the model's last one, and none of the model's. Its weights are not drawn yet."""
        kind: Any = type(self.layers[-1])
        layer: nn.Module = kind(self.family.config, len(self.layers) - 1)
        return layer

    def drawn(self, make: Callable[[], nn.Module], seed: int) -> nn.Module:
        """A module beside the model, initialised as the model initialises its own, in its dtype and on its device.

        The weights depend on `seed` alone: they are drawn on the CPU in float32, and nobody else's draws move.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = make().apply(self.model._init_weights)
        return module.to(device=self.device, dtype=self.head_VD.dtype)

    def _run_layer(self, layer: nn.Module, hidden_BTD: Tensor, own: dict[str, Any]) -> Tensor:
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            out: Tensor = self._block(layer, hidden_BTD, own)
        elif self.checkpointing == "selective":
            out = self._selective(layer, hidden_BTD, own)
        else:
            out = torch.utils.checkpoint.checkpoint(
                self._block,
                layer,
                hidden_BTD,
                own,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=self._recomputing,
            )
        return out

    def _selective_eager(self, layer: nn.Module, hidden_BTD: Tensor, own: dict[str, Any]) -> Tensor:
        out: Tensor = torch.utils.checkpoint.checkpoint(
            _block,
            layer,
            hidden_BTD,
            own,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=self._recomputing_but_products,
        )
        return out

    def keywords(
        self, hidden: Tensor, positions_BT: Tensor, documents: Documents
    ) -> dict[tuple[int | None, str | None], dict[str, Any]]:
        """What a layer is told about positions and documents, by its window and its kind of rotary embedding."""
        rotary = self.family.rotary(hidden, positions_BT)
        found = {}
        for window, kind in {(shape.window, shape.rotary) for shape in self.shapes}:
            if self.flash:
                own: dict[str, Any] = {
                    "attention_mask": None,
                    "document_starts": documents.starts,
                    "longest_document": documents.longest,
                }
            else:
                own = {"attention_mask": document_mask(documents.first_BT, window)}
            found[window, kind] = own if kind is None else own | {"position_embeddings": rotary[kind]}
        return found
