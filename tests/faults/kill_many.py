"""Kills a run at many points of its life, one after the other, and lets it go on; prints what came of it as JSON.

    python kill_many.py FOLDER POINTS RECIPE...

Points are spread evenly over the events of an uninterrupted run. A chain is one run that is killed `DEATHS` times, each
time at the next point of the list after where it goes on, and then ends. Its outcome has to be that of the run that was
never killed, to the bit.
"""

from __future__ import annotations

import json
import shutil
import signal
import struct
import sys
from pathlib import Path
from typing import Any

from runs import STEPS_BETWEEN, attempt, outcome, trial_in, warm

KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)
DEATHS = 10


def steps_of(log: Path) -> list[int]:
    content = log.read_bytes() if log.exists() else b""
    return list(struct.unpack(f"<{len(content) // 4}i", content))


def spread(points: int, events: int) -> list[int]:
    """So many of the events, evenly, every one several times where there are fewer; neighbours far apart."""
    evenly = [round(number * events / points) % events for number in range(points)]
    return [evenly[start] for offset in range(DEATHS) for start in range(offset, points, DEATHS)]


def chain(folder: Path, data: Path, recipe: str, deaths: list[int]) -> dict[str, Any]:
    """One run that dies at these events of its tries and then ends: its deaths, what it repeated, its outcome."""
    trial, died, repeated, reached = trial_in(folder, data, recipe), 0, 0, -1
    for number, event in enumerate([*deaths, None]):
        log = folder.with_name(f"{folder.name}-{number}.steps")
        code = attempt(trial, event, log)
        steps = steps_of(log)
        if steps:
            repeated, reached = max(repeated, reached + 1 - steps[0]), max(reached, steps[-1])
        if code == 0:
            break
        assert code in KILLED, f"a try that was to be killed at event {event} ended with {code}"
        died += 1
    found = {"died": died, "repeated": repeated, "outcome": outcome(folder)}
    shutil.rmtree(folder)
    return found


def main(folder: Path, points: int, recipes: list[str]) -> dict[str, int]:
    """Kills tried and survived, runs that ended otherwise than unharmed ones, steps repeated at most after a kill."""
    tried = survived = corrupted = repeated = 0
    each = -(-points // len(recipes))
    for recipe in recipes:
        data, log = folder / "data", folder / f"{recipe}.steps"
        expected = outcome(warm(trial_in(folder / f"{recipe}-whole", data, recipe)))
        assert attempt(trial_in(folder / f"{recipe}-counted", data, recipe), None, log) == 0
        events = int(log.with_suffix(".events").read_text())
        queue = spread(each, events)
        while queue:
            found = chain(folder / f"{recipe}-{len(queue)}", data, recipe, queue[:DEATHS])
            # A run that ended before all of its deaths gives the others back.
            queue = queue[max(1, found["died"]) :]
            same = found["outcome"] == expected
            tried, survived = tried + found["died"], survived + (found["died"] if same else 0)
            corrupted += not same
            repeated = max(repeated, found["repeated"])
    return {"tried": tried, "survived": survived, "corrupted": corrupted, "repeated": repeated,
            "interval": STEPS_BETWEEN}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
