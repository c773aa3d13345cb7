"""Run folders to tidy DataFrames: one row a run, one row a logged step, one row a milestone.

Column names are those of `cggr_ray.schema` (`train_seconds` in s, `val/loss` in nats/token, ...); steps and milestones
carry `trial_id`, `recipe` and `seed` in front. In the runs frame the small dicts of run.json and summary.json become
columns of their own: `ledger/train`, `values/<hyperparameter>`, `model/name`, `device/name`, `versions/torch`.

Only JSON is read, so a race can be analysed on a machine that has neither the trainer nor a GPU.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pyarrow as pa

from analysis.columns import of_kind, parse, surviving, to_frame
from cggr_ray.schema import (
    EVAL,
    EVALUATION_FOLDER,
    FAILURE_FILE,
    FRACTION,
    KIND,
    LATE_FILE,
    LEDGERS,
    METRICS_FILE,
    OVERLAP_FILE,
    RACE_FILE,
    RUN_FILE,
    RUNS_FOLDER,
    STEP,
    SUMMARY_FILE,
    TOKENS_SEEN,
    TRAIN_SECONDS,
    WALL_SECONDS,
    RowKind,
)

IDENTITY = ("trial_id", "recipe", "seed")
POSITION = (STEP, FRACTION, TRAIN_SECONDS, WALL_SECONDS, TOKENS_SEEN)
# Statuses of runs without a summary: one may still end well, the other failed every time it was started.
UNFINISHED, FAILED = "unfinished", "failed"
KINDS: tuple[str, ...] = get_args(RowKind)
# The marks of the data order stay one object: their keys are row counts, not names.
WHOLE = ("order", "spec")
READERS = 2

Row = dict[str, Any]


@dataclass(frozen=True)
class Race:
    """The frames of one folder; `spec` is race.json, or what runs say of it, and, as `overlap`, overlap.json."""

    folder: Path
    spec: Mapping[str, Any]
    runs: pd.DataFrame
    steps: pd.DataFrame
    milestones: pd.DataFrame

    @property
    def baseline(self) -> str:
        """The recipe that the others are measured against: as the race says, else `baseline`, else the first.

        Raises ValueError if the race names one that has no run.
        """
        present = [str(name) for name in self.runs["recipe"].unique()]
        named = self.spec.get("baseline")
        if named is None:
            return "baseline" if "baseline" in present else present[0]
        if named not in present:
            raise ValueError(f"baseline = {named!r} has no run; accepted: a recipe with runs: {', '.join(present)}")
        return str(named)

    @property
    def recipes(self) -> list[str]:
        """Recipes that have a run, the baseline first, then in the order of the race."""
        present = [str(name) for name in self.runs["recipe"].unique()]
        order = [self.baseline, *self.spec.get("recipes", ()), *present]
        return [name for name in dict.fromkeys(order) if name in present]

    @property
    def stepped(self) -> bool:
        """Its clock advanced by a fixed time a step: its seconds are those of no machine."""
        return self.spec.get("spec", {}).get("step_seconds") is not None

    def to_parquet(self, folder: Path | str) -> list[Path]:
        """Writes runs, steps and milestones as Parquet; histograms and other nested values as JSON text."""
        return to_parquet({"runs": self.runs, "steps": self.steps, "milestones": self.milestones}, folder)


def read_race(folder: Path | str) -> Race:
    """Reads a race folder, one run folder, or any folder with `runs/` below it.

    Raises ValueError if there is no run, if two runs share a trial id, or if a file is not what the schema says.
    """
    root = Path(folder)
    run_folders = _run_folders(root)
    # Arrow parses without the interpreter's lock: two files at a time, in order.
    with ThreadPoolExecutor(READERS) as readers:
        found = list(readers.map(read_run, run_folders))
    frame = frame_of([run for run, _, _ in found], IDENTITY)
    if frame["trial_id"].duplicated().any():
        twice = sorted(set(frame.loc[frame["trial_id"].duplicated(), "trial_id"]))
        raise ValueError(f"{root}: trial ids {twice} occur twice; accepted: the folder of one race")
    race_file = root / RACE_FILE
    spec = read_object(race_file) if race_file.is_file() else _told_by([run for run, _, _ in found])
    if (root / OVERLAP_FILE).is_file():
        spec |= {"overlap": read_object(root / OVERLAP_FILE)}
    columns = (*IDENTITY, *POSITION)
    identified = [({key: run[key] for key in IDENTITY}, steps, milestones) for run, steps, milestones in found]
    del found
    milestones = to_frame([(run, own) for run, _, own in identified], columns)
    return Race(root, spec, frame, to_frame([(run, own) for run, own, _ in identified], columns), milestones)


def _told_by(runs: list[Row]) -> Row:
    """What runs say of a race whose own file is not beside them, by the first that says anything, the trial `told_by`;
    its rows a step are then everybody's."""
    present = {run["recipe"] for run in runs}
    for run in runs:
        if isinstance(spec := run.get("spec"), dict):
            recipes = list(spec.get("recipes", ()))
            first = {"baseline": recipes[0]} if recipes and recipes[0] in present else {}
            return {"recipes": recipes, "spec": spec, "told_by": run["trial_id"]} | first
    return {}


def read_run(folder: Path) -> tuple[Row, pa.Table, pa.Table]:
    """The row of one run for the runs frame, and its surviving steps and milestones in the order written."""
    summary_file, failure_file = folder / SUMMARY_FILE, folder / FAILURE_FILE
    failure = read_object(failure_file) | {"status": FAILED} if failure_file.is_file() else {"status": UNFINISHED}
    # A run may have failed before it could say what it was.
    run_file = folder / RUN_FILE if (folder / RUN_FILE).is_file() else failure_file
    described = read_object(run_file)
    for key in IDENTITY:
        if key not in described:
            raise ValueError(f"{run_file}: no {key!r}; accepted: an object with {', '.join(IDENTITY)}")
    summary: Row = read_object(summary_file) if summary_file.is_file() else failure
    ledgers = {f"ledger/{name}": summary.get("ledgers", {}).get(name) for name in LEDGERS}
    rest = {key: value for key, value in summary.items() if key != "ledgers"}
    metrics_file = folder / METRICS_FILE
    table, resumes = surviving(_read_columns(metrics_file) if metrics_file.is_file() else parse(b"", KINDS))
    steps, milestones = of_kind(table, "step"), of_kind(table, "milestone")
    late_file = folder / EVALUATION_FOLDER / LATE_FILE
    if late_file.is_file():
        rows, late = [row | {KIND: "milestone"} for row in milestones.to_pylist()], read_rows(late_file)
        milestones = pa.Table.from_pylist(with_late(rows, late)).drop_columns([KIND])
        # A summary has the answers of the last milestone.
        (end,) = with_late([rest | {KIND: "milestone", STEP: rest.get("steps")}], late)
        rest = {key: value for key, value in end.items() if key not in (KIND, STEP)}
    return _columns(described) | _columns(rest) | ledgers | {"resumes": resumes}, steps, milestones


def _read_columns(path: Path) -> pa.Table:
    """The rows of a metrics file as columns; the same rows, warnings and errors as `read_rows`."""
    try:
        return parse(whole_lines(path), KINDS)
    except pa.ArrowInvalid as error:
        read_rows(path)
        raise ValueError(f"{path}: {error}; accepted: values of one type under every key") from error


def whole_lines(path: Path) -> bytes:
    """What a file of JSON lines holds, without the trace of a kill in mid-write.

    That is a last line without its newline that does not parse; it is left out with a warning.
    """
    content = path.read_bytes()
    whole, newline, last = content.rpartition(b"\n")
    try:
        json.loads(last or b"null")
    except ValueError:
        warnings.warn(f"{path}:{content.count(newline) + 1}: torn last line left out", stacklevel=2)
        return whole + newline
    return content


def read_rows(path: Path) -> list[Row]:
    """All rows of a metrics file, as written, but for a torn last line.

    A broken line anywhere else means lost data and raises ValueError.
    """
    rows = []
    for number, line in enumerate(whole_lines(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}); accepted: one object a line") from error
        if not isinstance(row, dict) or row.get(KIND) not in KINDS or not isinstance(row.get(STEP), int):
            text = line[:80].decode(errors="replace")
            raise ValueError(
                f"{path}:{number}: {text}; accepted: an object with {KIND} in {KINDS} and an integer {STEP}"
            )
        rows.append(row)
    return rows


def surviving_rows(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """Steps and milestones that the final weights went through, and how often the run was resumed.

    A run that goes on from a checkpoint of step k computes the steps after k again; what it had logged for them
    before is about weights that no longer exist.
    """
    kept: list[Row] = []
    resumes = 0
    for row in rows:
        if row[KIND] == "resumed":
            kept = [earlier for earlier in kept if earlier[STEP] <= row[STEP]]
            resumes += 1
        else:
            kept.append(row)
    return kept, resumes


def with_late(rows: Iterable[Row], late: Iterable[Row]) -> list[Row]:
    """The rows of a run, its milestones with what was asked of their kept models later.

    The last evaluation of a task counts, with all of its measures. A late row of another step is about weights that the
    run did not go through, and is left out.
    """
    found = [dict(row) for row in rows]
    for new in late:
        scores = {key: value for key, value in new.items() if key.startswith(f"{EVAL}/")}
        tasks = {_task(key) for key in scores}
        for number, row in enumerate(found):
            if row[KIND] == "milestone" and row[STEP] == new[STEP]:
                found[number] = {key: value for key, value in row.items() if _task(key) not in tasks} | scores
    return found


def _task(name: str) -> str | None:
    """The task of a metric `eval/<task>/<measure>`."""
    parts = name.split("/")
    return parts[1] if parts[0] == EVAL and len(parts) > 1 else None


def _run_folders(root: Path) -> list[Path]:
    """Run folders at or below `root`; ValueError if there is none."""
    if (root / RUN_FILE).is_file():
        return [root]
    found = _below(root, f"{RUNS_FOLDER}/*") or _below(root, f"**/{RUNS_FOLDER}/*")
    if not found:
        raise ValueError(
            f"no runs in {root}; accepted: a run folder ({RUN_FILE}), or one with {RUNS_FOLDER}/<trial id>/ below it"
        )
    return found


def _below(root: Path, pattern: str) -> list[Path]:
    """Folders of that pattern that say what ran in them, or what failed there."""
    return sorted({path.parent for name in (RUN_FILE, FAILURE_FILE) for path in root.glob(f"{pattern}/{name}")})


def read_object(path: Path) -> Row:
    """The object of a JSON file. Raises ValueError if it holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); accepted: one object") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a {type(value).__name__}; accepted: one object")
    return value


def _columns(source: Mapping[str, Any]) -> Row:
    """One level of dicts as `key/name` columns."""
    columns: Row = {}
    for key, value in source.items():
        if isinstance(value, dict) and key not in WHOLE:
            columns |= {f"{key}/{name}": inner for name, inner in value.items()}
        else:
            columns[key] = value
    return columns


def frame_of(rows: list[Row], first: tuple[str, ...]) -> pd.DataFrame:
    """A frame whose columns begin with `first`; a column of numbers and nulls is numeric, null being NaN."""
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys((*first, *(key for row in rows for key in row)))))
    for name in frame.columns:
        column = frame[name]
        if column.dtype == object and all(_is_number(value) for value in column):
            frame[name] = pd.to_numeric(column)
    return frame


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def to_parquet(frames: Mapping[str, pd.DataFrame], folder: Path | str) -> list[Path]:
    """Writes each frame to `<name>.parquet`, nested values as JSON text."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, frame in frames.items():
        paths.append(target / f"{name}.parquet")
        _flat(frame).to_parquet(paths[-1], index=False)
    return paths


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with every column of one simple type, which is what Parquet can hold."""
    flat = frame.copy()
    for name in flat.columns:
        column = flat[name]
        if is_compound(column):
            texts = [None if value is None else _text(value) for value in objects(column)]
            flat[name] = pd.Series(texts, index=flat.index, dtype="str")
    return flat


def is_compound(column: pd.Series) -> bool:
    """Whether a column holds lists, objects or mixed values rather than one simple type."""
    return column.dtype == object or isinstance(column.dtype, pd.ArrowDtype)


def objects(column: pd.Series) -> list[Any]:
    """The values of such a column as Python has them, None where there is none."""
    if isinstance(column.dtype, pd.ArrowDtype):
        values: list[Any] = pa.array(column).to_pylist()
        return values
    return [None if not isinstance(value, list | dict) and pd.isna(value) else value for value in column]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
