"""What training holds in memory, counted: weights, masters, gradients, optimizer state, activations, a step's peak.

The first four are sums over live tensors, each storage once; the others are the allocator's: activations are what a
forward leaves for its backward, whole logits or the head's gradient among it. A step here is forward, backward and
update of one micro-batch under full training, without gradient checkpointing. Nothing is computed from a formula. Of
other people's optimizers (`peers`) the state is counted, nothing else.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cggr_ray.benchmarks.optimizers import OPTIMIZERS
from cggr_ray.benchmarks.peers import Peer, missing, present, tensors_in
from cggr_ray.benchmarks.rows import BenchRow, Shape, bench_row, not_installed
from cggr_ray.benchmarks.step import random_micro, random_model
from cggr_ray.benchmarks.timing import Timing
from cggr_ray.benchmarks.workload import NOW
from cggr_ray.models.adapter import Adapter
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.optim.optimizer import Optimizer, StackedOptimizer
from cggr_ray.optim.partition import partition
from cggr_ray.progress import Progress
from cggr_ray.telemetry.gpu import MIB

# Of whose state that of each optimizer is given as a share, once it is measured.
REFERENCES = ("adamw_fp32", "muon_fp32")
# Memory of usual devices, in GiB, under which a step is tried.
CAPS = (24, 48, 80)
# What a device has of the memory in its name, at least.
OF_NAME = 0.9
# The first step is the one in which all projections are found.
FIRST = replace(NOW, step=0)


class Training:
    """A model of a shape and its optimizer on a device, ready for a step."""

    def __init__(self, shape: Shape, config: Optimizer, device: torch.device, dtype: torch.dtype) -> None:
        self.adapter = Adapter(random_model(shape.model, device, dtype))
        named = self.adapter.named_parameters()
        self.parameters = [p for _, p in named]
        self.optimizer: StackedOptimizer = config.build(named, self.adapter.hidden_names(), device)
        self.micro = random_micro(shape, self.adapter.head_VD.shape[0], device)

    def forward(self, at: Progress) -> Tensor:
        """The loss of a step that has begun."""
        scale = torch.tensor(1 / self.micro.labelled, device=self.adapter.device)
        self.optimizer.begin(at)
        return NextToken().loss(self.adapter.forward(self.micro), self.micro, None, scale).total

    def backward(self, at: Progress) -> None:
        self.forward(at).backward()

    def held(self) -> dict[str, int]:
        """Bytes by what they are for; to be asked between backward and update, when there are gradients."""
        stacks = self.optimizer.stacks.values()
        masters = [s.master for s in stacks if s.master is not s.weights]
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return {
            "weights_bytes": live_bytes(self.parameters),
            "master_bytes": live_bytes(masters),
            "gradient_bytes": live_bytes([*gradients, *(s.projected for s in stacks if s.projected is not None)]),
            "optimizer_bytes": live_bytes(
                tensor for stack in stacks for tensor in (*stack.state.values(), stack.awake)
            ),
        }


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each once."""
    # By identity: those of the meta device, which has no memory, all stand at address 0.
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def accounting(shape: Shape, device: torch.device) -> Iterator[BenchRow]:
    """Rows of every optimizer, as each is measured: bytes held, the share of those of the references measured so far,
    and on a GPU the peak of a step and whether one fits under each cap."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    references: dict[str, float] = {}

    def rows(name: str, values: dict[str, float]) -> Iterator[BenchRow]:
        if name in REFERENCES:
            references[name] = values["optimizer_bytes"]
        shares = {f"optimizer_of_{other}": values["optimizer_bytes"] / held for other, held in references.items()}
        timing = Timing(0.0, 0.0, 0.0, values.get("peak_mib", 0.0))
        for unit, value in (values | shares).items():
            yield bench_row("memory", shape, name, dtype, device, timing, value, unit)

    for name, config in OPTIMIZERS.items():
        release()
        training = Training(shape, config, device, dtype)
        training.backward(FIRST)
        values = {unit: float(value) for unit, value in training.held().items()}
        if device.type == "cuda":
            values |= step_peak(training, device)
        del training
        if device.type == "cuda":
            values |= {f"fits_{cap}_gib": float(fits(shape, config, device, cap)) for cap in caps(device)}
        yield from rows(name, values)
    for name, peer in present().items():
        release()
        yield from rows(name, {"optimizer_bytes": float(peer_bytes(peer, shape, device, dtype))})
    yield from not_installed("memory", shape, missing(), dtype, device)


def peer_bytes(peer: Peer, shape: Shape, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of an optimizer's state after an update by gradients of zero: how much it holds depends on shapes alone."""
    adapter = Adapter(random_model(shape.model, device, dtype))
    groups = partition(adapter.named_parameters(), adapter.hidden_names())
    matrix, rest = ([p for _, p in group] for group in groups)
    for parameter in matrix + rest:
        parameter.grad = torch.zeros_like(parameter)
    optimizers = peer.build(matrix, rest)
    for optimizer in optimizers:
        optimizer.step()
    return live_bytes(tensor for optimizer in optimizers for tensor in tensors_in(optimizer.state))


def step_peak(training: Training, device: torch.device) -> dict[str, float]:
    """After a backward: MiB at the peak of the update and of a whole step after it, weights and state included, and the
    bytes that the step's forward leaves."""
    torch.cuda.reset_peak_memory_stats(device)
    training.optimizer.step(FIRST)
    before = torch.cuda.memory_allocated(device)
    loss = training.forward(NOW)
    activations = torch.cuda.memory_allocated(device) - before
    loss.backward()
    training.optimizer.step(NOW)
    torch.cuda.synchronize(device)
    return {"peak_mib": torch.cuda.max_memory_allocated(device) / MIB, "activation_bytes": float(activations)}


def caps(device: torch.device) -> list[int]:
    """Those of CAPS that can be tried: a device sold as 80 GB has 79 GiB, and under a cap above its own memory what
    fails would fail for want of memory that the cap allows."""
    own = torch.cuda.get_device_properties(device).total_memory / 2**30
    return [cap for cap in CAPS if cap <= own / OF_NAME]


def fits(shape: Shape, config: Optimizer, device: torch.device, cap: int) -> bool:
    """Whether two steps run when the allocator may take so many GiB and no more."""
    release()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2**30 / total))
    try:
        training = Training(shape, config, device, torch.bfloat16)
        for step in (FIRST, NOW):
            training.backward(step)
            training.optimizer.step(step)
        torch.cuda.synchronize(device)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def release() -> None:
    """Gives what is no longer used back to the device."""
    gc.collect()
    torch.cuda.empty_cache()
