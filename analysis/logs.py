"""`training_log_<recipe>.json` and CSV: a race's run folders in a form that needs none of this code to be read.

A log holds one recipe: what the race was, and every run of it with its description and summary (`run`), its logged
steps and its milestones. Names and units are those of `cggr_ray.schema`, listed in the log itself; a name of the form
`<metric>/<part>` is the metric on one source, task or layer. It is strict JSON: null stands for what was not measured
in that row, or is not a finite number. The CSV files hold the same frames as the Parquet files.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.frames import Race, is_compound, objects
from analysis.sweeps import Sweep
from cggr_ray.schema import METRICS, STEP

FORMAT = "cggr-ray training log 1"


def write_logs(race: Race, folder: Path | str) -> list[Path]:
    """Writes one log a recipe, the baseline first. Raises ValueError where two recipes would share a file."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = {target / log_file(recipe): recipe for recipe in race.recipes}
    if len(paths) < len(race.recipes):
        raise ValueError(f"recipes {race.recipes}; accepted: names that differ in more than / and -")
    for path, recipe in paths.items():
        text = json.dumps(training_log(race, recipe), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        path.write_text(text + "\n", encoding="utf-8")
    return list(paths)


def write_tables(found: Race | Sweep, folder: Path | str) -> list[Path]:
    """Writes the frames of a race or a sweep as Parquet and CSV; nested values are JSON text in both."""
    paths = found.to_parquet(folder)
    for path in list(paths):
        paths.append(path.with_suffix(".csv"))
        pd.read_parquet(path).to_csv(paths[-1], index=False)
    return paths


def log_file(recipe: str) -> str:
    """The name of a recipe's log: as in trial ids, a dash for a slash."""
    return f"training_log_{recipe.replace('/', '-')}.json"


def training_log(race: Race, recipe: str) -> dict[str, Any]:
    """The log of one recipe as plain JSON values."""
    runs = race.runs[race.runs["recipe"] == recipe].dropna(axis="columns", how="all")
    return {
        "format": FORMAT,
        "recipe": recipe,
        "baseline": race.baseline,
        "metrics": {metric.name: {"unit": metric.unit, "meaning": metric.meaning} for metric in METRICS},
        "race": _strict(dict(race.spec)),
        "runs": [
            {
                "run": run,
                "steps": _rows(race.steps, run["trial_id"]),
                "milestones": _rows(race.milestones, run["trial_id"]),
            }
            for run in _records(runs.sort_values("seed", kind="stable"))
        ],
    }


def _rows(frame: pd.DataFrame, trial: str) -> list[dict[str, Any]]:
    """The rows of one run in order, with the columns that it has measured at least once."""
    own = frame[frame["trial_id"] == trial].drop(columns=["trial_id", "recipe", "seed"])
    return _records(own.sort_values(STEP, kind="stable").dropna(axis="columns", how="all"))


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain values; a column of whole numbers with gaps holds whole numbers again."""
    nested = {name: objects(frame[name]) for name in frame.columns if is_compound(frame[name])}
    plain = frame.assign(**{name: pd.Series(values, frame.index, dtype=object) for name, values in nested.items()})
    records: list[dict[str, Any]] = _strict(plain.convert_dtypes(convert_string=False).to_dict("records"))
    return records


def _strict(value: Any) -> Any:
    """The value with null for every number that is not finite and every gap."""
    if isinstance(value, dict):
        return {str(key): _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    if value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value
