"""A model that belongs to somebody else's loop: run by an adapter, and left as it was found.

Attention, train or eval mode and autocast are the caller's again when a forward is over, so the model generates and
evaluates as before. The adapter follows the model from device to device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cggr_ray.api.batches import FAULTS, check_device, prepare
from cggr_ray.api.curriculum import DELAY, HostCopy
from cggr_ray.data.batch import MicroBatch
from cggr_ray.models.adapter import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Borrowed:
    """A causal LM of a supported family.

    Raises:
        ValueError: the family is not supported, its layers hold parameters that an adapter would pass by (LoRA,
            quantised weights), it has dropout, or it checkpoints its layers itself.
    """

    def __init__(self, model: PreTrainedModel, gradient_checkpointing: bool = False) -> None:
        if not hasattr(getattr(model, "config", None), "get_text_config"):
            raise ValueError(f"{type(model).__name__}; accepted: a causal LM of transformers")
        check_checkpointing(model.modules())
        self.model, self._checkpointing = model, gradient_checkpointing
        self._adapter = self._adapt()
        check_parameters(self._adapter)
        self._layers = Modules(self._adapter.layers)
        self._faults: deque[HostCopy] = deque()

    @property
    def adapter(self) -> Adapter:
        """On the device where the model is now."""
        if next(self.model.parameters()).device != self._adapter.device:
            self._adapter = self._adapt()
        return self._adapter

    @contextmanager
    def running(self) -> Iterator[Adapter]:
        """To run a forward in. Without autocast: everything is in the dtype of the weights.

        Raises:
            ValueError: layers, or modules inside them, were put in, out or in place of others since, or the model
                checkpoints its layers itself since.
        """
        adapter = self.adapter
        check_checkpointing([adapter.family.body, *adapter.layers])
        if not self._layers.are(adapter.family.layers):
            raise ValueError("layers that are not those it was made of, as adapters in them or fewer layers; accepted: "
                             "a model that is changed first and wrapped then")  # fmt: skip
        with adapter.attention(), torch.autocast(adapter.device.type, enabled=False):
            yield adapter

    def micro_batch(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, position_ids: Tensor | None
    ) -> MicroBatch:
        """What a call is given, as the plans take it.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, or values that make no documents. These values are
                found on the device: on a GPU, where asking at once would cost time, by a call two later.
        """
        check_device("input_ids", input_ids, self.adapter.device, "the model's weights")
        absolute = self.adapter.family.name == "gpt2"
        micro, faults = prepare(input_ids, attention_mask, labels, position_ids, absolute)
        self._faults.append(HostCopy(faults))
        while len(self._faults) > (DELAY if faults.is_cuda else 0):
            for found, message in zip(self._faults.popleft().values(), FAULTS, strict=True):
                if found:
                    raise ValueError(message)
        return micro

    def _adapt(self) -> Adapter:
        config, training = self.model.config.get_text_config(), {m: m.training for m in self.model.modules()}
        attention = config._attn_implementation
        try:
            return Adapter(self.model, "block" if self._checkpointing else "none")
        finally:
            config._attn_implementation = attention
            for module, was in training.items():
                module.training = was


class Modules:
    """Some layers with all that is inside of them, to be known again: a look at the host's own tables."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = list(layers)
        tables = [module._modules for layer in layers for module in layer.modules()]
        self._tables = [(table, list(table.values())) for table in tables]

    @torch.compiler.disable
    def are(self, layers: Sequence[nn.Module]) -> bool:
        """Whether these are the layers, and hold what they did."""
        # Modules have no equality but that of being the same.
        return self._layers == list(layers) and all(list(table.values()) == held for table, held in self._tables)


@torch.compiler.disable
def check_checkpointing(modules: Iterable[nn.Module]) -> None:
    """Layers that recompute themselves would do so outside of what they ran in, with another attention."""
    if any(getattr(module, "gradient_checkpointing", False) for module in modules):
        raise ValueError("gradient checkpointing of the model's own; accepted: gradient_checkpointing=True here")


def check_parameters(adapter: Adapter) -> None:
    """The blocks here read the weights of a layer, not its modules: whatever else it holds would be left out."""
    for i, layer in enumerate(adapter.layers):
        try:
            weights = adapter.family.weights(i)
        except AttributeError as error:
            # A module in the place of another, as somebody's own LoRA, which need not have what that one had.
            raise ValueError(f"layer {i}: {error}; accepted: layers as transformers builds them") from None
        known = {w.untyped_storage().data_ptr() for w in weights if w is not None}
        for name, parameter in layer.named_parameters():
            if not _is_plain(parameter) or parameter.untyped_storage().data_ptr() not in known:
                raise ValueError(f"parameter {name!r} of layer {i}; accepted: layers as transformers builds them")


def _is_plain(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and type(parameter) is nn.Parameter
