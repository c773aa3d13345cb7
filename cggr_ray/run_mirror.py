"""A run's copy in its race's mirror, from which another machine goes on: runs/<trial id>/, as in the race's folder.

Before the run begins, a checkpoint there that is newer than the newest here is fetched, with the rows that led to it,
and checked by its own hashes. While it runs, each new checkpoint is sent: first what else is in the run's folder, so
that rows are never older than the weights, then the checkpoint's files, its manifest last, without which it is none. Of
the end the summary is last. Only then is removed what is not needed any more.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cggr_ray import checkpoint
from cggr_ray.assembly import ACTIVATIONS_FILE
from cggr_ray.copying import AGAIN_SECONDS, Background, Every, Sender, fetch
from cggr_ray.data.dataset import READY, DataSpec, is_prepared
from cggr_ray.files import room_for
from cggr_ray.lock import WAIT_SECONDS, only_writer
from cggr_ray.race import Trial
from cggr_ray.remote import Remote, RemoteError, is_below, open_remote
from cggr_ray.schema import (
    DATA_FOLDER,
    QUESTIONS_FOLDER,
    RUN_FILE,
    RUNS_FOLDER,
    STOP_FILE,
    SUMMARY_FILE,
    WEIGHTS_FOLDERS,
)
from cggr_ray.workers import Workers

# Seconds between two looks for a request to end.
STOP_SECONDS = 5.0

log = logging.getLogger(__name__)


class DamagedError(Exception):
    """What was fetched is not what was written."""


class RunMirror(Sender):
    """The copy of one run.

    Args:
        remote: of the run.
    """

    def __init__(self, folder: Path, remote: Remote) -> None:
        super().__init__(folder, remote)
        # Names of checkpoints: those there that are as here, by when they were sent; and all that there are.
        self._whole: list[str] = []
        self._there: set[str] = set()
        self._due = Every(AGAIN_SECONDS)

    def fetch(self, trial: Trial) -> None:
        """Brings the folder to where the mirror is, if that is further. The caller holds the run's lock.

        Raises:
            RemoteError: the mirror does not answer: nobody knows where the run stands.
        """
        there = self.remote.files()
        if RUN_FILE in there and not self._is_of(trial):
            log.warning("%s: its mirror holds a run of another recipe or seed, which is removed", trial.trial_id)
            self.remote.remove()
            there = {}
        if not (self.folder / SUMMARY_FILE).is_file():
            if SUMMARY_FILE in there:
                self._fetch_files(there)
            else:
                self._fetch_newer(there)
        self._there = {name.split("/")[1] for name in there if name.startswith(f"{checkpoint.FOLDER}/")}
        self._whole = [name for name in saved(there) if self._is_as_here(name)]

    def send(self) -> None:
        """Sends what is new."""
        ended, newest = (self.folder / SUMMARY_FILE).is_file(), self._newest()
        # A trial that the scheduler stops may get no further than the first of them.
        for name in sorted(self.files([checkpoint.FOLDER]), key=lambda name: name != RUN_FILE):
            if name not in (SUMMARY_FILE, ACTIVATIONS_FILE):
                self.send_file(name)
        if ended:
            self.send_file(SUMMARY_FILE)
            self.remote.remove(checkpoint.FOLDER)
        elif newest is not None and newest not in self._whole:
            self._send_checkpoint(newest)

    def send_when_due(self, last: bool) -> None:
        """Sends what is new: a checkpoint soon, other files every few seconds, all of it the last time."""
        newest = self._newest()
        if last or self._due() or (newest is not None and newest not in self._whole):
            self.send()

    def _newest(self) -> str | None:
        return max((path.name for path in checkpoint.all_of(self.folder)), default=None)

    def _send_checkpoint(self, name: str) -> None:
        """Sends a checkpoint, all files of which are opened first: the run may remove it while they are sent."""
        at, local = f"{checkpoint.FOLDER}/{name}", self.folder / checkpoint.FOLDER / name
        with ExitStack() as opened:
            try:
                manifest = (local / checkpoint.MANIFEST).read_bytes()
                files = {file: opened.enter_context((local / file).open("rb")) for file in json.loads(manifest)}
            except FileNotFoundError:
                return
            self._there.add(name)
            # One of this name that another process has sent is none while it is overwritten.
            self.remote.remove(f"{at}/{checkpoint.MANIFEST}")
            for file, content in files.items():
                self.remote.upload(f"{at}/{file}", content)
        self.remote.write(f"{at}/{checkpoint.MANIFEST}", manifest)
        self._whole.append(name)
        if len(self._whole) >= checkpoint.KEPT:
            self._remove_all_but(self._whole[-checkpoint.KEPT :])

    def _remove_all_but(self, kept: list[str]) -> None:
        for name in sorted(self._there - set(kept)):
            # No half of it passes for a checkpoint.
            self.remote.remove(f"{checkpoint.FOLDER}/{name}/{checkpoint.MANIFEST}")
            self.remote.remove(f"{checkpoint.FOLDER}/{name}")
            self._there.remove(name)

    def _is_of(self, trial: Trial) -> bool:
        """Whether the run there was begun with this recipe and seed: the draw that made a sweep's trial is only then
        sure to be in the sweep's own history there, too."""
        content = self.remote.read(RUN_FILE)
        if content is None:
            return False
        run = json.loads(content)
        return run["seed"] == trial.seed and trial.recipe.is_that_of(run["parts"])

    def _is_as_here(self, name: str) -> bool:
        file = f"{checkpoint.FOLDER}/{name}/{checkpoint.MANIFEST}"
        here = self.folder / file
        return here.is_file() and here.read_bytes() == self.remote.read(file)

    def _fetch_newer(self, there: dict[str, int]) -> None:
        if not (names := saved(there)):
            return
        own = checkpoint.newest(self.folder)[0]
        for name in reversed([name for name in names if own is None or name > own.name]):
            try:
                self._fetch_checkpoint(name, there)
            except DamagedError as damage:
                log.warning(
                    "%s: %s in its mirror is damaged, the one before is used: %s", self.folder.name, name, damage
                )
                continue
            self._fetch_files(there)
            log.info("%s: fetched %s from its mirror", self.folder.name, name)
            return

    def _fetch_checkpoint(self, name: str, there: dict[str, int]) -> None:
        at = f"{checkpoint.FOLDER}/{name}/"
        with checkpoint.whole(self.folder / at) as aside:
            fetch(self.remote / at.rstrip("/"), [file.removeprefix(at) for file in there if file.startswith(at)], aside)
            if damage := checkpoint.find_damage(aside):
                raise DamagedError(damage)

    def _fetch_files(self, there: dict[str, int]) -> None:
        """All but weights, the summary last."""
        names = [name for name in there if name.split("/")[0] not in WEIGHTS_FOLDERS and name != SUMMARY_FILE]
        fetch(self.remote, names, self.folder)
        fetch(self.remote, [name for name in (SUMMARY_FILE,) if name in there], self.folder)


class Mirroring:
    """What a run needs to know of its mirror: whether to end, and once it has ended why the last upload failed."""

    failure: str | None = None

    def asks_to_stop(self) -> bool:
        return False


class Uploads(Mirroring):
    """Sends what a run writes while the context lasts.

    Args:
        race: the mirror of the run's race.
    """

    def __init__(self, run: RunMirror, race: Remote) -> None:
        self._run, self._race = run, race
        self._look, self._stop = Every(STOP_SECONDS), False

    @contextmanager
    def running(self) -> Iterator[None]:
        background = Background(self._run.remote, self._do)
        try:
            with background:
                yield
        finally:
            self.failure = background.failure

    def asks_to_stop(self) -> bool:
        return self._stop

    def _do(self, last: bool) -> None:
        if self._look():
            self._stop = self._race.read(STOP_FILE) is not None
        self._run.send_when_due(last)


@contextmanager
def mirrored(trial: Trial, workers: Workers) -> Iterator[Mirroring]:
    """Inside, a trial whose race has a mirror stands where it does in the mirror, which is kept up to date by worker 0.
    Every worker fetches: not all need be on one machine.

    Raises:
        RemoteError: the mirror does not answer, or what it holds of the data is damaged; before anything runs.
        InUseError: another process goes on writing into the run's folder.
    """
    if trial.race.mirror is None:
        yield Mirroring()
        return
    race, folder = open_remote(trial.race.mirror), Path(trial.folder)
    run = RunMirror(folder, race / RUNS_FOLDER / folder.name)
    with room_for(folder):
        fetch_data(race, trial.race.data, Path(trial.data_folder))
        if trial.race.evaluation is not None:
            fetch_questions(race, folder.parents[1])
        # Worker 0 first: the others of its machine wait for it, however long a checkpoint takes. A round ends when all
        # have let the lock go.
        for first, wait_seconds in ((True, WAIT_SECONDS), (False, math.inf)):
            if workers.is_first is first:
                with only_writer(folder, wait_seconds):
                    run.fetch(trial)
            workers.reason(None)
    if not workers.is_first:
        yield Mirroring()
        return
    uploads = Uploads(run, race)
    with uploads.running():
        yield uploads


def fetch_data(race: Remote, spec: DataSpec, folder: Path) -> None:
    """Fetches the prepared data of a race where they are not there, one process of a machine at a time.

    Raises:
        RemoteError: the mirror has none, or a file is not as it was sent.
    """
    if is_prepared(spec, folder):
        return
    with only_writer(folder, wait_seconds=math.inf):
        if is_prepared(spec, folder):
            return
        remote = race / DATA_FOLDER
        content = remote.read(checkpoint.MANIFEST)
        if content is None:
            raise RemoteError(f"{remote.address} has no {checkpoint.MANIFEST}: the data were not sent there")
        written: dict[str, str] = json.loads(content)
        if not all(map(is_below, written)):
            raise RemoteError(f"{remote.address}/{checkpoint.MANIFEST} names files outside of its folder")
        for names in (sorted(written.keys() - {READY}), [READY]):
            fetch(remote, names, folder)
            for name in names:
                if checkpoint.fingerprint(folder / name) != written[name]:
                    (folder / name).unlink()
                    raise RemoteError(f"{remote.address}/{name} is not what was written; remove {remote.address}: "
                                      "the command that goes on sends them again")  # fmt: skip


def fetch_questions(race: Remote, folder: Path) -> None:
    """Fetches the questions that a race keeps, where they are not there."""
    remote = race / QUESTIONS_FOLDER
    names = remote.files()
    fetch(
        remote, [name for name in names if not (folder / QUESTIONS_FOLDER / name).is_file()], folder / QUESTIONS_FOLDER
    )


def saved(there: dict[str, int]) -> list[str]:
    """Names of the checkpoints among the files of a run, the oldest first."""
    manifests = [name.split("/") for name in there if name.endswith(f"/{checkpoint.MANIFEST}")]
    return sorted(parts[1] for parts in manifests if parts[0] == checkpoint.FOLDER and len(parts) == 3)
