"""The workers of a trial: processes that hold the same model, each of which trains its share of every step's rows.

Whatever is decided is decided alike by all of them: from sums over all (gradients, losses, statistics) and from what
worker 0 says (the clock). Sums are taken on the device, in the dtype of what is summed, and the host waits for none.
What hosts have to tell each other goes over a group of their own on the CPU (gloo), so that no device is synchronised.
A worker that dies ends the others: their next message to it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# How long a host waits for another one that is alive: worker 0 alone evaluates and writes.
PATIENCE = timedelta(hours=24)


class Workers:
    """One process alone: nothing to add up and nobody to ask. `Group` is several."""

    rank, size = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this is worker 0, whose clock counts, and which alone evaluates and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> None:
        """Adds up a tensor of every worker, in place, in its dtype; the same bits everywhere."""

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all workers, of one shape, one after the other along the first dimension. Compiles."""
        return tensor

    def share(self, find: Callable[[Tensor], Tensor], stack_N: Tensor) -> Tensor:
        """What `find` makes of each of N tensors, of which all workers hold the same. Compiles."""
        return find(stack_N)

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites tensors by those of worker 0."""

    def first(self, value: float) -> float:
        """What worker 0 says. Between hosts: waits for its message and for no device."""
        return value

    def reason(self, own: str | None) -> str | None:
        """Why all have to give something up: this worker's reason, or that another one has one. Between hosts."""
        return own


ALONE = Workers()


class Group(Workers):
    """The processes that torch.distributed has joined: NCCL between GPUs, gloo between CPUs.

    Args:
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # The first call makes the connections, which take memory of the device. Its value is there when all workers
        # are, within the patience of torch's own group: the next group would wait a day for one that never comes.
        arrived = torch.ones((), device=device)
        self.sum(arrived)
        assert arrived.item() == self.size
        self._hosts = dist.new_group(backend="gloo", timeout=PATIENCE)

    def sum(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        return gathered(tensor, self.size)

    def share(self, find: Callable[[Tensor], Tensor], stack_N: Tensor) -> Tensor:
        """Each worker finds a part of them; fewer than there are workers are found by all."""
        if len(stack_N) < self.size:
            return find(stack_N)
        each = -(-len(stack_N) // self.size)
        own = stack_N[self.rank * each : (self.rank + 1) * each]
        if len(own) < each:
            own = torch.cat((own, stack_N[: each - len(own)]))
        return self.gather(find(own))[: len(stack_N)]

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            # As bytes: not every backend knows every dtype.
            whole = tensor.contiguous().flatten()
            dist.broadcast(whole.view(torch.uint8), src=0)
            tensor.copy_(whole.view_as(tensor))

    def first(self, value: float) -> float:
        said = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(said, src=0, group=self._hosts)
        return float(said)

    def reason(self, own: str | None) -> str | None:
        # 0 where nobody has one, else the last worker that does, counted from 1.
        who = torch.tensor([0 if own is None else self.rank + 1])
        dist.all_reduce(who, dist.ReduceOp.MAX, group=self._hosts)
        return own or (f"in worker {int(who) - 1} of {self.size}" if who else None)


@torch.library.custom_op("cggr_ray::gathered", mutates_args=())
def gathered(tensor: Tensor, size: int) -> Tensor:
    """One operator to a compiler, so that what is compiled may gather."""
    found = tensor.new_empty(size * len(tensor), *tensor.shape[1:])
    dist.all_gather([*found.split(len(tensor))], tensor.contiguous())
    return found


@gathered.register_fake
def _(tensor: Tensor, size: int) -> Tensor:
    return tensor.new_empty(size * len(tensor), *tensor.shape[1:])
