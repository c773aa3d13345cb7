"""Learner.step: the whole training algorithm, without a branch on any method's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cggr_ray.compiling import compiled_on
from cggr_ray.data.batch import Batch, MicroBatch
from cggr_ray.graphs import Graphs
from cggr_ray.models.adapter import Adapter
from cggr_ray.optim.layer_norms import LayerNorms
from cggr_ray.out_of_memory import FAILURES, first_line, is_out_of_memory, no_way_back, release_memory
from cggr_ray.progress import Progress
from cggr_ray.recipe import Recipe
from cggr_ray.routing.scorers import Setting
from cggr_ray.routing.scores import NATS
from cggr_ray.schema import (
    ACTIVE_LAYERS,
    AUXILIARY_LOSS,
    GRAD_NORM,
    GRAD_NORM_LAYERS,
    HISTOGRAMS,
    LEARNING_RATE,
    PROBE,
    RELEVANCE,
    ROUTER_ACTIVE_PARAMS,
    ROUTER_CONFIDENCE,
    ROUTER_ENTROPY,
    ROUTER_KEPT_FRACTION,
    ROUTER_USAGE,
    STEP_LOSSES,
    TOKEN_LOSS,
    TRAIN_LOSS,
)
from cggr_ray.sparse.plan import Dense
from cggr_ray.updates.relevance import Probe
from cggr_ray.updates.schedule import Active, Learning
from cggr_ray.workers import ALONE, Workers


@dataclass(frozen=True)
class StepRow:
    """What a step leaves behind: values on the device, to be read when they are there, and values of the host. `edges`
    are those of the bins of the histograms among the former."""

    progress: Progress
    device_values: dict[str, Tensor]
    host_values: dict[str, float]
    edges: Mapping[str, list[float]]


Smaller = Callable[[str], Batch]
"""Asked, with the reason, for the rows of a step in smaller micro-batches; raises where there are none."""


class Levels(NamedTuple):
    """What a step may run at: the kept ratios of the rows of a micro-batch and of the labelled positions of a row, and
    which layers learn."""

    rows: float
    tokens: float
    layers: Learning


class Pass:
    """Forward, route, loss and backward of one micro-batch. The gradients stay with the parameters."""

    def __init__(
        self, recipe: Recipe, adapter: Adapter, seed: int, num_positions: int, reference: Tensor | None = None
    ) -> None:
        setting = Setting(adapter.device, len(adapter.layers), adapter.head_VD.shape[1], num_positions, reference)
        self.adapter, self.objective = adapter, recipe.objective.build(adapter, seed)
        self.router = recipe.tokens.build(seed, setting)
        self.plan, self.full = recipe.tokens.plan_for(adapter), Dense(adapter)
        self._histogram = compiled_on(adapter.device, loss_histogram)

    def __call__(
        self, micro: MicroBatch, scale: Tensor, ratio: float, compare: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(this micro-batch's part of the loss, what was seen on the way).

        Args:
            scale: 1 / labelled positions of the global batch. compare: show the router the model's own scores.
        """
        plan = self.plan if ratio < 1 else self.full
        planned = plan.forward(micro, self.router.reads(ratio), partial(self.router.route, micro=micro, ratio=ratio))
        loss = self.objective.loss(planned.stream, micro, planned.route, scale)
        self.router.watch(planned.stream, loss.index_K)
        # What is not asked for must not be held through the backward pass.
        whole = planned.whole if compare else None
        seen = planned.statistics | {TOKEN_LOSS: self._histogram(micro.labels_BT, loss.index_K, loss.nll_K)}
        labelled = (micro.labels_BT >= 0).sum()
        seen = {ROUTER_KEPT_FRACTION: labelled} | seen
        # Micro-batches have labels in unequal numbers: sums, in which float64 loses nothing.
        seen |= {name: seen[name].double() * labelled for name in OF_POSITIONS if name in seen}
        del planned
        loss.total.backward()
        self.router.learn(micro, loss.index_K, loss.nll_K)
        if loss.auxiliary is not None:
            seen = seen | {AUXILIARY_LOSS: loss.auxiliary}
        if whole is not None:
            seen = seen | self.router.agreement(whole(), micro, ratio)
        return loss.reported, seen


class Learner:
    """The running parts of a recipe on one model.

    Args:
        num_positions: of the whole data set. reference: what a reference model loses there, where the scores need it.
        workers: those that train the same model. All of them have to take the same steps at the same progress.
    """

    def __init__(
        self,
        recipe: Recipe,
        adapter: Adapter,
        seed: int,
        num_positions: int,
        reference: Tensor | None = None,
        workers: Workers = ALONE,
    ) -> None:
        self.recipe, self.adapter, self.workers = recipe, adapter, workers
        self.rows = recipe.rows.build(seed, adapter)
        self.run_pass = Pass(recipe, adapter, seed, num_positions, reference)
        self.router, self.objective = self.run_pass.router, self.run_pass.objective
        named, hidden = self.named_parameters(), [*adapter.hidden_names(), *self.objective.hidden_names()]
        self.optimizer = recipe.optimizer.build(named, hidden, adapter.device, workers, adapter.fused_names())
        layers = len(adapter.layers)
        self.updates = recipe.updates.build(layers, seed)
        self._edges = {TOKEN_LOSS: NATS.edges, **self.router.edges()}
        self.gauge: Probe | None = None
        if self.updates.relevance is not None:
            inside = [list(layer.parameters()) for layer in adapter.layers]
            self.gauge = Probe(self.updates.relevance, self.optimizer.parameters, inside)
        self._sizes = [sum(p.numel() for p in adapter.layer_parameters(i)) for i in range(layers)]
        self._rested = [0] * layers
        self.layer_norms = LayerNorms([list(layer.parameters()) for layer in adapter.layers], adapter.device)
        self.parameters = sum(p.numel() for _, p in named)
        self.graphs: Graphs | None = None
        if recipe.execution.cuda_graphs and adapter.device.type == "cuda":
            self.graphs = Graphs([p for _, p in named], self.router.generators())

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All that learns: the language model's, then what the objective owns."""
        return [*self.adapter.named_parameters(), *self.objective.named_parameters()]

    def levels(self) -> list[Levels]:
        """All combinations of what a step may run at; each is a graph of its own."""
        return [Levels(*level) for level in product(self.rows.levels(), self.router.levels(), self.updates.reachable())]

    def step(self, batch: Batch, progress: Progress, smaller: Smaller | None = None) -> StepRow:
        """One optimizer update. Queues work on the device and returns; nothing is read back.

        Where memory runs out before the update, nothing of the step is left behind. With `smaller` it is then repeated;
        all workers repeat it where one of them has to.

        Raises:
            torch.OutOfMemoryError: memory ran out, and there is no `smaller`.
            LostStepError: memory ran out where a step cannot be repeated.
        """
        levels = Levels(self.rows.ratio(progress), self.router.ratio(progress), self.updates.begin(progress))
        with no_way_back("the beginning of a step"):
            self._wake(levels.layers.active)
        return self._step(batch, progress, levels, smaller)

    def rehearse(self, batch: Batch, number: int, levels: Levels) -> None:
        """A step at `levels`, in the optimizer's rehearsal: layers that have rested do not wake."""
        self.adapter.set_active_layers(levels.layers.active)
        self._step(batch, Progress(number, 0.0, 1.0, 1), levels, None)

    def _step(self, batch: Batch, progress: Progress, levels: Levels, smaller: Smaller | None) -> StepRow:
        learning = levels.layers
        with no_way_back("the beginning of a step"):
            self.optimizer.begin(progress)
            self.objective.begin(progress)
        while True:
            found, failed = None, None
            try:
                found = self._gradients(batch, levels, progress)
            except FAILURES as error:
                if not is_out_of_memory(error):
                    raise
                failed = first_line(error)
            reason = self.workers.reason(failed)
            if reason is None:
                break
            found = None
            self.rewind()
            if smaller is None:
                raise torch.OutOfMemoryError(reason)
            self.release()
            batch = smaller(reason)
        assert found is not None
        loss, seen, (kept, read) = found
        gauge = self.gauge if learning.probe else None
        with no_way_back("the optimizer's update"):
            self.router.share(self.workers)
            norm = self.optimizer.step(progress, gauge)
            measured = {} if gauge is None else {RELEVANCE: gauge.of_layers()}
            by_layer = self.layer_norms(self.optimizer.norms, self.optimizer.normed)
        loss_name = TRAIN_LOSS if levels.rows == levels.tokens == 1 else self.run_pass.plan.LOSS
        device_values = {loss_name: loss, GRAD_NORM: norm, GRAD_NORM_LAYERS: by_layer, **measured, **seen}
        device_values = of_all(device_values, self.workers)
        device_values[ROUTER_KEPT_FRACTION] = device_values[ROUTER_KEPT_FRACTION].double() / read
        device_values |= {name: (device_values[name] / kept).float() for name in OF_POSITIONS if name in device_values}
        return StepRow(progress, device_values, self._host_values(progress, learning), self._edges)

    def _gradients(
        self, batch: Batch, levels: Levels, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Forward and backward of every micro-batch: the loss, what was seen on the way, and the labelled positions of
        the rows that were kept and of all rows."""
        rows, ratio, learning = levels
        micros, kept, read = self._picked(batch, rows, progress)
        # Rounded once.
        scale = (1 / kept.double()).float()
        compare = self.router.compares(ratio, progress)
        micro_step = partial(self.run_pass, ratio=ratio, compare=compare)
        losses, statistics = [], []
        for micro in micros:
            self.router.begin(micro, progress)
            if self.graphs is None or compare:
                loss, seen = micro_step(micro, scale)
            else:
                loss, seen = self.graphs.run((ratio, learning.active), micro_step, micro, scale)
                # The next replay writes where these are, and a row is read later.
                loss, seen = loss.clone(), {name: value.clone() for name, value in seen.items()}
            if len(micros) > 1:
                self.optimizer.accumulate()
            losses.append(loss)
            statistics.append(seen)
        return torch.stack(losses).sum(), _merge(statistics), (kept, read)

    def _picked(self, batch: Batch, ratio: float, progress: Progress) -> tuple[list[MicroBatch], Tensor, Tensor]:
        """The micro-batches with the rows that are kept of them, the labelled positions of those rows and of all rows,
        0-d; of all workers, and at least 1."""
        labelled = torch.zeros(2, dtype=torch.long, device=self.adapter.device)
        try:
            micros = [self.rows.pick(micro, ratio, progress) for micro in batch.micros]
            labelled[0] += torch.stack([(micro.labels_BT >= 0).sum() for micro in micros]).sum()
            labelled[1] += batch.labelled
        finally:
            # Also where memory ran out: the others are counting.
            self.workers.sum(labelled)
        kept, read = labelled.clamp_min(1).unbind()
        return micros, kept, read

    def rewind(self) -> None:
        """Puts back what the forward and backward passes of a step have changed so far, after memory ran out."""
        self.optimizer.rewind()
        self.router.rewind()

    def release(self) -> None:
        """Lets go of memory before smaller micro-batches: of graphs of the old shapes, and of what is cached."""
        if self.graphs is not None:
            self.graphs.clear()
        release_memory()

    def observe(self, values: dict[str, float], progress: Progress) -> None:
        """Gives the parts what an earlier step measured, two steps late."""
        self.router.observe(values, progress)
        self.updates.observe(values, progress)

    @torch.no_grad()
    def agree(self) -> None:
        """Gives all workers the weights and states of worker 0. Theirs are the same but for the rounding of what each
        process has compiled by itself, which must not add up."""
        stacks = [tensor for stack in self.optimizer.stacks.values() for tensor in stack.tensors().values()]
        self.workers.copy_first([*stacks, *self.router.tensors().values()])

    def state_dict(self) -> dict[str, Any]:
        """Host state of the parts, and what is counted. Weights, optimizer and router tensors are saved beside it."""
        cache = self.adapter.cache
        return {
            "router": self.router.state_dict(),
            "updates": self.updates.state_dict(),
            "rested": [*self._rested],
            "waiting": self.optimizer.waiting(),
            "cache": None if cache is None else [cache.hits, cache.misses],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.router.load_state_dict(state["router"])
        self.updates.load_state_dict(state["updates"])
        self._rested = [*state["rested"]]
        self.optimizer.wait(state["waiting"])
        if self.adapter.cache is not None:
            self.adapter.cache.hits, self.adapter.cache.misses = state["cache"]

    def _wake(self, active: Active) -> None:
        """Lets these layers learn in this step, and the others rest."""
        self.adapter.set_active_layers(active)
        for layer, (learns, rested) in enumerate(zip(active, self._rested, strict=True)):
            if learns and rested:
                self.optimizer.wake(self.adapter.layer_parameters(layer), rested)
        self._rested = [0 if learns else rested + 1 for learns, rested in zip(active, self._rested, strict=True)]

    def _host_values(self, progress: Progress, learning: Learning) -> dict[str, float]:
        resting = sum(size for size, learns in zip(self._sizes, learning.active, strict=True) if not learns)
        return {
            LEARNING_RATE: self.optimizer.learning_rate(progress),
            ROUTER_ACTIVE_PARAMS: float(self.parameters - resting),
            ACTIVE_LAYERS: float(sum(learning.active)),
            PROBE: float(learning.probe),
        }


@torch.no_grad()
def loss_histogram(labels_BT: Tensor, index_K: Tensor, nll_K: Tensor) -> Tensor:
    """Counts of the losses of single positions by bin: of those that were computed and have a label."""
    labelled_K = labels_BT.flatten().index_select(0, index_K) >= 0
    return NATS.counts(torch.where(labelled_K & ~nll_K.isnan(), nll_K, -torch.inf))


# Means over the scored positions, which are all labelled ones of the kept rows.
OF_POSITIONS = (ROUTER_ENTROPY, ROUTER_CONFIDENCE)
# Of what is seen in a micro-batch, and of a step by a worker; the rest is averaged.
SUMMED = (*HISTOGRAMS, *OF_POSITIONS, ROUTER_USAGE, ROUTER_KEPT_FRACTION, AUXILIARY_LOSS, *STEP_LOSSES)


def _merge(statistics: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Means over micro-batches; counts and parts of the loss add up."""
    if len(statistics) == 1:
        return statistics[0]
    stacked = {name: torch.stack([s[name] for s in statistics]) for name in statistics[0]}
    return {name: s.sum(dim=0) if name in SUMMED else s.mean(dim=0) for name, s in stacked.items()}


def of_all(values: dict[str, Tensor], workers: Workers) -> dict[str, Tensor]:
    """What all workers saw of a step, from what each did, in one message: the same numbers for all of them, so that
    whatever is decided by them is too. What all know already, as norms of the gradient, is its own mean."""
    if workers.size == 1:
        return values
    flat = torch.cat([value.double().flatten() for value in values.values()])
    workers.sum(flat)
    pieces = flat.split([value.numel() for value in values.values()])
    sums = {name: piece.view_as(values[name]) for name, piece in zip(values, pieces, strict=True)}
    return {name: (s if name in SUMMED else s / workers.size).to(values[name].dtype) for name, s in sums.items()}
