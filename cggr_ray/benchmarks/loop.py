"""`bench loop`: a step of our loop against a bare hand-written loop on the same model shape, data and optimizer.

`ours` is everything a run does for a step: loader, routes, chunked loss, clip, optimizer, clock, rows. `bare_blocks`
compiles the decoder block and plain cross-entropy on whole logits; `bare_whole` compiles the whole forward with its
loss. Both have no loader (one batch stays on the device), no clock and no rows. `ours_deterministic` is ours by torch's
deterministic algorithms (`execution.deterministic`): what repeating to the bit costs on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from cggr_ray.benchmarks.rows import BenchRow, Shape, bench_row
from cggr_ray.benchmarks.timing import Timing, interleaved
from cggr_ray.benchmarks.workload import NOW, prepared_run, tail_loss
from cggr_ray.compiling import compiled_on
from cggr_ray.data.batch import MicroBatch
from cggr_ray.device import deterministic
from cggr_ray.loop import Run
from cggr_ray.models.adapter import Adapter

SHAPES = ("smollm-135m/32x1024", "llama-113m/32x1024")
# Steps a timed call: our loop overlaps a step with the next, so a few alone would show its start and end.
STEPS_A_CALL = 20


def bench_loop(shape: Shape, device: str, rounds: int, folder: Path) -> list[BenchRow]:
    run = prepared_run(shape, device, folder)
    with deterministic(True):
        repeating = prepared_run(shape, device, folder, values={"execution.deterministic": True})
    with run.loader, repeating.loader:
        micro = run.loader.next().micros[0]
        bare = Bare(run, micro)
        providers: dict[str, Callable[[], None]] = {
            "ours": lambda: train(run),
            "bare_blocks": lambda: bare.steps(bare.loss_by_blocks),
            "bare_whole": lambda: bare.steps(bare.loss_whole),
            "ours_deterministic": lambda: train_repeating(repeating),
        }
        times = {name: per_step(t) for name, t in interleaved(providers, rounds, run.device).items()}
        ledgers = run.clock.ledgers
    rows = []
    dtype = run.learner.adapter.head_VD.dtype
    for name, timing in times.items():
        ratio = times["ours"].p50 / timing.p50
        rows.append(bench_row("loop", shape, name, dtype, run.device, timing, ratio, "ours_over_this"))
    waited = ledgers["data_wait"] / (ledgers["train"] + ledgers["data_wait"])
    rows.append(bench_row("loop", shape, "ours_data_wait", dtype, run.device, times["ours"], waited, "budget_fraction"))
    return rows


def train(run: Run) -> None:
    """The steps of a timed call."""
    used = run.clock.train_seconds
    for _ in range(STEPS_A_CALL):
        used = run.advance(used)
    run.clock.switch("idle")


def train_repeating(run: Run) -> None:
    with deterministic(True):
        train(run)


def per_step(timing: Timing) -> Timing:
    return Timing(timing.p20 / STEPS_A_CALL, timing.p50 / STEPS_A_CALL, timing.p80 / STEPS_A_CALL, timing.peak_mib)


class Bare:
    """A loop written by hand: forward, cross-entropy, backward, clip, our compiled optimizer, nothing else."""

    def __init__(self, run: Run, micro: MicroBatch) -> None:
        self.micro, spec, device = micro, run.spec, run.device
        recipe = run.trial.recipe
        model = spec.model.build(spec.model.vocab_size, run.trial.seed, device, recipe.execution.dtype(device))
        self.adapter = Adapter(model)
        self.optimizer = recipe.optimizer.build(self.adapter.named_parameters(), self.adapter.hidden_names(), device)
        self._block = compiled_on(device, lambda layer, hidden, keywords: layer(hidden, **keywords))
        self._tail = compiled_on(device, tail_loss)
        self._whole = compiled_on(device, self._forward_whole)

    def steps(self, loss: Callable[[], Tensor]) -> None:
        for _ in range(STEPS_A_CALL):
            loss().backward()
            self.optimizer.step(NOW)

    def loss_by_blocks(self) -> Tensor:
        return self._forward(self._block, self._tail)

    def loss_whole(self) -> Tensor:
        loss: Tensor = self._whole()
        return loss

    def _forward_whole(self) -> Tensor:
        return self._forward(lambda layer, hidden, keywords: layer(hidden, **keywords), tail_loss)

    def _forward(self, block: Callable[..., Tensor], tail: Callable[..., Tensor]) -> Tensor:
        adapter, micro = self.adapter, self.micro
        hidden = adapter.embed(micro)
        keywords = adapter.keywords(hidden, micro.positions_BT, adapter.documents(micro))
        for layer, shape in zip(adapter.layers, adapter.shapes, strict=True):
            hidden = block(layer, hidden, keywords[shape.window, shape.rotary])
        return tail(adapter.family.norm, hidden, adapter.head_VD, micro.labels_BT)
