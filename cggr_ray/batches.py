"""Rows of a step: how many an arm takes, in micro-batches of how many, and what that does to its learning rate.

An arm of B rows a step in a race of B_0 learns at

    lr (B / B_0)^p,   p = 1 (linear: arXiv:1706.02677), 1/2 (sqrt: arXiv:1404.5997), 0 (none)

Its warm-up is counted in tokens, so that it lasts as many tokens as everybody's, in fewer steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from cggr_ray.codec import Plain
from cggr_ray.recipe import Recipe

BatchLrRule = Literal["none", "linear", "sqrt"]
POWERS: dict[BatchLrRule, float] = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}


class RowsPart(Protocol):
    """What a recipe's `rows` say of a step."""

    def rows_per_step(self, global_rows: int) -> int: ...
    def check_rows(self, rows: int) -> None: ...


@dataclass(frozen=True)
class ArmBatch(Plain):
    """What an arm has of its own; what is left out is the race's."""

    global_rows: int | None = None
    micro_rows: int | None = None

    def within(self, global_rows: int, micro_rows: int) -> tuple[int, int]:
        """(global_rows, micro_rows) of the arm in a race with these. The race's micro-batch is cut to a smaller step.

        Raises:
            ValueError: not a row a micro-batch, or more than a step has.
        """
        rows = global_rows if self.global_rows is None else self.global_rows
        micro = min(micro_rows, rows) if self.micro_rows is None else self.micro_rows
        if rows < 1:
            raise ValueError(f"global_rows = {rows}; accepted: 1 or more")
        if not 1 <= micro <= rows:
            raise ValueError(f"micro_rows = {micro}; accepted: 1 to global_rows = {rows}")
        return rows, micro


@dataclass(frozen=True)
class Calibrated(Plain):
    """What the batches of a race were calibrated for: the device, and by arm a fingerprint, see `calibrated`."""

    device: dict[str, Any]
    arms: dict[str, str]

    def __post_init__(self) -> None:
        if not isinstance(self.device.get("name"), str):
            raise ValueError(
                f"calibration.device = {self.device}; accepted: what `cggr-ray calibrate` wrote, with a name"
            )


def with_scaled_rate(recipe: Recipe, rule: BatchLrRule, rows: int, race_rows: int) -> Recipe:
    """The recipe at the learning rate that the rule gives an arm of so many rows in a race of so many."""
    factor = (rows / race_rows) ** POWERS[rule]
    return replace(recipe, optimizer=replace(recipe.optimizer, lr_scale=recipe.optimizer.lr_scale * factor))


def check_micro_batches(part: RowsPart, micro_rows: int, step_rows: int) -> None:
    """Raises ValueError where a recipe cannot keep what it says of a micro-batch, or of the last, smaller one."""
    for rows in {min(micro_rows, step_rows), step_rows % micro_rows} - {0}:
        part.check_rows(rows)


def can_be_run(part: RowsPart, micro_rows: int, step_rows: int) -> bool:
    """Whether `check_micro_batches` has nothing against it."""
    try:
        check_micro_batches(part, micro_rows, step_rows)
    except ValueError:
        return False
    return True


def rows_of_worker(step_rows: int, workers: int) -> int:
    """Rows of a step that each worker trains.

    Raises:
        ValueError: they cannot all train as many.
    """
    if step_rows % workers:
        raise ValueError(f"{step_rows} rows a step with workers = {workers}; accepted: a multiple of the workers")
    return step_rows // workers


def check_workers(recipe: Recipe, workers: int) -> None:
    """Raises ValueError where a recipe has something that more than one worker cannot run."""
    if workers > 1 and recipe.optimizer.project_early:
        raise ValueError(f"project_early with workers = {workers}, which add up gradients before they project them; "
                         "accepted: workers = 1, or project_early = false")  # fmt: skip
    if workers > 1 and recipe.execution.activation_cache is not None:
        raise ValueError(f"activation_cache with workers = {workers}, each of which sees other rows in every epoch; "
                         "accepted: workers = 1, or no cache")  # fmt: skip


def smaller_sizes(part: RowsPart, micro_rows: int, step_rows: int) -> list[int]:
    """Micro-batches of half as many rows or fewer that a recipe can be run with, the largest first."""
    sizes = range(min(micro_rows, step_rows) // 2, 0, -1)
    return [rows for rows in sizes if can_be_run(part, rows, step_rows)]
