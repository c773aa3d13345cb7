"""`study attention-backends`: which attention is fastest here, for which mask and shape, and how exact it is.

Cells and backends are those of `studies.attention`. Every backend is tried once on a cell and compared with float32
arithmetic; those that ran are timed in the same rounds, forward and backward apart. Building a mask is not timed. The
backward of attention is five products where the forward is two, so it counts 2.5 times its flops.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cggr_ray.saying import Say
from cggr_ray.studies.attention import (
    BACKENDS,
    DOCUMENTS_A_ROW,
    MASKS,
    WINDOW_SHARE,
    Attention,
    AttentionShape,
    Cell,
    Inputs,
    exact,
)
from cggr_ray.studies.result import Panel, Result
from cggr_ray.studies.timing import Prepare, Quartiles, interleaved, peak_mib
from cggr_ray.studies.trained import check_names

SHAPES = {
    "cuda": ("8x1024x12x4x64", "4x4096x16x16x64", "4x4096x32x8x128", "1x16384x32x8x128"),
    "cpu": ("2x128x4x4x32", "1x256x4x2x32"),
}
BACKWARD_FACTOR = 2.5
# What torch and the packages raise for what they cannot run.
UNSUPPORTED = (RuntimeError, ValueError, NotImplementedError, ImportError)
REASON_CHARACTERS = 200


@dataclass(frozen=True)
class Settings:
    """No `shapes` means those of the device in `SHAPES`."""

    shapes: tuple[str, ...] = ()
    masks: tuple[str, ...] = MASKS
    backends: tuple[str, ...] = ("math", "efficient", "flash", "cudnn", "flex", "varlen", "flash_attn")
    rounds: int = 20

    def __post_init__(self) -> None:
        check_names("masks", self.masks, MASKS)
        check_names("backends", self.backends, tuple(BACKENDS))
        for text in self.shapes:
            AttentionShape.parse(text)
        if self.rounds < 1:
            raise ValueError(f"rounds = {self.rounds}; accepted: at least 1")


@dataclass(frozen=True)
class Row:
    """A backend on a cell; None where it cannot run, with torch's words in `unavailable`."""

    shape: str
    mask: str
    backend: str
    forward_ms: float | None = None
    forward_ms_low: float | None = None
    forward_ms_high: float | None = None
    forward_tflops: float | None = None
    backward_ms: float | None = None
    backward_ms_low: float | None = None
    backward_ms_high: float | None = None
    backward_tflops: float | None = None
    peak_mib: float | None = None
    error: float | None = None
    gradient_error: float | None = None
    unavailable: str | None = None

    def timed(self) -> str:
        return f"{self.backend} not" if self.forward_ms is None else f"{self.backend} {self.forward_ms:.3g} ms"


NOTES = (
    "ms: median; low and high: quartiles of interleaved rounds, the backward without its forward",
    "tflops: flops of the visible pairs over the median; the backward counts 2.5 times the forward",
    "peak_mib: of a forward and backward, or of the forward alone where there is no backward, above the inputs",
    "error, gradient_error: largest absolute difference to float32 arithmetic on the same inputs; of q, k, v together",
)


def study(settings: Settings, device: torch.device, say: Say) -> Result:
    """Every backend on every mask and shape, those of a cell in the same rounds."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = [AttentionShape.parse(text) for text in settings.shapes or SHAPES[device.type]]
    rows: list[Row] = []
    for shape in shapes:
        for mask in settings.masks:
            found = cell_rows(Cell.of(shape, mask, device), settings.backends, settings.rounds, dtype)
            rows += found
            say(f"{shape} {mask}: {', '.join(map(Row.timed, found))}")
    facts = {"dtype": str(dtype).removeprefix("torch."), "documents_a_row": DOCUMENTS_A_ROW}
    facts["window"] = f"positions // {WINDOW_SHARE}"
    return Result("attention-backends", rows, panels(rows), NOTES, facts, conclusions(rows))


def cell_rows(cell: Cell, backends: Sequence[str], rounds: int, dtype: torch.dtype) -> list[Row]:
    """Tries every backend once, compares it with `exact`, then times those that ran."""
    inputs, gradient = cell.inputs(dtype)
    wanted = exact(cell, inputs, gradient)
    trials = {name: try_backend(BACKENDS[name], cell, inputs, gradient, wanted) for name in backends}
    forwards = {name: trial.forward for name, trial in trials.items() if trial.forward is not None}
    backwards = {name: trial.backward for name, trial in trials.items() if trial.backward is not None}
    work = cell.forward_flops
    forward = interleaved(forwards, rounds, cell.first_BT.device)
    backward = interleaved(backwards, rounds, cell.first_BT.device)
    return [
        Row(
            str(cell.shape),
            cell.mask,
            name,
            **trial.columns,
            **_time_columns("forward", forward.get(name), work),
            **_time_columns("backward", backward.get(name), work * BACKWARD_FACTOR),
        )
        for name, trial in trials.items()
    ]


@dataclass(frozen=True)
class Trial:
    """What to time of a backend, and the columns that one call of it gives."""

    forward: Prepare | None
    backward: Prepare | None
    columns: dict[str, Any]


def try_backend(
    make: Callable[[Cell], Attention], cell: Cell, inputs: Inputs, gradient: Tensor, wanted: Sequence[Tensor]
) -> Trial:
    """One forward and backward; a part that torch cannot run is left out, with torch's reason."""
    device = gradient.device
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            attention = make(cell)
            out = attention(*inputs)
        except UNSUPPORTED as error:
            return Trial(None, None, {"unavailable": reason(error, warned)})
    columns: dict[str, Any] = {"error": largest([out], wanted[:1])}

    def forward() -> Callable[[], object]:
        return lambda: attention(*inputs)

    def backward() -> Callable[[], object]:
        fresh = attention(*inputs)
        return lambda: torch.autograd.grad(fresh, inputs, gradient)

    try:
        gradients = torch.autograd.grad(out, inputs, gradient)
    except UNSUPPORTED as error:
        del out
        columns |= {"unavailable": f"backward: {reason(error, [])}", "peak_mib": peak_mib(forward(), device)}
        return Trial(forward, None, columns)
    columns["gradient_error"] = largest(gradients, wanted[1:])
    del out, gradients
    columns["peak_mib"] = peak_mib(lambda: backward()(), device)
    return Trial(forward, backward, columns)


def reason(error: BaseException, warned: Sequence[warnings.WarningMessage]) -> str:
    """An error in one line, after what torch warned of before it: there it says why it passes over a backend.

    Warnings about the backends that `sdpa_kernel` switches off are left out.
    """
    said = [*(str(warning.message).split(" (Triggered internally")[0] for warning in warned), str(error)]
    lines = dict.fromkeys(text.strip().splitlines()[0] for text in said if text.strip())
    told = [line for line in lines if "runtime disabled" not in line and not line.endswith("because:")]
    return f"{type(error).__name__}: {'; '.join(told)}"[:REASON_CHARACTERS]


def largest(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest absolute difference; nan where there is one."""
    return float(torch.stack([(x.detach().float() - y).abs().max() for x, y in zip(found, wanted, strict=True)]).max())


def _time_columns(part: str, quartiles: Quartiles | None, flops: float) -> dict[str, Any]:
    if quartiles is None:
        return {}
    times: dict[str, Any] = {"ms": quartiles.median, "ms_low": quartiles.low, "ms_high": quartiles.high}
    times["tflops"] = flops / quartiles.median / 1e9
    return {f"{part}_{name}": value for name, value in times.items()}


def conclusions(rows: Sequence[Row]) -> list[str]:
    """A line a cell: forward and backward of the fastest backend, and the others' over it."""
    said = []
    for cell in dict.fromkeys((row.shape, row.mask) for row in rows):
        both = {r.backend: r.forward_ms + r.backward_ms for r in rows
                if (r.shape, r.mask) == cell and r.forward_ms is not None and r.backward_ms is not None}  # fmt: skip
        order = sorted(both, key=lambda name: both[name])
        others = "".join(f", {name} {both[name] / both[order[0]]:.2f}x" for name in order[1:])
        fastest = f"{order[0]} is fastest, {both[order[0]]:.4g} ms{others}" if order else "no backend runs both ways"
        said.append(f"{' '.join(cell)}, forward and backward: {fastest}")
    return said


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Forward and backward rates of every backend over the cells."""
    backends = dict.fromkeys(row.backend for row in rows)
    forward = {b: [(_cell(r), r.forward_tflops) for r in rows if r.backend == b and r.forward_tflops] for b in backends}
    backward = {
        b: [(_cell(r), r.backward_tflops) for r in rows if r.backend == b and r.backward_tflops] for b in backends
    }
    parts = {"forward": forward, "backward": backward}
    return [
        Panel(part, "", "TFLOP/s of visible pairs", {name: points for name, points in series.items() if points})
        for part, series in parts.items()
    ]


def _cell(row: Row) -> str:
    return f"{row.shape}, {row.mask}"
