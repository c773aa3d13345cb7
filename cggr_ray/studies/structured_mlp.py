"""`study structured-mlp`: FFN channels dropped in blocks, as a smaller MLP that is dense again.

    f = act(x W_gate^T) * (x W_up^T), y = f W_down^T;  score of channel j: E|f_j| |w_down_j|, of a block: the mean

    drop      W' = W_down with zero columns for dropped channels
    refit     min over W' on the kept columns K of |F (W_down - W')^T|_F:  W'_K = W_down C_:K C_KK^-1, C = F^T F
    two_four  in every four neighbours of a row of W_down the two largest |w_ij| E|f_j| stay; an error, no speed

Zero columns of W_down equal dropping the channel from all three matrices, which is what is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cggr_ray.models.families import activation
from cggr_ray.models.presets import ModelSpec
from cggr_ray.saying import Say
from cggr_ray.studies.conclusions import conclusions
from cggr_ray.studies.factors import damped
from cggr_ray.studies.moments import MomentsOf
from cggr_ray.studies.result import Panel, Result
from cggr_ray.studies.timing import Prepare, interleaved, settled
from cggr_ray.studies.trained import (
    NOTES,
    Matrix,
    Replaced,
    Trained,
    TrainedSettings,
    check_names,
)

KIND = "mlp"


@dataclass(frozen=True)
class Settings(TrainedSettings):
    """`fractions` of the channels are kept, in whole blocks of `block`; `pattern` adds the 2:4 row."""

    fractions: tuple[float, ...] = (0.5, 0.625, 0.75, 0.875)
    methods: tuple[str, ...] = ("drop", "refit")
    block: int = 64
    pattern: bool = True

    def __post_init__(self) -> None:
        check_names("methods", self.methods, tuple(METHODS))
        if self.block < 1:
            raise ValueError(f"block = {self.block}; accepted: at least 1")
        super().__post_init__()
        inner = ModelSpec(folder=self.model).config().get_text_config().intermediate_size
        if self.block > inner:
            raise ValueError(f"block = {self.block}; accepted: at most the model's {inner} channels")
        if self.pattern and inner % 4:
            raise ValueError(f"pattern with {inner} channels; accepted: a multiple of 4, or no pattern")


def study(settings: Settings, device: torch.device, say: Say) -> Result:
    """Every method at every kept fraction, in all layers at once."""
    trained = Trained(settings, device)
    calibration, heldout = trained.moments(trained.calibration), trained.moments(trained.heldout)
    downs = [matrix for matrix in trained.matrices if matrix.kind == "down"]
    scores = {m: channel_scores(m.weight_OI, calibration[m.reads].mean_absolute_I) for m in downs}
    width, inner = downs[0].linear.out_features, downs[0].linear.in_features
    # Some fractions may come to the same blocks.
    numbers = list(dict.fromkeys(blocks_of(fraction, inner, settings.block) for fraction in settings.fractions))
    times = measured(trained, settings, numbers, scores[downs[0]], width, device)
    rows = []
    for number in numbers:
        kept = {m: kept_channels(scores[m], settings.block, number) for m in downs}
        channels = len(kept[downs[0]])
        cost: dict[str, Any] = {
            "kept": channels,
            "break_even": float(inner),
            "ms_full": times[inner],
            "ms": times[channels],
            "flops_full": mlp_flops(settings.tokens, width, inner),
            "flops": mlp_flops(settings.tokens, width, channels),
        }
        for name in settings.methods:
            start = settled(device)
            weights = [METHODS[name](m.weight_OI.detach(), calibration[m.reads].gram_II, kept[m]) for m in downs]
            seconds = settled(device) - start
            quality = trained.quality(heldout, downs, weights)
            rows.append(Replaced(name, KIND, channels / inner, **quality, **cost, fit_seconds=seconds))
            say(rows[-1].line())
    if settings.pattern:
        rows.append(pattern_row(trained, calibration, heldout, downs))
        say(rows[-1].line())
    notes = (
        *NOTES,
        "errors are those of W_down; times and flops are of the whole MLP, its three products and its activation",
        "kept: channels of a layer, in whole blocks; fraction: of all of them; break_even: all of them, since every "
        "dropped block saves flops",
    )
    facts, concluded = trained.facts() | {"channels": inner}, conclusions(rows, trained.full_loss, KIND)
    return Result("structured-mlp", rows, panels(rows), notes, facts, concluded)


def pattern_row(trained: Trained, calibration: MomentsOf, heldout: MomentsOf, downs: Sequence[Matrix]) -> Replaced:
    """2:4 sparsity of every W_down, without a time: no dense product is made smaller by it."""
    start = settled(trained.adapter.device)
    weights = [two_four(m.weight_OI.detach(), calibration[m.reads].mean_absolute_I) for m in downs]
    seconds = settled(trained.adapter.device) - start
    quality = trained.quality(heldout, downs, weights)
    return Replaced("two_four", "down", 0.5, **quality, fit_seconds=seconds)


def channel_scores(weight_OF: Tensor, mean_absolute_F: Tensor) -> Tensor:
    """E|f_j| |w_down_j|_2 of every channel, in float64."""
    return mean_absolute_F * weight_OF.double().norm(dim=0)


def blocks_of(fraction: float, channels: int, block: int) -> int:
    """The nearest number of blocks to a fraction of them, at least one."""
    return max(1, round(fraction * -(-channels // block)))


def kept_channels(scores_F: Tensor, block: int, number: int) -> Tensor:
    """Sorted channels of so many blocks, those with the largest mean score.

    The last block is shorter where `block` does not divide the channels.
    """
    means = torch.stack([part.mean() for part in scores_F.split(block)])
    best = means.topk(number).indices.sort().values
    channels = torch.arange(len(scores_F), device=scores_F.device).split(block)
    return torch.cat([channels[i] for i in best.tolist()])


def drop(weight_OF: Tensor, gram_FF: Tensor, kept_K: Tensor) -> Tensor:
    """W_down with zero columns for what is not kept."""
    cut = torch.zeros_like(weight_OF)
    cut[:, kept_K] = weight_OF[:, kept_K]
    return cut


def refit(weight_OF: Tensor, gram_FF: Tensor, kept_K: Tensor) -> Tensor:
    """Zero columns for what is not kept, the others by (damped) least squares on calibration activations."""
    gram = damped(gram_FF)
    wanted_OK = weight_OF.double() @ gram[:, kept_K]
    factor = torch.linalg.cholesky(gram[kept_K][:, kept_K])
    fitted = torch.zeros_like(weight_OF, dtype=gram.dtype)
    fitted[:, kept_K] = torch.cholesky_solve(wanted_OK.mT, factor).mT
    return fitted


def two_four(weight_OF: Tensor, mean_absolute_F: Tensor) -> Tensor:
    """The two entries with the largest |w_ij| E|f_j| of every four neighbours in a row; the others are 0."""
    scores = (weight_OF.abs() * mean_absolute_F).unflatten(1, (-1, 4))
    best = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2).indices, True)
    return weight_OF * best.flatten(1)


METHODS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"drop": drop, "refit": refit}


def mlp_flops(tokens: int, width: int, channels: int) -> int:
    """Three products, 2 a multiplication and addition; the elementwise part is not counted."""
    return 3 * 2 * tokens * width * channels


@torch.no_grad()
def measured(
    trained: Trained, settings: Settings, numbers: Sequence[int], scores_F: Tensor, width: int, device: torch.device
) -> Mapping[int, float]:
    """Median milliseconds of the forward of one MLP, by its channels: all of them, and those of so many blocks."""
    kept = {len(kept_channels(scores_F, settings.block, number)) for number in numbers}
    act = activation(trained.adapter.shapes[0].activation)
    x_ND = torch.randn(settings.tokens, width, device=device, dtype=trained.adapter.head_VD.dtype)
    calls = {channels: mlp_call(x_ND, channels, act) for channels in sorted({len(scores_F), *kept})}
    return {channels: q.median for channels, q in interleaved(calls, settings.rounds, device).items()}


def mlp_call(x_ND: Tensor, channels: int, act: Callable[[Tensor], Tensor]) -> Prepare:
    """act(x W_gate^T) * (x W_up^T) W_down^T with random weights."""
    width = x_ND.shape[1]
    gate_FD, up_FD = (torch.randn(channels, width, device=x_ND.device, dtype=x_ND.dtype) for _ in range(2))
    down_DF = torch.randn(width, channels, device=x_ND.device, dtype=x_ND.dtype)
    return lambda: lambda: F.linear(act(F.linear(x_ND, gate_FD)) * F.linear(x_ND, up_FD), down_DF)


def panels(rows: Sequence[Replaced]) -> list[Panel]:
    """Loss, output error and time against the kept fraction."""
    by_method = {row.method: [r for r in rows if r.method == row.method] for row in rows}
    loss = {name: [(r.fraction, r.loss_change) for r in found] for name, found in by_method.items()}
    error = {name: [(r.fraction, r.output_error) for r in found] for name, found in by_method.items()}
    speed = {KIND: [(r.fraction, r.ms / r.ms_full) for r in rows if r.method == rows[0].method and r.ms and r.ms_full]}
    return [
        Panel("held-out loss, all layers", "kept fraction", "loss change (nats/token)", loss, log_y=True),
        Panel("output error of W_down", "kept fraction", "relative error", error),
        Panel("forward of the MLP", "kept fraction", "ms / ms of the full MLP", speed),
    ]
