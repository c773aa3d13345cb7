"""How many positions a call keeps, by the steps that a loop has counted and by the model's confidence.

    base     1 - min(1, steps / warmup_steps) (1 - min_tokens_ratio)
    ratio    what `routing.curriculum.DynamicThreshold` makes of base and the mean confidence, measured two calls before

Nothing here waits for the device but for a value of two calls ago, so that equal calls keep equal counts.
Differs from upstream, which reads the confidence of the very batch and stops the host for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cggr_ray.routing.curriculum import DynamicThreshold

# Calls between measuring a confidence and using it.
DELAY = 2


class HostCopy:
    """A small tensor on its way from the device to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor.detach().to("cpu", non_blocking=True, copy=True)
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            with torch.cuda.device_of(tensor):
                self._event = torch.cuda.Event()
                self._event.record()

    def __getstate__(self) -> dict[str, Any]:
        """What has arrived, for a loop that copies its model: an event cannot be copied."""
        self.values()
        return {"_host": self._host, "_event": None}

    def values(self) -> list[float]:
        """Waits if it has not arrived."""
        if self._event is not None:
            self._event.synchronize()
        found: list[float] = self._host.tolist()
        return found


class StepCount(nn.Module):
    """Steps of a loop, in a buffer that a state_dict carries."""

    num_steps: Tensor

    def __init__(self, warmup_steps: int) -> None:
        super().__init__()
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps = {warmup_steps}; accepted: at least 0")
        self.warmup_steps, self.steps = warmup_steps, 0
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(_refresh)

    def step(self) -> None:
        """To be called once an optimizer step."""
        self.num_steps += 1
        self.steps += 1

    @property
    def passed(self) -> float:
        """The share of the warm-up that has passed, 0 to 1."""
        return 1.0 if self.warmup_steps == 0 else min(1.0, self.steps / self.warmup_steps)

    def refresh(self) -> None:
        """Takes the host's values from the buffers."""
        self.steps = int(self.num_steps)


def _refresh(module: nn.Module, _keys: Any) -> None:
    assert isinstance(module, StepCount)
    module.refresh()


class StepCurriculum(StepCount):
    """The kept ratio of each call. `confidence`: of the last two calls, each with its reference; NaN while unknown."""

    confidence: Tensor

    def __init__(self, min_tokens_ratio: float, warmup_steps: int, dynamic: DynamicThreshold | None) -> None:
        super().__init__(warmup_steps)
        self.min_tokens_ratio, self.dynamic = min_tokens_ratio, dynamic
        self.register_buffer("confidence", torch.full((DELAY, 2), torch.nan))
        self._arriving = [HostCopy(row) for row in self.confidence]

    def ratio(self) -> float:
        """Of the coming call."""
        base = 1 - self.passed * (1 - self.min_tokens_ratio)
        if self.dynamic is None or base == 1:
            return base
        confidence, reference = self._arriving[0].values()
        if confidence != confidence:
            return base
        return self.dynamic.ratio(base, confidence, confidence if reference != reference else reference)

    def _apply(self, fn: Any, recurse: bool = True) -> StepCurriculum:
        """Stays in float32 when a loop casts its module, as with `.bfloat16()`: a slow average would stand still."""
        super()._apply(fn, recurse)
        self.confidence = self.confidence.float()
        return self

    @torch.no_grad()
    def observe(self, mean_confidence: Tensor) -> None:
        """Takes the mean confidence of a call, 0-d; NaN, of a batch without labels, changes nothing."""
        if self.dynamic is None:
            return
        if self.confidence.device != mean_confidence.device:
            # A criterion is seldom moved to the GPU; every later call would wait for the copy to its buffer.
            self.confidence = self.confidence.to(mean_confidence.device)
        before, reference = self.confidence[-1].unbind()
        weight = 0.0 if self.dynamic.rule == "upstream" else self.dynamic.smoothing
        seen = mean_confidence.to(before)
        now = torch.where(before.isnan(), seen, weight * before + (1 - weight) * seen)
        now = torch.where(seen.isnan(), before, now)
        if self.passed >= 1:
            reference = torch.where(reference.isnan(), now, reference)
        newest = torch.stack((now, reference))
        self.confidence.copy_(torch.cat((self.confidence[1:], newest.unsqueeze(0))))
        self._arriving = [*self._arriving[1:], HostCopy(newest)]

    def refresh(self) -> None:
        super().refresh()
        self._arriving = [HostCopy(row) for row in self.confidence]
