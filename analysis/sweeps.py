"""A sweep's folder as DataFrames: one row a trial, one row a validation that the scheduler saw.

Both come from sweep.jsonl alone. The steps and milestones of the trials, hundreds of rows each, are read from their run
folders when they are first asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.frames import UNFINISHED, Race, Row, frame_of, read_object, read_race, to_parquet, whole_lines
from cggr_ray.schema import (
    KIND,
    PEAK_MEMORY,
    RUN_FILE,
    RUNS_FOLDER,
    SWEEP_EVENTS_FILE,
    SWEEP_FILE,
    TOKENS_SEEN,
    TRAIN_SECONDS,
    VAL_LOSS,
)

VALUES = "values/"
# Where a key may hold a part or nothing.
NO_PART, A_PART = "none", "set"
MEASURED = (VAL_LOSS, TRAIN_SECONDS, TOKENS_SEEN, PEAK_MEMORY)
TRIAL_COLUMNS = ("trial_id", "status", *MEASURED, "message", "started_at", "ended_at", "gpus_per_trial", "exploits")
RESULT_COLUMNS = ("trial_id", TRAIN_SECONDS, TOKENS_SEEN, VAL_LOSS, "at")


@dataclass(frozen=True, eq=False)
class Sweep:
    """The frames of one sweep; `spec` is sweep.json.

    `trials` has a row a trial in the order drawn: how it ended (`unfinished` where it did not), its last validation,
    Unix seconds of its begin and end, the part of a GPU it had, how often it went on with the weights of another, and
    its hyperparameters as `values/<key>`. A part that was drawn whole is spread over columns `values/<key>.<field>`.
    `resumed_at` are Unix seconds at which the sweep was taken up again.
    """

    folder: Path
    spec: Mapping[str, Any]
    trials: pd.DataFrame
    results: pd.DataFrame
    resumed_at: tuple[float, ...] = ()

    @cached_property
    def race(self) -> Race:
        """The run folders of the trials, as `read_race` gives them. Raises ValueError where no trial has one yet."""
        return read_race(self.folder)

    @property
    def steps(self) -> pd.DataFrame:
        """All logged steps of all trials."""
        return self.race.steps

    @property
    def milestones(self) -> pd.DataFrame:
        """All milestones of all trials."""
        return self.race.milestones

    @property
    def hyperparameters(self) -> list[str]:
        """Those that differ between trials, without `values/`."""
        names = [str(name) for name in self.trials.columns if str(name).startswith(VALUES)]
        varied = [name for name in names if self.trials[name].nunique() > 1]
        return [name.removeprefix(VALUES) for name in varied]

    @property
    def budget_seconds(self) -> float | None:
        """Train seconds of a trial that is not stopped; None where sweep.json does not say."""
        return self.spec.get("spec", {}).get("budget_seconds")

    def to_parquet(self, folder: Path | str) -> list[Path]:
        """Writes trials and results as Parquet."""
        return to_parquet({"trials": self.trials, "results": self.results}, folder)


def is_sweep(folder: Path | str) -> bool:
    return (Path(folder) / SWEEP_FILE).is_file()


def read_sweep(folder: Path | str) -> Sweep:
    """Reads a sweep's folder, also while the sweep runs; before its first trial both frames are empty.

    Raises:
        ValueError: no sweep there, or a broken line before the last.
    """
    root = Path(folder)
    if not is_sweep(root):
        raise ValueError(f"no sweep in {root}; accepted: a folder with {SWEEP_FILE}")
    events_file = root / SWEEP_EVENTS_FILE
    events = read_events(events_file) if events_file.is_file() else []
    trials: dict[str, Row] = {}
    results = []
    for event in events:
        if event[KIND] == "trial":
            trials[event["trial_id"]] = {"status": UNFINISHED, "started_at": event["at"], "exploits": 0}
        own = trials.get(event.get("trial_id", ""))
        if own is None:
            continue
        own |= _said(event, own)
        if event[KIND] == "result":
            results.append({name: event.get(name) for name in RESULT_COLUMNS})
    rows = [
        {"trial_id": trial, "gpus_per_trial": _gpus_per_trial(root, trial)}
        | {name: value for name, value in row.items() if name != "values"}
        | flat_values(row["values"])
        for trial, row in trials.items()
    ]
    frames = _trials_frame(rows), frame_of(results, RESULT_COLUMNS)
    sessions = [float(event["at"]) for event in events if event[KIND] == "session"]
    return Sweep(root, read_object(root / SWEEP_FILE), *frames, tuple(sessions[1:]))


def read_events(path: Path) -> list[Row]:
    """The events of sweep.jsonl in their order, but for a torn last line.

    Raises ValueError where another line is no object with a kind.
    """
    events = []
    for number, line in enumerate(whole_lines(path).splitlines(), start=1):
        try:
            event = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}); accepted: one object a line") from error
        if not isinstance(event, dict) or KIND not in event:
            raise ValueError(f"{path}:{number}: {line[:80].decode(errors='replace')}; accepted: an object with {KIND}")
        events.append(event)
    return events


def flat_values(values: Mapping[str, Any]) -> Row:
    """The columns of one draw: numbers as they are, all else as text, the fields of a part one by one; a part before
    the keys in it, as a recipe takes them."""
    columns: Row = {}
    for key, value in sorted(values.items(), key=lambda item: item[0].count(".")):
        if isinstance(value, Mapping):
            columns |= flat_values({f"{key}.{field}": inner for field, inner in value.items()})
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            columns[VALUES + key] = value
        else:
            columns[VALUES + key] = NO_PART if value is None else json.dumps(value)
    return columns


def _said(event: Row, known: Row) -> Row:
    """What an event says of its trial; what is missing in its end was said by its last result."""
    if event[KIND] == "trial":
        return {"values": event["values"]}
    if event[KIND] == "exploit":
        return {"values": event.get("values", known["values"]), "exploits": known["exploits"] + 1}
    measured = {name: event[name] for name in MEASURED if event.get(name) is not None}
    if event[KIND] == "end":
        return measured | {"status": event["status"], "ended_at": event["at"], "message": event.get("message") or ""}
    return measured if event[KIND] == "result" else {}


def _gpus_per_trial(root: Path, trial: str) -> float:
    run_file = root / RUNS_FOLDER / trial / RUN_FILE
    return float(read_object(run_file).get("gpus_per_trial", 1.0)) if run_file.is_file() else 1.0


def _trials_frame(rows: list[Row]) -> pd.DataFrame:
    """A key that is no part in one trial and a whole part in another has a column of its own, `set` in the latter."""
    frame = frame_of(rows, TRIAL_COLUMNS)
    # Text where no trial has ended yet, too.
    frame["message"] = frame["message"].astype(object)
    names = [str(name) for name in frame.columns if str(name).startswith(VALUES)]
    for name in names:
        fields = [other for other in names if other.startswith(f"{name}.")]
        if fields and (frame[name] == NO_PART).any():
            frame[name] = frame[name].mask(frame[name].isna() & frame[fields].notna().any(axis=1), A_PART)
    return frame
