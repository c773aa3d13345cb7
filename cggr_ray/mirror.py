"""The copy of a race, a tuning or a sweep at an address, as the process that starts its trials sees it.

The mirror holds what the folder does, but for what is Ray's. This process sends its own files: the record, events,
rows, reports, prepared data once, and the request to end, which workers on other machines look for there. Workers send
their runs (`run_mirror`); here only their results are fetched, where they are further than those of this folder.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

from cggr_ray import checkpoint
from cggr_ray.copying import Background, Sender, fetch, fetch_results, is_result
from cggr_ray.data.dataset import READY, DataSpec, is_prepared
from cggr_ray.files import write_whole
from cggr_ray.race import RaceSpec
from cggr_ray.remote import RemoteError, open_remote
from cggr_ray.run_mirror import RunMirror, fetch_data, saved
from cggr_ray.schema import (
    DATA_FOLDER,
    FAILURE_FILE,
    METRICS_FILE,
    MIRROR_FILE,
    RUNS_FOLDER,
    STOP_FILE,
    SUMMARY_FILE,
    SWEEP_EVENTS_FILE,
)

# Of a race's folder: what is not sent file by file, and what is Ray's.
NOT_ITS_OWN = (RUNS_FOLDER, DATA_FOLDER, "ray")

log = logging.getLogger(__name__)


class Unmirrored(AbstractContextManager["Unmirrored"]):
    """A race without a mirror: its folder is all that there is."""

    def check(self) -> None:
        """Before anything is made: whether the mirror can be reached, and is this folder's or nobody's.

        Raises:
            ValueError: it cannot, or is not.
        """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The folder stays as it is."""

    def fetch_data(self, spec: DataSpec) -> None:
        """Fetches the prepared data where they are only there."""

    def send_data(self) -> None:
        """Sends the prepared data where they are only here."""

    def fetch_runs(self) -> None:
        """Fetches the results of all runs that are further there than here; a warning says where that fails."""

    def fetch_run(self, trial_id: str) -> None:
        """The same for one run."""

    def newest_step(self, trial_id: str) -> int:
        """The step of the newest checkpoint of a run there, 0 where there is none.

        Raises:
            ValueError: another version of this project wrote it.
        """
        return 0

    def remove_checkpoints(self, trial_id: str) -> None:
        """Removes those of a run that has ended."""


NO_MIRROR = Unmirrored()


class Mirror(Unmirrored):
    """A race with a mirror; inside the context its folder's own files are sent as they change."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.remote = folder, open_remote(address)
        self._sender = Sender(folder, self.remote)
        self._background = Background(self.remote, self._send)
        self._known: set[str] = set()

    def check(self) -> None:
        try:
            if not self.remote.has_top():
                raise ValueError(f"mirror {self.remote.address!r}: there is no {self.remote.top!r}; accepted: a bucket "
                                 "that exists")  # fmt: skip
            theirs = self.remote.read(MIRROR_FILE)
            holds = theirs is not None or bool(self.remote.files())
            events = self.remote.read(SWEEP_EVENTS_FILE) or b""
        except RemoteError as error:
            raise ValueError(f"mirror {self.remote.address!r} does not answer: {error}; accepted: one that this user "
                             "may list, read and write") from error  # fmt: skip
        own = self.folder / MIRROR_FILE
        if holds and (not own.is_file() or own.read_bytes() != theirs):
            raise ValueError(f"mirror {self.remote.address!r} holds something else than {str(self.folder)!r}; "
                             f"accepted: an empty one, or --resume {self.remote.address} of what it holds")  # fmt: skip
        # Those of a kill may end in the middle of one.
        whole, file = events[: events.rfind(b"\n") + 1], self.folder / SWEEP_EVENTS_FILE
        if whole and not (file.is_file() and file.read_bytes().startswith(whole)):
            raise ValueError(f"mirror {self.remote.address!r} has events that {str(self.folder)!r} has not: its sweep "
                             f"went on elsewhere; accepted: --resume {self.remote.address}")  # fmt: skip

    def __enter__(self) -> Mirror:
        """Raises RemoteError where nothing can be sent: nothing has begun."""
        if not (self.folder / MIRROR_FILE).is_file():
            write_whole(self.folder / MIRROR_FILE, secrets.token_hex(8))
        # First: what else is sent before the rest fails, or this process is killed, is this folder's.
        self._sender.send_file(MIRROR_FILE)
        self._known = {STOP_FILE, *self._own_files()}
        self._send(last=False)
        self._background.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.__exit__(kind, error, trace)

    def _own_files(self) -> list[str]:
        failures = [
            path.relative_to(self.folder).as_posix() for path in self.folder.glob(f"{RUNS_FOLDER}/*/{FAILURE_FILE}")
        ]
        return [*self._sender.files(NOT_ITS_OWN), *failures]

    def _send(self, last: bool) -> None:
        """Sends what has changed, and takes away what is gone: a request to end, a failure before another try."""
        now = self._own_files()
        for name in sorted(self._known.difference(now)):
            self.remote.remove(name)
        self._known = set(now)
        for name in now:
            self._sender.send_file(name)
        if last:
            self._send_ended_runs()

    def _send_ended_runs(self) -> None:
        """Runs that ended here and whose own last upload failed."""
        for summary in self.folder.glob(f"{RUNS_FOLDER}/*/{SUMMARY_FILE}"):
            run = self._run(summary.parent.name)
            if run.remote.read(SUMMARY_FILE) is None:
                run.send()

    def fetch_data(self, spec: DataSpec) -> None:
        prepared = is_prepared(spec, self.folder / DATA_FOLDER)
        if not prepared and (self.remote / DATA_FOLDER).read(checkpoint.MANIFEST) is not None:
            fetch_data(self.remote, spec, self.folder / DATA_FOLDER)

    def send_data(self) -> None:
        data = Sender(self.folder / DATA_FOLDER, self.remote / DATA_FOLDER)
        if data.remote.read(checkpoint.MANIFEST) is not None:
            return
        names = data.files(())
        written = {name: checkpoint.fingerprint(data.folder / name) for name in names}
        for name in sorted(names, key=lambda name: name == READY):
            data.send_file(name)
        data.remote.write(checkpoint.MANIFEST, json.dumps(written, indent=1).encode())

    def fetch_runs(self) -> None:
        with told():
            there = (self.remote / RUNS_FOLDER).files()
            for trial_id in sorted({name.partition("/")[0] for name in there}):
                own = {name: size for name, size in there.items() if name.startswith(f"{trial_id}/")}
                self._fetch(trial_id, {name.removeprefix(f"{trial_id}/"): size for name, size in own.items()})

    def fetch_run(self, trial_id: str) -> None:
        with told():
            self._fetch(trial_id, self._run(trial_id).remote.files())

    def _fetch(self, trial_id: str, there: dict[str, int]) -> None:
        """Fetches results that are further, by the summary or by the length of the rows, which only grow."""
        run, here = self._run(trial_id), self.folder / RUNS_FOLDER / trial_id
        rows = (here / METRICS_FILE).stat().st_size if (here / METRICS_FILE).is_file() else 0
        if (here / SUMMARY_FILE).is_file() or (SUMMARY_FILE not in there and there.get(METRICS_FILE, 0) <= rows):
            return
        names = {name for name in there if is_result(f"{RUNS_FOLDER}/{trial_id}/{name}")}
        # A summary says that all else is there.
        fetch(run.remote, sorted(names - {SUMMARY_FILE}), here)
        fetch(run.remote, sorted(names & {SUMMARY_FILE}), here)

    def newest_step(self, trial_id: str) -> int:
        remote = self._run(trial_id).remote
        for name in reversed(saved(remote.files())):
            state = f"{checkpoint.FOLDER}/{name}/{checkpoint.STATE}"
            try:
                checkpoint.parse_state(remote.read(state) or b"", remote.address)
            except json.JSONDecodeError:
                continue
            return checkpoint.step_of(Path(name))
        return 0

    def remove_checkpoints(self, trial_id: str) -> None:
        remote = self._run(trial_id).remote
        try:
            remote.remove(checkpoint.FOLDER)
        except RemoteError as error:
            log.warning("mirror: checkpoints of %s, which has ended, stay there: %s", trial_id, error)

    def _run(self, trial_id: str) -> RunMirror:
        return RunMirror(self.folder / RUNS_FOLDER / trial_id, self.remote / RUNS_FOLDER / trial_id)


@contextmanager
def told() -> Iterator[None]:
    """Inside, a mirror that does not answer is said, and what is in this folder is taken."""
    try:
        yield
    except RemoteError as error:
        log.warning("mirror: results are not fetched, those of this folder are taken: %s", error)


def fetch_race(address: str, file: str, out: Path | None) -> Path:
    """Fetches a race, a tuning or a sweep into a new folder, `out` or one below outputs/ of the address's last name:
    records, results and prepared data. Weights stay; whoever trains fetches its own.

    Args:
        file: the record that is to be there.
    Raises:
        ValueError: there is none, it was mirrored elsewhere, or the folder is not empty or the current one.
        RemoteError: not all of it can be fetched; then there is no folder.
    """
    remote = open_remote(address)
    content = remote.read(file)
    if content is None:
        raise ValueError(f"{remote.address!r} holds no {Path(file).stem}; accepted: an address with {file}")
    spec = RaceSpec.from_plain(json.loads(content)["spec"])
    if spec.mirror != remote.address:
        raise ValueError(f"{remote.address!r} is a copy of {spec.mirror!r}; accepted: --resume {spec.mirror}")
    folder = out or Path("outputs") / remote.address.rpartition("/")[2]
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(f"--out {folder}, where this command runs; accepted: --out with a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty; accepted: --out with a new folder, or --resume {folder} where "
                         "it holds the same race")  # fmt: skip
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    fetch_results(remote, aside)
    if (remote / DATA_FOLDER).read(checkpoint.MANIFEST) is not None:
        fetch_data(remote, spec.data, aside / DATA_FOLDER)
    # Over an empty one.
    aside.rename(folder)
    return folder


def mirror_of(spec: RaceSpec, folder: Path) -> Unmirrored:
    """Raises ValueError where the address of the race's mirror is none that can be opened here."""
    return NO_MIRROR if spec.mirror is None else Mirror(folder, spec.mirror)
