"""Scorers with parameters of their own, trained online on the first layers' hidden states.

    Probe       a small MLP that predicts the loss of a position; reads no head
    TunedLens   an affine map between the last norm and the head, so that what early layers hold is read as it is meant

Both learn by AdamW from positions that the step trains on, after the backward pass of the model.
Shapes: B rows, T positions, N = B T, K kept slots, n of them, R any number of positions, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cggr_ray.compiling import compiled_on
from cggr_ray.data.batch import MicroBatch
from cggr_ray.kernels.selected_ce.op import chunks
from cggr_ray.models.adapter import Stream
from cggr_ray.routing.scorers import Scored, Scorer, Setting, check_depth, check_layers, own_scores, teaching
from cggr_ray.routing.scores import ScoreName
from cggr_ray.sparse.plan import Seen
from cggr_ray.workers import Workers

LARGEST_RATE = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Probe:
    """Predicts the loss by RMSNorm, D -> hidden -> 1 with ReLU, on the hidden states after `layers`. Scores are `loss`.

    Trained on the positions that a step trains on, by AdamW on the squared error of the standardised loss.
    """

    IS_PART: ClassVar[bool] = True
    EARLY: ClassVar[bool] = True

    layers: int = 4
    hidden: int = 64
    lr: float = 3e-3

    def __post_init__(self) -> None:
        check_layers(self.layers)
        if self.hidden < 1 or not 0 < self.lr <= LARGEST_RATE:
            raise ValueError(f"hidden = {self.hidden}, lr = {self.lr}; accepted: at least 1, a positive rate that "
                             "float32 has")  # fmt: skip

    def needs_layers(self) -> int:
        return self.layers + 1

    def build(self, name: ScoreName, setting: Setting, seed: int) -> Scorer:
        assert name == "loss", f"score {name!r} by a probe"
        check_depth(self.layers, setting)
        return ProbeScorer(self, setting, seed)


@dataclass(frozen=True)
class TunedLens:
    """Scores by the model cut off after `layers`, with a learned affine map between the last norm and the head.

    With h the hidden states there, f the model's final ones, W the head, p = softmax(W f), q = softmax(W x):

        x = norm(h) + A norm(h) / D + b / sqrt(D),   A (D x D) and b (D) from 0 by AdamW on the mean of KL(p || q)

    so that it begins as `TruncatedRouter`. One `lr` fits every width: near it lies what a step of AdamW, of one size
    for all entries, first moves x by. Learns from at most `positions` of those of a micro-batch that a step trains on,
    evenly spread, as each costs three products with the head. The target is p and not the label: positions that are
    kept for their loss have unusual labels. Full steps teach it too, for one more product of every position with the
    head. Differs from the tuned lens (arXiv 2303.08112): the map is behind the norm, and the model moves.
    """

    IS_PART: ClassVar[bool] = True
    EARLY: ClassVar[bool] = True

    layers: int = 4
    lr: float = 0.2
    positions: int = 512

    def __post_init__(self) -> None:
        check_layers(self.layers)
        if self.positions < 1 or not 0 < self.lr <= LARGEST_RATE:
            raise ValueError(f"positions = {self.positions}, lr = {self.lr}; accepted: at least 1, a positive rate "
                             "that float32 has")  # fmt: skip

    def needs_layers(self) -> int:
        return self.layers + 1

    def build(self, name: ScoreName, setting: Setting, seed: int) -> Scorer:
        check_depth(self.layers, setting)
        return LensScorer(self, name, setting)


class TrainedScorer:
    """Parameters, and all else of them that a step may have to put back, share or save.

    Args:
        parameters: values to begin with, float32. beside: what is learned by other means.
    """

    learns = True
    first_full_tokens = 0

    def __init__(self, reads: int, lr: float, parameters: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> None:
        self.reads = reads
        self._parameters = {name: nn.Parameter(value) for name, value in parameters.items()}
        learned = list(self._parameters.values())
        self._optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0, capturable=learned[0].is_cuda)
        for parameter in learned:
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._beside = dict(beside)
        self._mine = list(self.tensors().values())
        self._before = [tensor.clone() for tensor in self._mine]

    @torch.no_grad()
    def begin(self, micro: MicroBatch) -> None:
        if micro.first:
            torch._foreach_copy_(self._before, self._mine)

    @torch.no_grad()
    def rewind(self) -> None:
        torch._foreach_copy_(self._mine, self._before)

    @torch.no_grad()
    def share(self, workers: Workers) -> None:
        """The mean of what all workers have learned. Differs from one worker, which learns from one micro-batch after
        the other: here each learns from its own, all at the same time."""
        if workers.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in self._mine])
        workers.sum(flat)
        pieces = (flat / workers.size).split([tensor.numel() for tensor in self._mine])
        torch._foreach_copy_(self._mine, [new.view_as(old) for new, old in zip(pieces, self._mine, strict=True)])

    def update(self, found: Tensor, gradient: Tensor | None = None) -> None:
        """One step of AdamW against the gradient of what the parameters were used for."""
        self._optimizer.zero_grad(set_to_none=True)
        found.backward(gradient)
        self._optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        found = {name: parameter.data for name, parameter in self._parameters.items()} | self._beside
        for name, parameter in self._parameters.items():
            found |= {f"{name}.{key}": value for key, value in self._optimizer.state[parameter].items()}
        return found


class ProbeScorer(TrainedScorer):
    """The running probe. Its hidden states of a micro-batch are those it scored, so `learn` follows `score`."""

    def __init__(self, config: Probe, setting: Setting, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        parameters = {
            "into": _init(config.hidden, setting.width, generator).to(setting.device),
            "bias": torch.zeros(config.hidden, device=setting.device),
            "out": _init(1, config.hidden, generator).to(setting.device),
        }
        # Mean and second moment of the loss, and how many steps they have seen.
        self._moments = torch.zeros(3, device=setting.device)
        super().__init__(config.layers, config.lr, parameters, {"moments": self._moments})
        self._into, self._bias, self._out = self._parameters.values()
        self._hidden_ND: Tensor | None = None

    def rewind(self) -> None:
        super().rewind()
        self._hidden_ND = None

    def score(self, seen: Seen | None, micro: MicroBatch, generator: torch.Generator) -> Scored:
        assert seen is not None
        self._hidden_ND = seen.hidden_ND
        with torch.no_grad():
            predicted = self._predict(seen.hidden_ND).view(micro.labels_BT.shape)
        return Scored(torch.where(micro.labels_BT >= 0, predicted, -torch.inf), None)

    def watch(self, stream: Stream, index_K: Tensor) -> None:
        """The losses are enough."""

    @torch.enable_grad()
    def learn(self, micro: MicroBatch, index_K: Tensor, nll_K: Tensor) -> None:
        """One update on what the kept slots lost; the others weigh nothing."""
        teaches = teaching(micro, index_K, nll_K)
        nll, count = torch.where(teaches, nll_K, 0.0), teaches.sum().clamp_min(1)
        with torch.no_grad():
            seen = torch.stack((nll.sum() / count, nll.square().sum() / count, self._moments.new_ones(())))
            keep = torch.where(self._moments[2] > 0, 0.99, 0.0).where(teaches.any(), 1.0)
            self._moments.copy_(seen.lerp(self._moments, keep))
            spread = (self._moments[1] - self._moments[0].square()).clamp_min(1e-6).sqrt()
            target = (nll - self._moments[0]) / spread
        # A row that teaches nothing may hold what is no number, and that times 0 is none either.
        assert self._hidden_ND is not None, "learn without a score"
        hidden = self._hidden_ND.index_select(0, index_K).masked_fill(~teaches.unsqueeze(1), 0.0)
        error = torch.where(teaches, self._predict(hidden) - target, 0.0)
        self.update(error.square().sum() / count)
        self._hidden_ND = None

    def _predict(self, hidden_RD: Tensor) -> Tensor:
        """Standardised loss, one a row."""
        x = hidden_RD.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return (torch.relu(x @ self._into.mT + self._bias) @ self._out.mT).squeeze(-1)


class Taught(NamedTuple):
    """What teaches a lens: some of the kept slots, what it reads there, and what the model makes of them."""

    at_n: Tensor
    normed_nD: Tensor
    final_nD: Tensor
    head_VD: Tensor


class LensScorer(TrainedScorer):
    """The running lens. Of one micro-batch, `watch` follows `score`, and `learn` follows that."""

    def __init__(self, config: TunedLens, name: ScoreName, setting: Setting) -> None:
        self.name, self.reference, self.scope = name, setting.reference, setting.scope
        self._most = config.positions
        parameters = {
            "map": torch.zeros(setting.width, setting.width, device=setting.device),
            "bias": torch.zeros(setting.width, device=setting.device),
        }
        super().__init__(config.layers, config.lr, parameters, {})
        self._slope = compiled_on(setting.device, slope)
        self._normed_ND: Tensor | None = None
        self._taught: Taught | None = None

    def rewind(self) -> None:
        super().rewind()
        self._normed_ND = self._taught = None

    @torch.no_grad()
    def score(self, seen: Seen | None, micro: MicroBatch, generator: torch.Generator) -> Scored:
        assert seen is not None
        self._normed_ND = seen.final_ND
        read = Seen(seen.hidden_ND, self._read(seen.final_ND), seen.head_VD)
        return own_scores(self.name, read, micro, self.reference, generator, self.scope)

    @torch.no_grad()
    def watch(self, stream: Stream, index_K: Tensor) -> None:
        """Copies the rows that are to teach: nothing else is held through the model's backward pass."""
        assert self._normed_ND is not None, "watch without a score"
        taught = min(self._most, len(index_K))
        at = torch.arange(taught, device=index_K.device) * len(index_K) // taught
        index = index_K.index_select(0, at)
        final = stream.hidden_RD.index_select(0, index if stream.index_R is None else at)
        self._taught = Taught(at, self._normed_ND.index_select(0, index), final, stream.head_VD.detach())
        self._normed_ND = None

    @torch.no_grad()
    def learn(self, micro: MicroBatch, index_K: Tensor, nll_K: Tensor) -> None:
        """One update towards what the model makes of the taught slots; those without a label weigh nothing."""
        assert self._taught is not None, "learn without a forward"
        at, normed, final, head = self._taught
        self._taught = None
        teaches = teaching(micro, index_K.index_select(0, at), nll_K.index_select(0, at)).unsqueeze(1)
        # A row that teaches nothing may hold what is no number, and that times 0 is none either.
        with torch.enable_grad():
            read = self._read(normed.masked_fill(~teaches, 0.0))
        logits = ((read[part] @ head.mT, final[part] @ head.mT) for part in chunks(read, head))
        gradient = torch.cat([self._slope(*pair) @ head for pair in logits])
        self.update(read, torch.where(teaches, gradient, 0.0) / teaches.sum().clamp_min(1))

    def _read(self, normed_RD: Tensor) -> Tensor:
        """What the head is to read, in the dtype of what the norm made."""
        turn, shift = (parameter.to(normed_RD.dtype) for parameter in self._parameters.values())
        width = len(shift)
        return normed_RD + (normed_RD @ turn.mT / width + shift / math.sqrt(width))


def slope(read_RV: Tensor, final_RV: Tensor) -> Tensor:
    """dKL(p || q) / d logits of q, from the logits of q and p: q - p."""
    return (read_RV.float().softmax(-1) - final_RV.float().softmax(-1)).to(read_RV.dtype)


def _init(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
