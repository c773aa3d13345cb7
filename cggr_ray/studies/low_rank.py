"""`study low-rank`: can two thin products stand in for a trained matrix, and at which rank do they start to pay?

Methods are `factors`' closed forms, and `loss_aware`: factors of `svd`, trained for some steps of AdamW on calibration
rows with cross-entropy + KL(full model || replaced model). Its weights are not modules of their own: W' = left right is
written into the model, and the gradient G of W' gives those of the factors, G right^T and left^T G.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cggr_ray.data.batch import IGNORE, MicroBatch
from cggr_ray.saying import Say
from cggr_ray.studies.conclusions import conclusions
from cggr_ray.studies.factors import ClosedForm, Factors, break_even_rank, data_aware, plus_diag, rank_of, svd
from cggr_ray.studies.moments import MomentsOf
from cggr_ray.studies.result import Panel, Result
from cggr_ray.studies.timing import Prepare, interleaved, settled
from cggr_ray.studies.trained import (
    KINDS,
    NOTES,
    Matrix,
    Replaced,
    Trained,
    TrainedSettings,
    check_names,
    put,
)

ALL = "all"
LEARNING_RATE = 1e-3

# A layer's (out, in), rank, whether there is a diagonal; rank 0 is the matrix itself.
Product = tuple[tuple[int, int], int, bool]
Refine = Callable[[Trained, "Settings", Sequence[Matrix], list[Factors]], list[Factors]]


class Method(NamedTuple):
    start: ClosedForm
    refine: Refine


@dataclass(frozen=True)
class Settings(TrainedSettings):
    """`fractions` of the full rank min(O, I); `kinds` are replaced one at a time, and `all` together; `steps` of
    `loss_aware` with `micro_rows` each."""

    fractions: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    methods: tuple[str, ...] = ("svd", "data_aware", "plus_diag", "loss_aware")
    kinds: tuple[str, ...] = (*KINDS, ALL)
    steps: int = 50

    def __post_init__(self) -> None:
        check_names("methods", self.methods, tuple(METHODS))
        check_names("kinds", self.kinds, (*KINDS, ALL))
        if self.steps < 0:
            raise ValueError(f"steps = {self.steps}; accepted: 0 or more")
        super().__post_init__()


def chosen(trained: Trained, settings: Settings) -> list[Matrix]:
    """Those that some row replaces."""
    return [matrix for matrix in trained.matrices if ALL in settings.kinds or matrix.kind in settings.kinds]


def unchanged(_: Trained, __: Settings, ___: Sequence[Matrix], factors: list[Factors]) -> list[Factors]:
    return factors


def study(settings: Settings, device: torch.device, say: Say) -> Result:
    """Every method at every rank, for each kind of matrix and for all of them."""
    trained = Trained(settings, device)
    calibration, heldout = trained.moments(trained.calibration), trained.moments(trained.heldout)
    times = measured(trained, settings, device)
    rows = []
    for name in settings.methods:
        start = settled(device)
        found = closed_form(METHODS[name].start, trained, settings, calibration)
        closed_seconds = settled(device) - start
        for number, fraction in enumerate(settings.fractions):
            for kind in settings.kinds:
                start = settled(device)
                matrices = [matrix for matrix in trained.matrices if kind in (ALL, matrix.kind)]
                factors = [found[matrix][number] for matrix in matrices]
                factors = METHODS[name].refine(trained, settings, matrices, factors)
                seconds = closed_seconds + settled(device) - start
                quality = trained.quality(heldout, matrices, [f.dense_OI() for f in factors])
                layer = [(shape_of(m), f) for m, f in zip(matrices, factors, strict=True) if m.layer == 0]
                cost = cost_of(layer, settings.tokens, times)
                rows.append(Replaced(name, kind, fraction, **quality, **cost, fit_seconds=seconds))
                say(rows[-1].line())
    notes = (*NOTES, "break_even: the rank at which two products cost as many flops as one, of matrices of one shape")
    concluded = conclusions(rows, trained.full_loss, widest_of(rows))
    return Result("low-rank", rows, panels(rows), notes, trained.facts(), concluded)


@torch.no_grad()
def closed_form(
    method: ClosedForm, trained: Trained, settings: Settings, moments: MomentsOf
) -> Mapping[Matrix, list[Factors]]:
    """Factors of every chosen matrix at every fraction: found in float64, kept in float32."""
    found = {}
    for matrix in chosen(trained, settings):
        weight = matrix.weight_OI.detach().double()
        ranks = [rank_of(fraction, *weight.shape) for fraction in settings.fractions]
        found[matrix] = [_single(f) for f in method(weight, moments[matrix.reads].gram_II, ranks)]
    return found


def _single(f: Factors) -> Factors:
    return Factors(f.left_OR.float(), f.right_RI.float(), None if f.diagonal_I is None else f.diagonal_I.float())


def cost_of(
    layer: Sequence[tuple[tuple[int, int], Factors]], tokens: int, times: Mapping[Product, float]
) -> dict[str, Any]:
    """The columns of a row that say what one layer's matrices and their factors cost, from shapes and factors."""
    shapes, ranks = {shape for shape, _ in layer}, {f.left_OR.shape[1] for _, f in layer}
    return {
        "kept": ranks.pop() if len(ranks) == 1 else None,
        "break_even": break_even_rank(*shapes.pop()) if len(shapes) == 1 else None,
        "ms_full": sum(times[shape, 0, False] for shape, _ in layer),
        "ms": sum(times[shape, f.left_OR.shape[1], f.diagonal_I is not None] for shape, f in layer),
        "flops_full": sum(2 * tokens * shape[0] * shape[1] for shape, _ in layer),
        "flops": sum(product_flops(tokens, f) for _, f in layer),
    }


def product_flops(tokens: int, f: Factors) -> int:
    """2 N r (O + I), and 2 N I for a diagonal."""
    diagonal = 0 if f.diagonal_I is None else len(f.diagonal_I)
    return 2 * tokens * (f.left_OR.numel() + f.right_RI.numel() + diagonal)


def shape_of(matrix: Matrix) -> tuple[int, int]:
    return matrix.linear.out_features, matrix.linear.in_features


@torch.no_grad()
def measured(trained: Trained, settings: Settings, device: torch.device) -> Mapping[Product, float]:
    """Median milliseconds of every product that the rows need, those of one shape in the same rounds."""
    found: dict[Product, float] = {}
    dtype = trained.adapter.head_VD.dtype
    for shape in sorted({shape_of(matrix) for matrix in chosen(trained, settings)}):
        ranks = sorted({rank_of(fraction, *shape) for fraction in settings.fractions})
        variants = [(0, False), *((r, d) for r in ranks for d in {False, shape[0] == shape[1]})]
        x_NI = torch.randn(settings.tokens, shape[1], device=device, dtype=dtype)
        calls = {(shape, *variant): product_call(x_NI, shape, *variant) for variant in variants}
        found |= {key: q.median for key, q in interleaved(calls, settings.rounds, device).items()}
    return found


def product_call(x_NI: Tensor, shape: tuple[int, int], rank: int, diagonal: bool) -> Prepare:
    """x W^T for rank 0, else both products of the factors, and a multiplication by the diagonal where there is one."""

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=x_NI.device, dtype=x_NI.dtype)

    if rank == 0:
        weight_OI = random(*shape)
        return lambda: lambda: F.linear(x_NI, weight_OI)
    left_OR, right_RI, diagonal_I = random(shape[0], rank), random(rank, shape[1]), random(shape[1])
    if diagonal:
        return lambda: lambda: F.linear(F.linear(x_NI, right_RI), left_OR).addcmul_(x_NI, diagonal_I)
    return lambda: lambda: F.linear(F.linear(x_NI, right_RI), left_OR)


def trained_factors(
    trained: Trained, settings: Settings, matrices: Sequence[Matrix], factors: list[Factors]
) -> list[Factors]:
    """The factors after `steps` of AdamW, learning rate falling to 0; calibration micro-batches in turn."""
    teachers = [teacher_hidden(trained, micro) for micro in trained.calibration]
    pairs = [(f.left_OR.clone(), f.right_RI.clone()) for f in factors]
    optimizer = torch.optim.AdamW([x for pair in pairs for x in pair], lr=LEARNING_RATE, weight_decay=0.0)
    batches = islice(cycle(zip(trained.calibration, teachers, strict=True)), settings.steps)
    with trained.replaced(matrices, [left @ right for left, right in pairs]):
        for step, (micro, teacher_RD) in enumerate(batches):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / settings.steps)
            distillation_loss(trained, micro, teacher_RD).backward()
            for matrix, (left, right) in zip(matrices, pairs, strict=True):
                assert matrix.weight_OI.grad is not None
                left.grad, right.grad = factor_gradients(left, right, matrix.weight_OI.grad.float())
            trained.adapter.model.zero_grad(set_to_none=True)
            optimizer.step()
            put(matrices, [left @ right for left, right in pairs])
    return [Factors(left, right) for left, right in pairs]


def factor_gradients(left_OR: Tensor, right_RI: Tensor, gradient_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Of left and right, from the gradient of their product."""
    return gradient_OI @ right_RI.mT, left_OR.mT @ gradient_OI


@torch.no_grad()
def teacher_hidden(trained: Trained, micro: MicroBatch) -> Tensor:
    """What the full model hands to the head, which no method replaces."""
    return trained.adapter.forward(micro).hidden_RD


def distillation_loss(trained: Trained, micro: MicroBatch, teacher_RD: Tensor) -> Tensor:
    """Cross-entropy + KL(full || replaced), both in nats a labelled position."""
    stream = trained.adapter.forward(micro)
    labels_N = micro.labels_BT.flatten()
    labelled_N = labels_N != IGNORE
    log_q = (stream.hidden_RD[labelled_N] @ stream.head_VD.mT).float().log_softmax(-1)
    log_p = (teacher_RD[labelled_N] @ stream.head_VD.mT).float().log_softmax(-1)
    return F.nll_loss(log_q, labels_N[labelled_N]) + F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


METHODS: Mapping[str, Method] = {
    "svd": Method(svd, unchanged),
    "data_aware": Method(data_aware, unchanged),
    "plus_diag": Method(plus_diag, unchanged),
    "loss_aware": Method(svd, trained_factors),
}


def widest_of(rows: Sequence[Replaced]) -> str:
    """The kind of which the most matrices are replaced, or the first."""
    return ALL if any(row.kind == ALL for row in rows) else rows[0].kind


def panels(rows: Sequence[Replaced]) -> list[Panel]:
    """Loss and output error by method where the most matrices are replaced, and time by kind."""
    widest = widest_of(rows)
    by_method = {row.method: [r for r in rows if r.method == row.method and r.kind == widest] for row in rows}
    by_kind = {row.kind: [r for r in rows if r.kind == row.kind and r.method == rows[0].method] for row in rows}
    loss = {name: [(r.fraction, r.loss_change) for r in found] for name, found in by_method.items()}
    error = {name: [(r.fraction, r.output_error) for r in found] for name, found in by_method.items()}
    speed = {k: [(r.fraction, r.ms / r.ms_full) for r in found if r.ms and r.ms_full] for k, found in by_kind.items()}
    return [
        Panel(f"held-out loss, {widest} replaced", "rank / full rank", "loss change (nats/token)", loss, log_y=True),
        Panel(f"output error, {widest}", "rank / full rank", "relative error", error),
        Panel("forward of both products", "rank / full rank", "ms / ms of the full product", speed),
    ]
