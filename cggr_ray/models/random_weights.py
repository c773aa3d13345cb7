"""Random weights of a Hugging Face model, as its family draws them, by as many threads as PyTorch has.

Hugging Face draws one layer after the other from the process's generator, after PyTorch has drawn each of them. Here
every layer has a generator of its own, seeded by the model's seed and the layer's name: its weights depend on neither
the number of threads nor the layers before it. What a model draws anew over its layers, as GPT-2 its output
projections, is drawn in turn from one more generator.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights


class DrawsFrom(TorchDispatchMode):
    """Inside, in this thread alone, what draws into a tensor draws from a generator."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawing = {"generator": self._generator} if torch.Tag.nondeterministic_seeded in func.tags else {}
        return func(*args, **((kwargs or {}) | drawing))


def with_random_weights(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A causal LM in float32 on the CPU, whose weights depend on `config` and `seed` alone.

    Differs from Hugging Face in which numbers are drawn, not in their distributions.
    """
    with torch.device("cpu"), no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # The innermost, where models hold others: it knows how its layers are drawn.
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    owners = {layer: owner for owner in models for layer in owner.modules()}
    layers = [(name, layer) for name, layer in model.named_modules() if not list(layer.children())]
    # A thread that begins the largest one last would be waited for.
    layers.sort(key=lambda named: -sum(parameter.numel() for parameter in named[1].parameters()))
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for done in [threads.submit(_draw, owners[layer]._initialize_weights, layer, seed, name)
                     for name, layer in layers]:  # fmt: skip
            done.result()
    with torch.device("cpu"), DrawsFrom(_generator(seed, "")):
        # What layers hold beside other layers, what a model draws anew over its layers, and tied weights.
        model.init_weights()
    whole: PreTrainedModel = model
    return whole


def _draw(initialize: Callable[[nn.Module], None], layer: nn.Module, seed: int, name: str) -> None:
    with torch.no_grad(), DrawsFrom(_generator(seed, name)):
        initialize(layer)


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, *name.encode())).generate_state(1)[0]))
