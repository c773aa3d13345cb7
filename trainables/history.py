"""The memory of a sweep: its events in sweep.jsonl, and what they say of every trial. All that a resumed sweep knows.

An event is on disk before anything follows from it. One process writes; a second one is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cggr_ray.schema import (
    KIND,
    PEAK_MEMORY,
    SWEEP_EVENTS_FILE,
    TOKENS_SEEN,
    TRAIN_SECONDS,
    VAL_LOSS,
    Status,
    SweepEvent,
)
from cggr_ray.telemetry.jsonl import plain
from cggr_ray.telemetry.tracker import Row

RESULT = (TRAIN_SECONDS, TOKENS_SEEN, VAL_LOSS)


@dataclass
class Drawn:
    """What is known of one trial. `values` are those it runs with now; `end` is its last event, once there is one."""

    trial_id: str
    drawn: dict[str, Any]
    values: dict[str, Any]
    results: list[Row] = field(default_factory=list)
    exploits: set[int] = field(default_factory=set)
    """The generations of a population that it went into with the weights of another."""
    end: Row | None = None

    @property
    def number(self) -> int:
        return number_of(self.trial_id)

    @property
    def ended(self) -> bool:
        return self.end is not None

    @property
    def status(self) -> str | None:
        return str(self.end["status"]) if self.end else None

    @property
    def last(self) -> Row:
        """The last result, empty where there is none."""
        return self.results[-1] if self.results else {}


class History:
    """Use as a context manager: it holds the file.

    Raises:
        ValueError: another process runs this sweep, or an event lacks something.
    """

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        self.trials: dict[str, Drawn] = {}
        self.events: list[Row] = []
        self.generation = 0
        self._now = now
        path = folder / SWEEP_EVENTS_FILE
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{str(folder)!r} is written by a sweep that runs; accepted: one at a time") from None
        events, whole = read_events(path)
        self._file.truncate(whole)
        for number, event in enumerate(events, 1):
            try:
                self._take(event)
            except KeyError as error:
                raise ValueError(f"{path}:{number}: no {error}; accepted: events as a sweep writes them") from None

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def session(self) -> None:
        self._write("session")

    def drawn(self, values: Mapping[str, Any]) -> Drawn:
        """A new trial; its id is its number."""
        trial_id = f"t{len(self.trials):04d}"
        self._write("trial", trial_id=trial_id, values=values)
        return self.trials[trial_id]

    def result(self, trial_id: str, row: Mapping[str, Any]) -> None:
        self._write("result", trial_id=trial_id, **{name: row.get(name) for name in RESULT})

    def exploit(self, trial_id: str, donor: str, generation: int, values: Mapping[str, Any]) -> None:
        self._write("exploit", trial_id=trial_id, donor=donor, generation=generation, values=values)

    def begun(self, generation: int) -> None:
        """All exploits of a generation are done."""
        self._write("generation", generation=generation)

    def end(self, trial_id: str, status: Status, row: Mapping[str, Any], message: str = "") -> None:
        """Once a trial. A loss that is missing or not finite is that of the last result."""
        assert self.trials[trial_id].end is None, f"{trial_id} has ended"
        known = {name: plain(row.get(name)) for name in (*RESULT, PEAK_MEMORY)}
        last = self.trials[trial_id].last
        filled = {name: last.get(name) if value is None else value for name, value in known.items()}
        self._write("end", trial_id=trial_id, status=status, **filled, message=message)

    def wall_seconds(self) -> float:
        """From the begin of every session to its last event; of the one that runs, to now."""
        seconds, began, last = 0.0, None, 0.0
        for event in self.events:
            if event[KIND] == "session":
                seconds += last - began if began is not None else 0.0
                began = event["at"]
            last = event["at"]
        return seconds + (self._now() - began if began is not None else 0.0)

    def _write(self, kind: SweepEvent, **more: Any) -> None:
        line = json.dumps({KIND: kind, **plain(more), "at": self._now()}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._take(json.loads(line))

    def _take(self, event: Row) -> None:
        self.events.append(event)
        kind = event[KIND]
        if kind == "trial":
            self.trials[event["trial_id"]] = Drawn(event["trial_id"], event["values"], event["values"])
        elif kind == "result":
            self.trials[event["trial_id"]].results.append(event)
        elif kind == "exploit":
            trial = self.trials[event["trial_id"]]
            trial.values = event["values"]
            trial.exploits.add(event["generation"])
        elif kind == "generation":
            self.generation = event["generation"]
        elif kind == "end":
            self.trials[event["trial_id"]].end = event


def read_events(path: Path) -> tuple[list[Row], int]:
    """The events of a file, and how many of its bytes they are: a line that a kill tore, the last, is left out.

    Raises:
        ValueError: another line is no event.
    """
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    events = []
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or KIND not in event:
            raise ValueError(f"{path}:{number}: {line[:80].decode(errors='replace')}; accepted: an event a line")
        events.append(event)
    return events, whole


def number_of(trial_id: str) -> int:
    """`t0003` is 3."""
    return int(trial_id.removeprefix("t"))
