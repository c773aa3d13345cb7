"""The `rows` parts: which sequences enter the forward. Neutral: `AllRows`.

Shapes: B rows of T positions, N = B T, K kept rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from cggr_ray.data.batch import MicroBatch
from cggr_ray.kernels.select.op import compact
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress
from cggr_ray.routing.curriculum import Curriculum, ratio_levels, snap
from cggr_ray.routing.draws import ROWS, seed_of
from cggr_ray.routing.scorers import own_scores
from cggr_ray.routing.scores import HeadScore
from cggr_ray.sparse.plan import seen_after

# How far keep x rows may be from a whole number: a third is written with a few digits.
WHOLE = 1e-3


class RowPicker(Protocol):
    """The running object of a `rows` part."""

    def levels(self) -> tuple[float, ...]: ...
    def ratio(self, progress: Progress) -> float: ...
    def pick(self, micro: MicroBatch, ratio: float, progress: Progress) -> MicroBatch: ...


@dataclass(frozen=True)
class AllRows:
    """The whole global batch, every step."""

    IS_PART: ClassVar[bool] = True

    def rows_per_step(self, global_rows: int) -> int:
        return global_rows

    def check_rows(self, rows: int) -> None:
        """Any micro-batch will do."""

    def build(self, seed: int, adapter: Adapter) -> RowPicker:
        return EveryRow()


@dataclass(frozen=True)
class FewerRows:
    """Control: full steps on fewer consecutive rows of the same stream.

    `fraction` is to be what a step of the routed arm costs against a full step, so that a step here costs the same: any
    selection has to beat simply taking smaller steps.
    """

    IS_PART: ClassVar[bool] = True

    fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction = {self.fraction}; accepted: a part of the global batch in (0, 1]")

    def rows_per_step(self, global_rows: int) -> int:
        return max(1, round(self.fraction * global_rows))

    def check_rows(self, rows: int) -> None:
        """Any micro-batch will do."""

    def build(self, seed: int, adapter: Adapter) -> RowPicker:
        return EveryRow()


@dataclass(frozen=True)
class HardestRows:
    """CGGRModel's sequence mode: of every micro-batch, the rows with the largest mean score of a truncated router.

    The kept rows get full training. Differs from upstream (git 1762989): labels are those of the scored positions, and
    the router is the model's own first `layers`, whatever the family.
    """

    IS_PART: ClassVar[bool] = True

    keep: float = 0.25
    score: HeadScore = "combined"
    layers: int = 4
    curriculum: Curriculum = Curriculum()

    def __post_init__(self) -> None:
        check_rows_keep(self.keep)
        if self.layers < 1:
            raise ValueError(f"layers = {self.layers}; accepted: at least 1")

    def rows_per_step(self, global_rows: int) -> int:
        return global_rows

    def needs_layers(self) -> int:
        return self.layers + 1

    def check_rows(self, rows: int) -> None:
        check_rows_of(self.keep, rows)

    def build(self, seed: int, adapter: Adapter) -> RowPicker:
        if self.layers >= len(adapter.layers):
            raise ValueError(f"layers = {self.layers} of a model with {len(adapter.layers)}; accepted: fewer")
        return HardPicker(self, adapter)


@dataclass(frozen=True)
class RandomRows:
    """Control of `HardestRows`: as many rows, chosen by chance, no router."""

    IS_PART: ClassVar[bool] = True

    keep: float = 0.25
    curriculum: Curriculum = Curriculum()

    def __post_init__(self) -> None:
        check_rows_keep(self.keep)

    def rows_per_step(self, global_rows: int) -> int:
        return global_rows

    def check_rows(self, rows: int) -> None:
        check_rows_of(self.keep, rows)

    def build(self, seed: int, adapter: Adapter) -> RowPicker:
        return ChancePicker(self.keep, self.curriculum, seed, adapter.device)


def check_rows_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep = {keep}; accepted: a ratio in (0, 1]")


def check_rows_of(keep: float, rows: int) -> None:
    """Refuses a micro-batch of which `keep` is no whole number of rows: it would train on more than the recipe says."""
    if abs(rows_kept(keep, rows) - keep * rows) > WHOLE:
        raise ValueError(f"keep = {keep} of a micro-batch of {rows} rows, which would keep {rows_kept(keep, rows)}; "
                         "accepted: keep x rows a whole number, by other micro_rows, global_rows or keep")  # fmt: skip


def rows_kept(ratio: float, rows: int) -> int:
    """ceil(ratio B), up to rounding errors; at least one."""
    return max(1, math.ceil(ratio * rows - 1e-9))


class EveryRow:
    """Nothing is left out."""

    def levels(self) -> tuple[float, ...]:
        return (1.0,)

    def ratio(self, progress: Progress) -> float:
        return 1.0

    def pick(self, micro: MicroBatch, ratio: float, progress: Progress) -> MicroBatch:
        return micro


class RatioPicker:
    """Rows by a key: ceil(ratio B) of them, in their order."""

    def __init__(self, keep: float, curriculum: Curriculum) -> None:
        self.keep, self.curriculum = keep, curriculum

    def levels(self) -> tuple[float, ...]:
        return ratio_levels(self.keep, False, self.curriculum.ramps, self.curriculum.full)

    def ratio(self, progress: Progress) -> float:
        return snap(self.curriculum.ratio(self.keep, progress), self.levels())

    def pick(self, micro: MicroBatch, ratio: float, progress: Progress) -> MicroBatch:
        rows = rows_kept(ratio, len(micro.tokens_BT))
        if rows == len(micro.tokens_BT):
            return micro
        return rows_of(micro, self.keys(micro, progress).topk(rows).indices.sort().values)

    def keys(self, micro: MicroBatch, progress: Progress) -> Tensor:
        raise NotImplementedError


class ChancePicker(RatioPicker):
    def __init__(self, keep: float, curriculum: Curriculum, seed: int, device: torch.device) -> None:
        super().__init__(keep, curriculum)
        self._seed, self._generator = seed, torch.Generator(device)

    def keys(self, micro: MicroBatch, progress: Progress) -> Tensor:
        generator = self._generator.manual_seed(seed_of(self._seed, ROWS, progress.step, micro.index))
        return torch.rand(len(micro.tokens_BT), generator=generator, device=micro.tokens_BT.device)


class HardPicker(RatioPicker):
    def __init__(self, config: HardestRows, adapter: Adapter) -> None:
        super().__init__(config.keep, config.curriculum)
        self.config, self.adapter = config, adapter

    @torch.no_grad()
    def keys(self, micro: MicroBatch, progress: Progress) -> Tensor:
        """Mean score of each row's labelled positions; a row without any comes last."""
        seen = seen_after(self.adapter, micro, self.config.layers)
        return row_means(own_scores(self.config.score, seen, micro).scores_BT, micro.labels_BT)


def row_means(scores_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean score of each row's labelled positions; a row without any comes last."""
    labelled = labels_BT >= 0
    total = torch.where(labelled, scores_BT, 0.0).sum(1)
    return torch.where(labelled.any(1), total / labelled.sum(1).clamp_min(1), -torch.inf)


def rows_of(micro: MicroBatch, rows_K: Tensor) -> MicroBatch:
    """A micro-batch of some rows, without asking the device how many documents they hold."""
    positions = micro.positions_BT.index_select(0, rows_K)
    starts = compact((positions == 0).view(1, -1), len(micro.document_starts), positions.numel())[0]
    return replace(
        micro,
        tokens_BT=micro.tokens_BT.index_select(0, rows_K),
        labels_BT=micro.labels_BT.index_select(0, rows_K),
        positions_BT=positions,
        position_ids_BT=micro.position_ids_BT.index_select(0, rows_K),
        document_starts=starts.int(),
        ids_BT=None,
    )
