"""`bench step`: forward and backward with kept positions against the best full-token baseline, in one run.

Baselines (`full_*`): compiled blocks or the whole forward compiled, FlashAttention, plain cross-entropy on whole logits
or ours in chunks, and Liger's fused one where it is installed. Ours (`kept_RATIO_ROUTER_DETACH`): `own` scores by the
model's own loss after the forward, `router` by a probe on the first layers, `random` by chance; `collider_RATIO`, the
recipe's part. Providers run launch by launch, and again as a CUDA graph where they can; `upstream_cggr` is the PyPI
package as it is, in eager mode.

The value is the fastest baseline's time over this provider's; rows in `arithmetic_limit` say what the plan could reach
(`costs`). No optimizer, no loader, but for the units of suffixes that say so (`suffixes`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cggr_ray.benchmarks.costs import Costs, costs_of
from cggr_ray.benchmarks.rows import BenchRow, Shape, bench_row, installed, not_installed
from cggr_ray.benchmarks.suffixes import Suffixes
from cggr_ray.benchmarks.timing import Timing, interleaved
from cggr_ray.benchmarks.workload import NOW, tail_loss
from cggr_ray.compiling import compiled_on, never_eager
from cggr_ray.data.batch import MicroBatch
from cggr_ray.device import pick_device
from cggr_ray.graphs import Graphs
from cggr_ray.learner import Pass
from cggr_ray.models.adapter import Adapter
from cggr_ray.models.presets import ModelSpec
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.recipe import Recipe
from cggr_ray.routing.collider import Collider
from cggr_ray.routing.tokens import RandomTokens, SelectedTokens
from cggr_ray.routing.trained_scorers import Probe
from cggr_ray.sparse.layers import Detach

SHAPES = ("smollm-135m/32x1024", "llama-1.5b/4x2048", "gemma-3-4b/2x2048")
RATIOS = (0.25, 0.5)
# Its own recipe's ratio, and the one that peers report.
COLLIDER = (0.65, 0.5)
# Parameters of a model whose layers keep the GPU busy by themselves; graphs would only hold more memory.
GRAPHS_BELOW = 10**9
DETACH: tuple[Detach, ...] = ("const", "live")
Call = Callable[[], None]


class Kept(NamedTuple):
    """A pass with a backward of kept positions alone: by the model's `own` scores, beside `live` constants."""

    run_pass: Pass
    ratio: float
    own: bool
    live: bool


def bench_step(shape: Shape, device: str, rounds: int, folder: Path) -> list[BenchRow]:
    found = pick_device(device)
    work = Work(shape, found)
    providers = work.full() | work.kept() | work.layers() | work.upstream()
    times = interleaved(providers | work.suffixes.updates(), rounds, found)
    best = min(timing.p50 for name, timing in times.items() if name.startswith("full_"))
    rows = [work.row(name, times[name], best) for name in providers] + work.limits() + work.suffix_rows(times, best)
    return rows + not_installed("step", shape, work.missing, work.dtype, found)


class Work:
    """One model and one micro-batch of random tokens, on which all providers run."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        never_eager()
        self.shape, self.device = shape, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = random_model(shape.model, device, self.dtype)
        self.adapter = Adapter(self.model)
        self.suffixes = Suffixes(self.adapter)
        self.parameters = list(self.model.parameters())
        self.micro = random_micro(shape, self.adapter.head_VD.shape[0], device)
        self.scale = torch.tensor(1 / self.micro.labelled, device=device)
        self._tail = compiled_on(device, tail_loss)
        self._whole = compiled_on(device, self._forward_whole)
        self.missing: list[str] = []
        self._passes = self._build_passes()
        generators = [g for kept in self._passes.values() for g in kept.run_pass.router.generators()]
        graphed = device.type == "cuda" and sum(p.numel() for p in self.parameters) < GRAPHS_BELOW
        self.graphs = Graphs(self.parameters, generators) if graphed else None

    def full(self) -> dict[str, Call]:
        """Baselines, each with and without a graph."""
        plain = {
            "full_blocks": self._blocks,
            "full_blocks_chunked": lambda *_: self._chunked().backward(),
            "full_whole": lambda *_: self._whole().backward(),
        }
        calls = self._both(plain)
        if installed("liger_kernel"):
            # It waits for the device in every call, which no graph can hold.
            calls["full_blocks_liger"] = partial(self._launched, self._liger)
        else:
            self.missing.append("full_blocks_liger")
        return calls

    def kept(self) -> dict[str, Call]:
        """Every router, ratio and kind of constant."""
        calls: dict[str, Call] = {}
        for name, kept in self._passes.items():
            kept.run_pass.router.begin(self.micro, NOW)
            calls |= self._both({name: partial(kept.run_pass, ratio=kept.ratio)})
        return calls

    def _build_passes(self) -> dict[str, Kept]:
        passes = {}
        probe = Probe(layers=min(4, len(self.adapter.layers) - 1))
        for ratio, detach in product(RATIOS, DETACH):
            parts: dict[str, SelectedTokens | RandomTokens] = {
                "own": SelectedTokens(ratio, "loss", plan="after", detach=detach),
                "router": SelectedTokens(ratio, "loss", plan="before", detach=detach, router=probe),
                "random": RandomTokens(ratio, "before", detach),
            }
            for name, part in parts.items():
                run_pass = self._build_pass(part)
                passes[f"kept_{ratio}_{name}_{detach}"] = Kept(run_pass, ratio, name == "own", detach == "live")
        for ratio in COLLIDER:
            passes[f"collider_{ratio}"] = Kept(self._build_pass(Collider(ratio)), ratio, own=True, live=False)
        return passes

    def _build_pass(self, part: SelectedTokens | RandomTokens | Collider) -> Pass:
        return Pass(Recipe("bench", tokens=part), self.adapter, 0, self.micro.tokens_BT.numel())

    def layers(self) -> dict[str, Call]:
        """Suffixes of the layers, by the model's blocks as in `full_blocks`."""
        return self._both(self.suffixes.steps(self._blocks))

    def upstream(self) -> dict[str, Call]:
        """The package as it is: its router, its model, a clone of ours in plain eager mode with labels of its own."""
        if self.device.type != "cuda" or not installed("cggr"):
            self.missing.append("upstream_cggr")
            return {}
        from cggr import CGGRModel, create_truncated_router

        model = random_model(self.shape.model, self.device, self.dtype)
        model.config.get_text_config()._attn_implementation = "sdpa"
        wrapped = CGGRModel(model, router=create_truncated_router(model, num_layers=4), min_tokens_ratio=0.25)
        tokens = self.micro.tokens_BT
        # Behind its curriculum, whose first step keeps everything.
        for _ in range(2000):
            wrapped.step()

        def call() -> None:
            wrapped(tokens, labels=tokens).backward()
            model.zero_grad(set_to_none=True)

        return {"upstream_cggr": call}

    def row(self, name: str, timing: Timing, best: float) -> BenchRow:
        return bench_row("step", self.shape, name, self.dtype, self.device, timing, best / timing.p50, "speedup")

    def limits(self) -> list[BenchRow]:
        """What each plan could reach if everything ran at the speed of full training."""
        costs, rows = self._costs(), []
        for name, kept in self._passes.items():
            limit = costs.limit(kept.ratio, kept.own, kept.live)
            nothing = Timing(0.0, 0.0, 0.0, 0.0)
            row = bench_row("step", self.shape, name, self.dtype, self.device, nothing, limit, "arithmetic_limit")
            rows.append(row)
        return rows

    def suffix_rows(self, times: dict[str, Timing], best: float) -> list[BenchRow]:
        """What of its limit each suffix reaches."""
        costs = self._costs()
        return [
            bench_row("step", self.shape, name, self.dtype, self.device, timing, value, unit)
            for name, timing in times.items()
            if name.startswith("suffix_")
            for unit, value in self.suffixes.values(name, times, best, costs).items()
        ]

    def _costs(self) -> Costs:
        vocabulary, width = self.adapter.head_VD.shape
        inner = self.model.config.intermediate_size
        return costs_of(self.adapter.shapes, width, inner, vocabulary, self.shape.positions)

    def _both(self, steps: dict[str, Any]) -> dict[str, Call]:
        """Each step launch by launch, and as a graph where there are graphs."""
        calls: dict[str, Call] = {}
        for name, step in steps.items():
            calls[name] = partial(self._launched, step)
            if self.graphs is not None:
                calls[f"{name}_graph"] = partial(self._replayed, name, step, self.graphs)
        return calls

    def _launched(self, step: Any) -> None:
        step(self.micro, self.scale)
        self._drop_gradients()

    def _replayed(self, name: str, step: Any, graphs: Graphs) -> None:
        graphs.run(name, step, self.micro, self.scale)
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _hidden(self) -> Tensor:
        adapter, micro = self.adapter, self.micro
        return adapter.run_layers(adapter.embed(micro), micro.positions_BT, adapter.documents(micro))

    def _blocks(self, micro: MicroBatch, scale: Tensor) -> None:
        self._tail(self.adapter.family.norm, self._hidden(), self.adapter.head_VD, micro.labels_BT).backward()

    def _chunked(self) -> Tensor:
        return NextToken().loss(self.adapter.forward(self.micro), self.micro, None, self.scale).total

    def _liger(self, micro: MicroBatch, scale: Tensor) -> None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        hidden = self.adapter.finish(self._hidden()).hidden_RD
        LigerFusedLinearCrossEntropyLoss()(self.adapter.head_VD, hidden, micro.labels_BT.flatten()).backward()

    def _forward_whole(self) -> Tensor:
        """What one compiled graph of the whole model runs: Hugging Face's layers one after the other."""
        adapter, micro = self.adapter, self.micro
        hidden = adapter.embed(micro)
        keywords = adapter.keywords(hidden, micro.positions_BT, adapter.documents(micro))
        for layer, shape in zip(adapter.layers, adapter.shapes, strict=True):
            out = layer(hidden, **keywords[shape.window, shape.rotary])
            hidden = out if isinstance(out, Tensor) else out[0]
        return tail_loss(adapter.family.norm, hidden, adapter.head_VD, micro.labels_BT)


def random_model(preset: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of a preset's shape, drawn on the device: the large ones take minutes elsewhere."""
    from transformers import AutoModelForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:
        model: Any = AutoModelForCausalLM.from_config(ModelSpec(preset=preset).config())
    torch.set_default_dtype(before)
    return model.to(dtype)


def random_micro(shape: Shape, vocabulary: int, device: torch.device) -> MicroBatch:
    """Rows of random tokens, one document each, every position labelled."""
    rows, width = shape.rows, shape.positions
    tokens = torch.randint(vocabulary, (2, rows, width), device=device)
    positions = torch.arange(width, device=device).repeat(rows, 1)
    return MicroBatch(
        tokens_BT=tokens[0],
        labels_BT=tokens[1],
        positions_BT=positions,
        position_ids_BT=torch.arange(rows * width, device=device).view(rows, width),
        document_starts=torch.arange(0, rows * width + 1, width, device=device, dtype=torch.int32),
        longest_document=width,
        labelled_B=np.full(rows, width),
        index=0,
    )
