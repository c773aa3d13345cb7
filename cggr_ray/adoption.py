"""A run that goes on with the weights of another one of the same race: population-based training."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from cggr_ray import checkpoint
from cggr_ray.files import aside_of
from cggr_ray.schema import KIND, METRICS_FILE, PROGRESS_FILE, STEP
from cggr_ray.telemetry.jsonl import JsonlTracker

# What stays the run's own: its clocks.
OWN = ("ledgers", "wall_seconds")

log = logging.getLogger(__name__)


def adopt(donor: Path, receiver: Path) -> bool:
    """Makes the last checkpoint of a run's folder that of another's, at the receiver's own place in the budget.

    Weights, optimizer, parts, place in the data and the rows that led there become the donor's, and a row says so.
    Neither may run; done again, it does the same. Where no checkpoint of the donor is as it was written, nothing
    changes: the receiver goes on with its own, a warning says so, and False is returned.
    """
    theirs, own = checkpoint.newest(donor)[0], checkpoint.newest(receiver)[0]
    if theirs is None:
        log.warning("%s: goes on with its own weights, as %s has no whole checkpoint", receiver.name, donor.name)
        return False
    state = json.loads((theirs / checkpoint.STATE).read_text())
    if own is not None:
        before = json.loads((own / checkpoint.STATE).read_text())
        state |= {key: before[key] for key in OWN}
    final = receiver / checkpoint.FOLDER / theirs.name
    with checkpoint.whole(final) as aside:
        for file in theirs.iterdir():
            shutil.copyfile(file, aside / file.name)
        (aside / checkpoint.STATE).write_text(json.dumps(state))
        checkpoint.seal(aside)
    for other in final.parent.iterdir():
        if other != final:
            shutil.rmtree(other)
    for name in (METRICS_FILE, PROGRESS_FILE):
        aside = aside_of(receiver / name)
        shutil.copyfile(donor / name, aside)
        aside.replace(receiver / name)
    JsonlTracker(receiver).log({KIND: "adopted", STEP: checkpoint.step_of(theirs), "donor": donor.name})
    return True
