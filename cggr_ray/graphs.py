"""CUDA graphs: the forward, the route, the loss and the backward of a micro-batch as one launch.

A step of a small model is bound by the host, which cannot queue a few thousand kernels as fast as the GPU runs them. A
captured micro-step replays the same kernels on the same memory: inputs are copied into fixed tensors, gradients appear
in fixed tensors. What is captured may not depend on values that the host reads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from cggr_ray.data.batch import MicroBatch

MicroStep = Callable[[MicroBatch, Tensor], Any]
"""Runs forward and backward of a micro-batch; the second argument is 1 / labelled positions of the global batch."""


@dataclass(frozen=True)
class Captured:
    """A graph, the tensors it reads, what it returns, and which parameters it leaves a gradient for."""

    graph: torch.cuda.CUDAGraph
    micro: MicroBatch
    scale: Tensor
    result: Any
    learning: list[nn.Parameter]


class Graphs:
    """Captured micro-steps by key. All share one memory pool, for no two ever run at once, and one set of gradients."""

    def __init__(self, parameters: Sequence[nn.Parameter], generators: Sequence[torch.Generator]) -> None:
        self._parameters, self._generators = list(parameters), list(generators)
        self._gradients = {parameter: torch.empty_like(parameter) for parameter in parameters}
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[Hashable, Captured] = {}

    def run(self, name: Hashable, step: MicroStep, micro: MicroBatch, scale: Tensor) -> Any:
        """`step(micro, scale)`, which `name` identifies. The parameters must have no gradients.

        The first call of a name and shape runs the step once as it is, which compiles what there is to compile, and
        captures it; so first calls belong into a warm-up. The result's tensors are overwritten by the next run.
        """
        shapes = tuple(tuple(getattr(micro, field).shape) for field in tensor_fields(micro))
        key = (name, shapes, micro.longest_document)
        if key not in self._captured:
            self._captured[key] = self._capture(step, micro, scale)
        captured = self._captured[key]
        for field in tensor_fields(micro):
            getattr(captured.micro, field).copy_(getattr(micro, field))
        captured.scale.copy_(scale)
        captured.graph.replay()
        for parameter in captured.learning:
            parameter.grad = self._gradients[parameter]
        return captured.result

    def clear(self) -> None:
        """Drops all graphs with the memory that they hold, once they have run. The next calls are first ones again."""
        torch.cuda.synchronize()
        self._captured = {}
        self._pool = torch.cuda.graph_pool_handle()

    def _capture(self, step: MicroStep, micro: MicroBatch, scale: Tensor) -> Captured:
        micro = replace(micro, **{name: getattr(micro, name).clone() for name in tensor_fields(micro)})
        scale = scale.clone()
        assert all(parameter.grad is None for parameter in self._parameters), "a gradient that a graph would overwrite"
        step(micro, scale)
        for parameter in self._parameters:
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        torch.cuda.synchronize()
        # Another thread may load data meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = step(micro, scale)
            learning = [p for p in self._parameters if p.grad is not None]
            torch._foreach_copy_([self._gradients[p] for p in learning], [p.grad for p in learning])  # type: ignore[misc]
            for parameter in learning:
                parameter.grad = None
        return Captured(graph, micro, scale, result, learning)


def tensor_fields(micro: MicroBatch) -> list[str]:
    return [f.name for f in fields(micro) if isinstance(getattr(micro, f.name), Tensor)]
