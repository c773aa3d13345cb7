"""Calibration: for every arm of a race the largest micro-batch that fits, found by trying, before the clock starts.

A few real steps a try (`fits`), each in a fresh process: what the peaks before let expect, until it is known what fits
and what does not; the baseline's rows first. What is found is tried again, for longer and as often as asked, with
generation where the race has an evaluation, the first time with all that a run writes; if that fails, a smaller size
is, unless the smallest fails too. Every try leaves a part of the memory free, the head-room.

Sizes divide the rows of a step, so that all micro-batches of a step are alike. With `scale_batch` an arm's step grows
to its micro-batch where this is the larger; a control that takes a part of a step's rows takes it of the baseline's
grown step. A step of several micro-batches keeps float32 sums of gradients beside.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
import torch

from cggr_ray.batches import ArmBatch, Calibrated, RowsPart, can_be_run
from cggr_ray.calibrated import device_of, fingerprint
from cggr_ray.codec import Plain, read_json
from cggr_ray.environment import versions
from cggr_ray.files import write_whole
from cggr_ray.fits import Answer, total_mib
from cggr_ray.footprint import activation_bytes
from cggr_ray.largest import largest
from cggr_ray.paths import arm_name
from cggr_ray.race import RaceSpec, Trial
from cggr_ray.saying import Say
from cggr_ray.telemetry.gpu import MIB, device_info
from cggr_ray.telemetry.tracker import Row
from cggr_ray.warmup import STEPS_PER_GRAPH

# The trial of a try, what it may use, whether it verifies, and whether it writes what a run leaves on the disk.
Ask = Callable[[Trial, float, bool, bool], Answer]

# How much smaller the next try is where what was found fails for longer.
STEP_BACK = 0.1
# Rows of a micro-batch at most, where memory sets no limit.
MOST_ROWS = 4096


@dataclass(frozen=True)
class Settings(Plain):
    """`head_room` is the part of the memory that stays free, `memory_mib` what there is (None: all of a GPU's).

    What is found is verified by `starts` fresh processes of `verify_steps` steps each.
    """

    head_room: float = 0.05
    memory_mib: float | None = None
    verify_steps: int = 10
    starts: int = 1
    scale_batch: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.head_room < 1:
            raise ValueError(f"head_room = {self.head_room}; accepted: a fraction of the memory in [0, 1)")
        if self.memory_mib is not None and not 0 < self.memory_mib < float("inf"):
            raise ValueError(f"memory_mib = {self.memory_mib}; accepted: a positive number of MiB")
        if self.verify_steps < 1 or self.starts < 1:
            raise ValueError(f"verify_steps = {self.verify_steps}, starts = {self.starts}; accepted: at least 1")

    def limit_mib(self, device: torch.device) -> float:
        """What a try may use.

        Raises:
            ValueError: a CPU without a limit, whose memory nobody wants to see filled.
        """
        if device.type == "cuda":
            return (1 - self.head_room) * min(total_mib(device), self.memory_mib or float("inf"))
        if self.memory_mib is None:
            raise ValueError(
                "calibration on the CPU without a limit; accepted: --memory-mib, the MiB a process may have"
            )
        return (1 - self.head_room) * self.memory_mib


def sizes_of(part: RowsPart, global_rows: int, grows: bool) -> list[int]:
    """The micro-batches that an arm can be run with, ascending: divisors of its step, and larger ones where it grows.

    An arm that takes fewer rows than the race is a control: its step does not grow.
    """
    rows = part.rows_per_step(global_rows)
    found = [size for size in range(1, rows + 1) if rows % size == 0 and can_be_run(part, size, rows)]
    if grows and rows == global_rows:
        found += [size for size in range(rows + 1, MOST_ROWS + 1) if can_be_run(part, size, size)]
    return found


class Calibration:
    """The calibration of one race. Every try is kept in a file as soon as it is known, and is not made again.

    Args:
        spec: its recipes are the arms. file: calibration.json. data_folder: of the prepared data.
    Raises:
        ValueError: a CPU without a limit.
    """

    def __init__(
        self,
        spec: RaceSpec,
        settings: Settings,
        device: torch.device,
        file: Path,
        data_folder: Path,
        ask: Ask,
        say: Say,
    ) -> None:
        self.spec, self.settings, self._file, self._data_folder = spec, settings, file, data_folder
        self._ask, self._say = ask, say
        self._limit, self._device = settings.limit_mib(device), device_info(device)
        known = read_json(file) if file.is_file() else {}
        self.arms: dict[str, Row] = known.get("arms", {})
        self._begun: list[Row] = []

    def arm(self, name: str, again: bool) -> Row:
        """An arm's entry: `micro_rows` (None where not one size fits), `global_rows`, and every try."""
        asked = self._asked(name)
        before = self.arms.get(name, {})
        if again or before.get("asked") != asked:
            before = {}
        if "micro_rows" in before:
            self._say(f"{arm_name(name, self.spec.recipes)}: known from {self._file}")
            return before
        # What an older version tried does not say what a batch took.
        self._begun = [tried for tried in before.get("tries", ()) if "batch_mib" in tried]
        entry: Row = {"asked": asked, "tries": []}
        self.arms[name] = entry
        global_rows = self._global_rows(name)
        sizes = sizes_of(self.spec.recipe(name).rows, global_rows, self.settings.scale_batch)
        of_a_row = activation_bytes(self.spec, 1) / MIB
        first = self.arms[self.spec.recipes[0]].get("micro_rows") or 1
        found = largest(sizes, lambda size: self._try(entry, name, size), self._limit, of_a_row, first)
        if found is not None and not self._verified(entry, name, found):
            found = self._stepped_back(entry, name, sizes, found)
        # Nothing larger was of use: memory has set no limit.
        entry |= {"micro_rows": found, "global_rows": max(global_rows, found or 0), "limited": found != sizes[-1]}
        self._write()
        return entry

    def _global_rows(self, name: str) -> int:
        """Rows a step before an arm's own step grows."""
        spec = self.spec
        own, part = spec.rows_of(name)[0], spec.recipe(name).rows
        told = name in spec.batches and spec.batches[name].global_rows is not None
        if told or name == spec.recipes[0] or part.rows_per_step(own) == own:
            return own
        return int(self.arms[spec.recipes[0]]["global_rows"])

    def _asked(self, name: str) -> Row:
        """All that an arm's answer depends on."""
        spec = self.spec
        whole = {
            "recipe": spec.recipe(name).to_plain(),
            "race": trial_spec(spec, name, self._global_rows(name), spec.rows_of(name)[1], 1, verifies=True).to_plain(),
            "settings": self.settings.to_plain(),
            "device": self._device,
            "versions": versions(),
        }
        plain: Row = json.loads(json.dumps(whole))
        return plain

    def _verified(self, entry: Row, name: str, size: int) -> bool:
        # Writing takes the same memory every time, and of a large model more seconds than the steps.
        starts = range(self.settings.starts)
        return all(self._try(entry, name, size, verifies=True, writes=n == 0) is not None for n in starts)

    def _stepped_back(self, entry: Row, name: str, sizes: Sequence[int], failed: int) -> int | None:
        """A smaller size that is verified. None where the smallest fails too: not the rows take the memory."""
        for behind, size in enumerate(steps_back(sizes, failed)):
            if behind == 1 and self._try(entry, name, sizes[0], verifies=True, writes=True) is None:
                return None
            if self._verified(entry, name, size):
                return size
        return None

    def _try(self, entry: Row, name: str, size: int, verifies: bool = False, writes: bool = False) -> float | None:
        """MiB that a batch took, None where the rows do not fit."""
        began, global_rows = time.perf_counter(), max(self._global_rows(name), size)
        steps = self.settings.verify_steps if verifies else STEPS_PER_GRAPH
        row = {"micro_rows": size, "global_rows": global_rows, "steps": steps, "verifies": verifies, "writes": writes}
        known = next((tried for tried in self._begun if row.items() <= tried.items()), None)
        if known is not None:
            # Of a calibration that was interrupted. It has as many starts of a size as were made.
            self._begun.remove(known)
            entry["tries"].append(known)
            return float(known["batch_mib"]) if known["fits"] else None
        race = trial_spec(self.spec, name, global_rows, size, steps, verifies)
        called = arm_name(name, self.spec.recipes)
        trial = Trial(f"{called}, {size} rows", self.spec.recipe(name), race.seeds[0], race, "", "")
        trial = trial.placed(self._file.parent, self._data_folder)
        answer = self._ask(trial, self._limit, verifies, writes)
        seconds = time.perf_counter() - began
        entry["tries"].append(row | answer.to_plain() | {"limit_mib": self._limit, "seconds": seconds})
        self._write()
        verdict = "fit" if answer.fits else "do not fit"
        said = f"{called}: {size} rows {verdict}, {steps} steps"
        self._say(f"{said}, {answer.peak_mib:,.0f} MiB of {self._limit:,.0f}")
        return answer.batch_mib if answer.fits else None

    def _write(self) -> None:
        write_whole(self._file, json.dumps({"name": self.spec.name, "arms": self.arms}, indent=1))


def steps_back(sizes: Sequence[int], failed: int) -> list[int]:
    """What of ascending sizes is verified after one that failed: each a tenth smaller than the one before, or more."""
    below: list[int] = []
    while smaller := [size for size in sizes if size <= (1 - STEP_BACK) * failed]:
        failed = smaller[-1]
        below.append(failed)
    return below


def trial_spec(spec: RaceSpec, name: str, global_rows: int, micro_rows: int, steps: int, verifies: bool) -> RaceSpec:
    """The race of one try: so many steps over the whole schedule, without a milestone on the way."""
    return replace(
        spec,
        recipes=(name,),
        seeds=spec.seeds[:1],
        arms={},
        batches={},
        batch_lr_rule="none",
        calibration=None,
        global_rows=global_rows,
        micro_rows=micro_rows,
        budget_seconds=float(steps),
        step_seconds=1.0,
        milestones=(),
        checkpoint_every_seconds=2.0 * steps,
        wandb="off",
        tensorboard=False,
        tuning=None,
        evaluation=spec.evaluation if verifies else None,
    )


def calibrated(spec: RaceSpec, arms: Mapping[str, Row]) -> RaceSpec:
    """The race with what was found, for arms of which something was, and what it was found for."""
    found = {name: ArmBatch(arm["global_rows"], arm["micro_rows"]) for name, arm in arms.items() if arm["micro_rows"]}
    changed = replace(spec, batches={**spec.batches, **found})
    device = device_of(next(iter(arms.values()))["asked"]["device"])
    return replace(changed, calibration=Calibrated(device, {name: fingerprint(changed, name) for name in found}))


def notes(settings: Settings, arms: Mapping[str, Row]) -> list[str]:
    """A line for each arm: what fits, beside what."""
    lines = [
        f"Calibrated: micro-batches that leave {settings.head_room:.0%} of the memory free, verified by "
        f"{settings.starts} x {settings.verify_steps} steps."
    ]
    for name, arm in ((arm_name(recipe, arms), arm) for recipe, arm in arms.items()):
        if arm["micro_rows"] is None:
            lines.append(f"{name}: no micro-batch fits")
            continue
        last = arm["tries"][-1]
        limited = "" if arm["limited"] else ", and no more were of use"
        lines.append(f"{name}: {arm['micro_rows']} rows fit{limited}, {last['peak_mib']:,.0f} MiB at the peak of "
                     f"{last['limit_mib']:,.0f}, {arm['global_rows']} rows a step")  # fmt: skip
    return lines


def write_calibrated(spec: RaceSpec, lines: Sequence[str], arms: Mapping[str, Row], path: Path) -> None:
    """The race's file with the batches of its arms; what was found stands above as comments."""
    head = "".join(f"# {line}\n" for line in lines)
    plain: dict[str, Any] = calibrated(spec, arms).to_plain()
    path.write_text(f"{head}\n{tomli_w.dumps(plain)}", encoding="utf-8")
