"""Runs a trial again from its folder alone, and says whether the two agree.

A run folder holds the trial (run.json), what the clock said to every step (progress.f64) and what came of it. The
replay has the same parts, seeds and rows, and a clock that says the same again, so on a CPU every bit has to be the
same: losses, norms and decisions of every recorded step, the validations, the marks of the data order and the totals.
So it has on a GPU of the same name, if the run had `execution.deterministic`. On other GPUs, after memory ran out, of
several workers (the replay has one), with a cache of activations, and of a run that went on in its midst on another
machine or with other versions, sums may be taken in another order; there the final validation loss has to lie as close
as the race's seeds lie: within the half width of their 95 % t interval, or within `TOLERANCE` of it where fewer than
two seeds ended.

Tasks of an evaluation are left out: how many questions they get through depends on the seconds they have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from analysis.frames import read_rows, surviving_rows
from analysis.measures import mean_interval
from cggr_ray.clock import ReplayClock, ReplayOverError
from cggr_ray.codec import read_json
from cggr_ray.data.dataset import is_prepared, prepare
from cggr_ray.environment import fingerprint
from cggr_ray.loop import run_race
from cggr_ray.progress import read_progress
from cggr_ray.race import RaceSpec, Trial
from cggr_ray.recipe import Recipe
from cggr_ray.saying import Say
from cggr_ray.schema import (
    DATA_FOLDER,
    DATA_WAIT_SECONDS,
    FRACTION,
    KIND,
    METRICS_FILE,
    ORDER_HASH,
    ORDER_ROWS,
    PROGRESS_FILE,
    RACE_FILE,
    ROUTER_KEPT_FRACTION,
    RUN_FILE,
    SAMPLES_PER_SEC,
    STEP,
    STEP_SECONDS,
    SUMMARY_FILE,
    TOKENS_PER_SEC,
    TRAIN_SECONDS,
    VAL_LOSS,
    WALL_SECONDS,
)
from cggr_ray.telemetry.tracker import Row

# Relative, of the final validation loss; for a run on a GPU without two seeds beside it.
TOLERANCE = 0.01
# Differences that are named; the others are counted.
NAMED = 5
# What depends on how fast a machine is, and on how far ahead the loader has read.
OF_THE_MACHINE = (
    *(TRAIN_SECONDS, WALL_SECONDS, STEP_SECONDS, DATA_WAIT_SECONDS, TOKENS_PER_SEC, SAMPLES_PER_SEC),
    *(ORDER_ROWS, ORDER_HASH),
)
TOTALS = ("status", "steps", "tokens_seen", "labelled_tokens", "best_val_loss", VAL_LOSS)
# What a replay needs of run.json and of summary.json.
OF_A_TRIAL = ("trial_id", "seed", "values", "parts", "spec", "micro_rows", "model", "device", "versions")
OF_AN_END = ("steps", "train_seconds", "out_of_memory", "order")

Rows = dict[tuple[str, int], Row]


@dataclass(frozen=True)
class Recorded:
    """What a run folder says. `rows` by kind and step; `began`: train seconds at the beginning of every step."""

    folder: Path
    run: Row
    summary: Row
    began: list[float]
    rows: Rows

    @property
    def spec(self) -> RaceSpec:
        return RaceSpec.from_plain(self.run["spec"])

    @property
    def race_folder(self) -> Path | None:
        """The race that the run stands in, if it does."""
        above = self.folder.resolve().parents
        return above[1] if len(above) > 1 and (above[1] / RACE_FILE).is_file() else None

    @property
    def is_exact(self) -> bool:
        """Whether the same arithmetic is there again: on a CPU, or by deterministic algorithms; on one device and with
        the same versions all along, in the micro-batches that the trial asks for, by one worker, and with nothing
        computed before."""
        execution = self.recipe.execution
        repeats = self.run["device"]["type"] == "cpu" or execution.deterministic
        whole = not self.run.get("earlier") and not self.summary["out_of_memory"]
        return repeats and whole and self.spec.workers == 1 and execution.activation_cache is None

    def is_of_another_gpu(self, here: Row) -> bool:
        """Whether it ran on a GPU of another name than `here`, whose kernels may sum in another order."""
        return self.run["device"]["type"] == "cuda" and self.run["device"]["name"] != here["name"]

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_plain(self.run["parts"])

    def check_device(self) -> None:
        """Raises ValueError where it ran on a GPU and there is none."""
        device = self.run["device"]
        if device["type"] == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"{str(self.folder)!r} was run on {device['name']!r}, and no GPU is visible; "
                             "accepted: a machine with a GPU")  # fmt: skip

    def trial(self, out: Path, data_folder: Path) -> Trial:
        """The same trial in another folder. Milestones stand where they fell: at the beginning of a step."""
        spec, run = self.spec, self.run
        fell = sorted(step for kind, step in self.rows if kind == "milestone" and step < len(self.began))
        spec = replace(
            spec,
            workers=1,
            micro_rows=run["micro_rows"],
            milestones=tuple(self.began[step] / spec.budget_seconds for step in fell),
            device=run["device"]["type"],
            save_model=False,
            save_heads=False,
            wandb="off",
            tensorboard=False,
            evaluation=None,
        )
        where = str(out.resolve()), str(data_folder.resolve())
        return Trial(run["trial_id"], self.recipe, run["seed"], spec, *where, run["values"])


@dataclass(frozen=True)
class Verdict:
    """Whether the replay agrees, and by what measure, in words."""

    agrees: bool
    lines: tuple[str, ...]


def read_recorded(folder: Path) -> Recorded:
    """Reads a run folder.

    Raises:
        ValueError: it holds no run, one that has not ended, one that did not keep what a replay needs, or one that
            went on with the weights of another.
    """
    run, summary = _object(folder / RUN_FILE, *OF_A_TRIAL), _object(folder / SUMMARY_FILE, *OF_AN_END)
    check_own(folder)
    began = read_progress(folder / PROGRESS_FILE)
    if len(began) != summary["steps"]:
        raise ValueError(
            f"{folder / PROGRESS_FILE} has {len(began)} steps; accepted: the {summary['steps']} of the run"
        )
    return Recorded(folder, run, summary, began, read_by_step(folder))


def check_own(folder: Path) -> None:
    """Raises ValueError where a run went on with the weights of another, which its folder does not hold."""
    for row in reversed(surviving_rows(read_rows(folder / METRICS_FILE))[0]):
        if row[KIND] == "adopted":
            raise ValueError(f"{str(folder)!r} went on at step {row[STEP]} with the weights of {row['donor']!r}; "
                             "accepted: a run that trained all of its steps")  # fmt: skip


def reproduce(folder: Path, out: Path, say: Say) -> Verdict:
    """Runs the trial of a run folder again, into `out`, and compares.

    Raises:
        ValueError: the folder lacks something, `out` is not empty, or the run's device is not there.
    """
    recorded = read_recorded(folder)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{str(out)!r} is not empty; accepted: a new or empty folder")
    spec = recorded.spec
    recorded.check_device()
    there = folder.resolve().parent.parent / DATA_FOLDER
    data = there if is_prepared(spec.data, there) else out / DATA_FOLDER
    prepare(spec.data, data, say)
    for line in changes(recorded.run["versions"], fingerprint()):
        say(line)
    clock = ReplayClock(recorded.began, recorded.summary["train_seconds"])
    threads = torch.get_num_threads()
    # Sums of a CPU are split among its threads.
    torch.set_num_threads(int(recorded.run["device"].get("threads", threads)))
    over = ""
    try:
        run_race(recorded.trial(out, data), replay=clock)
    except ReplayOverError as error:
        over = str(error)
    finally:
        torch.set_num_threads(threads)
    for line in changes(recorded.run["model"], _object(out / RUN_FILE)["model"]):
        say(f"model {line}")
    if over:
        return Verdict(False, (f"does not agree: {over}, this one goes on",))
    again = _object(out / SUMMARY_FILE)
    if recorded.is_exact and not recorded.is_of_another_gpu(_object(out / RUN_FILE)["device"]):
        return compare(recorded, again, read_by_step(out))
    return compare_loosely(recorded, again)


def compare(recorded: Recorded, summary: Row, rows: Rows) -> Verdict:
    """Bit for bit: every recorded row, the marks of the data order, the totals."""
    again = averaged(rows, steps_of_rows(recorded.folder))
    found = [*_different_rows(recorded.rows, again), *_different("summary", recorded.summary, summary, TOTALS)]
    marks = recorded.summary["order"]
    found += _different("order of the data", marks, summary["order"], marks.keys() & summary["order"].keys())
    steps, milestones = (sum(kind == k for kind, _ in recorded.rows) for k in ("step", "milestone"))
    compared = f"{steps} rows of {recorded.summary['steps']} steps, {milestones} validations, order, totals"
    if not found:
        return Verdict(True, (f"agrees bit for bit: {compared}",))
    more = [f"and {len(found) - NAMED} more"] if len(found) > NAMED else []
    return Verdict(False, (f"does not agree: {len(found)} differences in {compared}", *found[:NAMED], *more))


def compare_loosely(recorded: Recorded, summary: Row) -> Verdict:
    """The final validation loss, within what the race's seeds or `TOLERANCE` allow."""
    before, after = recorded.summary[VAL_LOSS], summary[VAL_LOSS]
    if before is None or after is None:
        said = f"final {VAL_LOSS} {before} recorded, {after} again; none is a loss that is not finite"
        return Verdict(before == after, (said,))
    losses = seed_losses(recorded)
    if len(losses) > 1:
        allowed, why = mean_interval(losses)[1], f"half width of the 95 % interval over {len(losses)} seeds"
    else:
        allowed, why = TOLERANCE * before, f"{TOLERANCE:.0%} of the loss, as fewer than two seeds ended"
    agrees = abs(after - before) <= allowed
    said = f"final {VAL_LOSS} {before:.5f} recorded, {after:.5f} again; accepted: a difference of {allowed:.5f}, {why}"
    return Verdict(agrees, (f"{'agrees' if agrees else 'does not agree'}: {said}",))


def seed_losses(recorded: Recorded) -> list[float]:
    """Final validation losses of the finished runs of the recipe in the run's race; empty without a race."""
    found = []
    for path in recorded.race_folder.glob(f"runs/*/{SUMMARY_FILE}") if recorded.race_folder else ():
        summary = read_json(path)
        if summary["recipe"] == recorded.run["recipe"] and summary["status"] == "finished":
            found.append(float(summary[VAL_LOSS]))
    return found


def read_by_step(folder: Path) -> Rows:
    """Surviving step rows and milestones of a run's metrics.jsonl by kind and step."""
    rows, _ = surviving_rows(read_rows(folder / METRICS_FILE))
    return {(row[KIND], row[STEP]): row for row in rows if row[KIND] in ("step", "milestone")}


def steps_of_rows(folder: Path) -> dict[int, range]:
    """By the step of a run's row, the steps that it is of: those since the row before, or since the run went on."""
    found, last = dict[int, range](), 0
    for row in read_rows(folder / METRICS_FILE):
        if row[KIND] == "step":
            found[row[STEP]] = range(last + 1, row[STEP] + 1)
        if row[KIND] in ("step", "resumed"):
            last = row[STEP]
    return found


def averaged(rows: Rows, steps: Mapping[int, range]) -> Rows:
    """The rows of a replay, which has one a step, with the mean of what a recorded row has the mean of."""
    found = dict(rows)
    for last, own in steps.items():
        kept = [rows["step", step][ROUTER_KEPT_FRACTION] for step in own if ("step", step) in rows]
        if len(kept) == len(own):
            found["step", last] = rows["step", last] | {ROUTER_KEPT_FRACTION: fmean(kept)}
    return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What is another than the run had."""
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            yield f"{name}: {before[name]} then, {now[name]} now"


def _different_rows(before: Rows, after: Rows) -> Iterator[str]:
    for (kind, step), row in sorted(before.items()):
        # A milestone's fraction was read when it was due, which is just before the next step begins.
        left_out = {*OF_THE_MACHINE, *((FRACTION,) if kind == "milestone" else ())}
        names = [n for n in row if n not in left_out and not n.startswith(("system/", "eval/"))]
        yield from _different(f"{kind} {step}", row, after.get((kind, step), {}), names)


def _different(where: str, before: Row, after: Row, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        if name not in after or before[name] != after[name]:
            yield f"{where}: {name} {before[name]} recorded, {after.get(name)} again"


def _object(path: Path, *keys: str) -> Row:
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist; accepted: the folder of a run that has ended")
    return read_json(path, *keys)
