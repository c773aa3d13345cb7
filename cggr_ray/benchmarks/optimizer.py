"""`bench optimizer`: what part of a training step the optimizer takes.

step_fraction = optimizer / (forward + backward + optimizer), medians of interleaved runs. Providers: those of
`optimizers` as they run, GaLore's refreshes in their turn; `muon_eager` is `muon_fp32` without the compiler,
`muon_torch` is torch.optim.Muon and fused AdamW; those of `peers` where they are installed. `galore_torch` decomposes
all matrices in one update of 200: the first, which is warm-up and in no figure here; models of 1B parameters, for
which that takes minutes, have no row of it. `of_muon_fp32`: the time of an update over that of `muon_fp32`.
`galore_project`, `galore_refresh`: see `projection`; `galore_projection` is both, the refresh spread over its steps, as
a part of a training step with `galore`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from cggr_ray.benchmarks.optimizers import OPTIMIZERS
from cggr_ray.benchmarks.peers import LR, Build, Weights, missing, present
from cggr_ray.benchmarks.projection import projection, spread
from cggr_ray.benchmarks.rows import BenchRow, Shape, bench_row, not_installed
from cggr_ray.benchmarks.timing import interleaved
from cggr_ray.benchmarks.workload import NOW, prepared_run
from cggr_ray.data.batch import Batch
from cggr_ray.learner import Learner
from cggr_ray.loop import Run
from cggr_ray.models.adapter import Adapter
from cggr_ray.optim.optimizer import Optimizer, StackedOptimizer
from cggr_ray.optim.partition import partition

Gradients = dict[int, Tensor | None]

SHAPES = ("smollm-135m/32x1024", "llama-113m/32x1024", "llama-1.5b/4x2048")
# Side by side on one device, each with weights, masters and state of its own: those of AdamW would not fit there too,
# and of a large model not those of an eager Muon either.
TIMED = {name: replace(OPTIMIZERS[name], project_early=False) for name in ("muon_int8", "galore", "e3_full")}
EAGER_BELOW = 10**9


def bench_optimizer(shape: Shape, device: str, rounds: int, folder: Path) -> list[BenchRow]:
    run = prepared_run(shape, device, folder)
    with run.loader:
        return _measure(run, shape, rounds)


def _measure(run: Run, shape: Shape, rounds: int) -> list[BenchRow]:
    learner, batch = run.learner, run.loader.next()
    _forward_backward(learner, batch)
    gradients = {id(p): p.grad for _, p in learner.adapter.named_parameters()}
    built = {name: _build(learner, config, run.device) for name, config in TIMED.items()}
    apart = projection(built["galore"], gradients, rounds, run.device)
    providers: dict[str, Callable[[], None]] = {
        "muon_fp32": _ours(learner, learner.optimizer, gradients),
        **{name: _ours(learner, optimizer, gradients) for name, optimizer in built.items()},
        **_others(learner.adapter, gradients),
        "forward_backward": lambda: _forward_backward(learner, batch),
        "full_step": lambda: _full_step(learner, batch),
    }
    if learner.parameters < EAGER_BELOW:
        eager = _build(learner, learner.recipe.optimizer, torch.device("cpu"))
        providers["muon_eager"] = _ours(learner, eager, gradients)
    times = interleaved(providers, rounds, run.device)
    dtype = learner.adapter.head_VD.dtype
    rows = []
    for name, timing in times.items():
        values = {"ms": timing.p50}
        if name not in ("forward_backward", "full_step"):
            fraction = timing.p50 / (times["forward_backward"].p50 + timing.p50)
            values = {"step_fraction": fraction, "of_muon_fp32": timing.p50 / times["muon_fp32"].p50}
        rows += [bench_row("optimizer", shape, name, dtype, run.device, timing, v, unit) for unit, v in values.items()]
    for name, timing in apart.items():
        rows.append(bench_row("optimizer", shape, name, dtype, run.device, timing, timing.p50, "ms"))
    timing = spread(apart, TIMED["galore"])
    fraction = timing.p50 / (times["forward_backward"].p50 + times["galore"].p50)
    rows.append(
        bench_row("optimizer", shape, "galore_projection", dtype, run.device, timing, fraction, "step_fraction")
    )
    return rows + not_installed("optimizer", shape, missing(), dtype, run.device)


def _forward_backward(learner: Learner, batch: Batch) -> None:
    _drop_gradients(learner)
    for micro in batch.micros:
        stream = learner.adapter.forward(micro)
        scale = torch.tensor(1 / batch.labelled, device=learner.adapter.device)
        learner.objective.loss(stream, micro, None, scale).total.backward()


def _full_step(learner: Learner, batch: Batch) -> None:
    _drop_gradients(learner)
    learner.step(batch, NOW)


def _drop_gradients(learner: Learner) -> None:
    """What the call before left, so that no step holds two sets."""
    for _, parameter in learner.adapter.named_parameters():
        parameter.grad = None


def _build(learner: Learner, config: Optimizer, device: torch.device) -> StackedOptimizer:
    """On the learner's parameters, wherever they are; compiled where `device` is a GPU."""
    return config.build(learner.adapter.named_parameters(), learner.adapter.hidden_names(), device)


def _ours(learner: Learner, optimizer: StackedOptimizer, gradients: Gradients) -> Callable[[], None]:
    steps = itertools.count()

    def call() -> None:
        _give(learner, gradients)
        optimizer.step(replace(NOW, step=next(steps)))

    return call


def _others(adapter: Adapter, gradients: Gradients) -> dict[str, Callable[[], None]]:
    """Optimizers that are not ours, by provider name, all on one copy of the bf16 weights."""
    groups = partition(adapter.named_parameters(), adapter.hidden_names())
    matrix, rest = ([nn.Parameter(p.detach().clone()) for _, p in group] for group in groups)
    sources = [gradients[id(p)] for group in groups for _, p in group]

    def call(optimizers: list[torch.optim.Optimizer]) -> None:
        for copy, gradient in zip(matrix + rest, sources, strict=True):
            copy.grad = gradient
        nn.utils.get_total_norm([gradient for gradient in sources if gradient is not None])
        for optimizer in optimizers:
            optimizer.step()

    size = sum(p.numel() for p in matrix + rest)
    peers = {name: peer.build for name, peer in present().items() if size < peer.timed_below}
    builds: dict[str, Build] = {"muon_torch": _muon_torch, **peers}
    return {name: partial(call, build(matrix, rest)) for name, build in builds.items()}


def _muon_torch(matrix: Weights, rest: Weights) -> list[torch.optim.Optimizer]:
    """torch.optim.Muon, one matrix at a time, with AdamW (fused) for the rest."""
    muon = torch.optim.Muon(matrix, lr=LR, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=LR, fused=rest[0].is_cuda)]


def _give(learner: Learner, gradients: Gradients) -> None:
    for _, parameter in learner.adapter.named_parameters():
        parameter.grad = gradients[id(parameter)]
