"""Heads beside the model's own, each with a loss of its own; what they own is trained and thrown away.

    L = L_next + sum_i w_i CE_i

The auxiliary losses are formed and differentiated one at a time, before the next-token loss: one chunk of logits and
the activations of one head exist at a time. What the forms are, and where they come from, is said in `multi_token`.
Shapes: B rows of T positions, K rows of the loss, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cggr_ray.compiling import compiled_on
from cggr_ray.data.batch import MicroBatch
from cggr_ray.kernels.selected_ce.op import selected_cross_entropy
from cggr_ray.models.adapter import Adapter, Stream
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.objectives.objective import Loss, Rows, labels_ahead, one_at_a_time, rows_of
from cggr_ray.progress import Progress
from cggr_ray.routing.route import TokenRoute

LAYERS = "layers"
Term = Callable[[Tensor], Tensor]


class ExtraHeads:
    """Next-token loss plus the losses of extra heads. A form says what they read (`trunk`) and what they are (`term`).

    Args:
        own: what the heads own; decoder layers are in a list of the name `layers`.
        weights: one for every head, in the order of how far they look ahead; the first one's target is two steps away.
    """

    def __init__(
        self, next_token: NextToken, adapter: Adapter, own: nn.Module, weights: Sequence[float | Tensor]
    ) -> None:
        self.next, self.adapter, self.own, self.weights = next_token, adapter, own, weights
        self._parameters = list(dict.fromkeys((*own.parameters(), *self.shared())))

    def shared(self) -> list[nn.Parameter]:
        """Parameters of the language model that the heads use, apart from what made the trunk."""
        return []

    def trunk(self, stream: Stream, rows: Rows) -> Tensor:
        raise NotImplementedError

    def hidden(self, head: int, trunk: Tensor, micro: MicroBatch, rows: Rows) -> Tensor:
        """(K, D), what the head's matrix reads."""
        raise NotImplementedError

    def matrix(self, head: int) -> Tensor:
        """(V, D)"""
        return self.adapter.head_VD

    def begin(self, progress: Progress) -> None:
        """The weights stay as they are."""

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"objective.{name}", p) for name, p in self.own.named_parameters()]

    def hidden_names(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if name.startswith(f"objective.{LAYERS}.")]

    def loss(self, stream: Stream, micro: MicroBatch, route: TokenRoute | None, scale: Tensor) -> Loss:
        rows = rows_of(micro, route, scale)
        terms: list[Term] = [partial(self._term, head=i, micro=micro, rows=rows) for i in range(len(self.weights))]
        auxiliary = one_at_a_time(terms, self.trunk(stream, rows), self._parameters)
        main = self.next.loss(stream, micro, route, scale)
        seen = auxiliary.detach() if main.auxiliary is None else auxiliary.detach() + main.auxiliary
        return main._replace(total=main.total + auxiliary, auxiliary=seen)

    def _term(self, trunk: Tensor, head: int, micro: MicroBatch, rows: Rows) -> Tensor:
        labels_K = rows.of(labels_ahead(micro, head + 2))
        hidden_KD = self.hidden(head, trunk, micro, rows)
        return selected_cross_entropy(hidden_KD, self.matrix(head), labels_K, rows.weights_K * self.weights[head])[0]


class IndependentHeads(ExtraHeads):
    """Matrices (V, D) of their own on the final hidden states."""

    def __init__(self, next_token: NextToken, adapter: Adapter, seed: int, weights: Sequence[float]) -> None:
        vocabulary, width = adapter.head_VD.shape

        def make() -> nn.Module:
            return nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(width, vocabulary, bias=False) for _ in weights])})

        super().__init__(next_token, adapter, adapter.drawn(make, seed), weights)

    def trunk(self, stream: Stream, rows: Rows) -> Tensor:
        return rows.hidden(stream)

    def hidden(self, head: int, trunk: Tensor, micro: MicroBatch, rows: Rows) -> Tensor:
        return trunk

    def matrix(self, head: int) -> Tensor:
        return self.own.get_parameter(f"heads.{head}.weight")


class LayerHeads(ExtraHeads):
    """A decoder layer each, on what enters the model's last layer; the last norm and the head are the model's."""

    def __init__(self, next_token: NextToken, adapter: Adapter, seed: int, weights: Sequence[float]) -> None:
        def make() -> nn.Module:
            return nn.ModuleDict({LAYERS: nn.ModuleList([adapter.layer_beside() for _ in weights])})

        super().__init__(next_token, adapter, adapter.drawn(make, seed), weights)

    def shared(self) -> list[nn.Parameter]:
        return shared_end(self.adapter)

    def trunk(self, stream: Stream, rows: Rows) -> Tensor:
        assert stream.trunk_BTD is not None, "a plan that does not run the last layer on all positions"
        return stream.trunk_BTD

    def hidden(self, head: int, trunk: Tensor, micro: MicroBatch, rows: Rows) -> Tensor:
        layer = self.own.get_submodule(f"{LAYERS}.{head}")
        return rows.of(self.adapter.final_norm(self.adapter.run_beside(layer, trunk, micro)))


class NextHead(ExtraHeads):
    """One decoder layer on the final hidden states joined with the next token's embedding."""

    def __init__(
        self, next_token: NextToken, adapter: Adapter, seed: int, weight_at: Callable[[Progress], float]
    ) -> None:
        self._weight_at, self._weight = weight_at, torch.zeros((), device=adapter.device)
        self._join = compiled_on(adapter.device, join)
        super().__init__(next_token, adapter, adapter.drawn(partial(Joined, adapter), seed), [self._weight])

    def begin(self, progress: Progress) -> None:
        self._weight.fill_(self._weight_at(progress))

    def shared(self) -> list[nn.Parameter]:
        return [*shared_end(self.adapter), *self.adapter.family.embedding.parameters()]

    def trunk(self, stream: Stream, rows: Rows) -> Tensor:
        assert stream.index_R is None, "a plan that leaves kept rows alone"
        return stream.hidden_RD

    def hidden(self, head: int, trunk: Tensor, micro: MicroBatch, rows: Rows) -> Tensor:
        # The last position of a document gets a token of another one. It has no target, and nobody attends to it.
        following_BT = micro.tokens_BT.roll(-1, dims=1)
        hidden_BTD = trunk.unflatten(0, following_BT.shape)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.adapter.first_active == 0):
            embedded_BTD = self.adapter.family.embedding(following_BT)
        hidden_BTD = self._join(self.own, embedded_BTD, hidden_BTD)
        layer = self.own.get_submodule(f"{LAYERS}.{head}")
        return rows.of(self.adapter.final_norm(self.adapter.run_beside(layer, hidden_BTD, micro)))


class Joined(nn.Module):
    """What `NextHead` owns: two norms of the model's kind, W (D, 2 D), and a decoder layer."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        width = adapter.head_VD.shape[1]
        # Initialised anew with the rest: they scale by 1, whatever the model's own does.
        self.embedding_norm, self.hidden_norm = (copy.deepcopy(adapter.family.norm) for _ in range(2))
        self.join = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([adapter.layer_beside()])


def join(own: Joined, embedded_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
    """W [norm(embedding); norm(hidden)]."""
    out: Tensor = own.join(torch.cat((own.embedding_norm(embedded_BTD), own.hidden_norm(hidden_BTD)), dim=-1))
    return out


def shared_end(adapter: Adapter) -> list[nn.Parameter]:
    """The head's weight and the last norm."""
    return [*adapter.model.get_output_embeddings().parameters(), *adapter.family.norm.parameters()]
