"""Copies between a local folder and a remote one: what has changed since it was last sent, on a thread of its own, and
the results of a race without data and weights.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from cggr_ray.remote import Remote, outcome, said
from cggr_ray.schema import DATA_FOLDER, LOCK_FILE, RUNS_FOLDER, STOP_FILE, WEIGHTS_FOLDERS

# Seconds between two looks at a folder, and until one that failed is tried again.
LOOK_SECONDS, AGAIN_SECONDS = 1.0, 15.0
# Read at once and sent as it was then: such files may grow while they are sent. Larger ones are weights, which do not.
SMALL_BYTES = 64 << 20
FETCHED_AT_ONCE = 8

log = logging.getLogger(__name__)


class Sender:
    """Files of a local folder on their way to a remote one; remembers what it has sent."""

    def __init__(self, folder: Path, remote: Remote) -> None:
        self.folder, self.remote = folder, remote
        self._sent: dict[str, tuple[int, int]] = {}

    def files(self, leave_out: Iterable[str]) -> list[str]:
        """Names of the files in the folder and below, without locks, unfinished files and some of its folders."""
        found, out = list[str](), set(leave_out)
        for where, folders, names in os.walk(self.folder):
            at = Path(where).relative_to(self.folder)
            folders[:] = [name for name in folders if not name.startswith(".") and str(at / name) not in out]
            found += [(at / name).as_posix() for name in names if not name.startswith(".") and name != LOCK_FILE]
        return sorted(found)

    def send_file(self, name: str) -> None:
        """Sends a file that has changed since it was sent, or never was; nothing where it is gone."""
        try:
            file = (self.folder / name).open("rb")
        except FileNotFoundError:
            return
        with file:
            about = os.fstat(file.fileno())
            state = about.st_size, about.st_mtime_ns
            if self._sent.get(name) == state:
                return
            if about.st_size <= SMALL_BYTES:
                self.remote.write(name, file.read())
            else:
                self.remote.upload(name, file)
        self._sent[name] = state


class Background:
    """Does something again and again on a thread of its own, and a last time when the context ends. What it raises is
    said once and touches nobody else; `failure` is what the last time raised, in words.

    Args:
        do: told whether it is the last time.
    """

    def __init__(self, remote: Remote, do: Callable[[bool], None]) -> None:
        self._remote, self._do = remote, do
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._loop, daemon=True)
        self.failure: str | None = None

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        failed = outcome(lambda: self._do(True)).exception()
        if failed is not None:
            self.failure = said(failed)
            log.warning("mirror: the last upload has failed, the copy lacks what came after the one before: %s", failed)

    def _loop(self) -> None:
        told, wait = False, LOOK_SECONDS
        while not self._ended.wait(wait):
            error = outcome(lambda: self._do(False)).exception()
            wait = LOOK_SECONDS if error is None else AGAIN_SECONDS
            if error is not None and not told:
                told = True
                log.warning("mirror: an upload to %s has failed, tried again every %g s, what runs goes on: %s",
                            self._remote.address, AGAIN_SECONDS, said(error))  # fmt: skip


class Every:
    """Whether so many seconds have passed since it last said so."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._next = seconds, 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True


def is_result(name: str) -> bool:
    """Whether a file of a race's mirror says how it stands: no data, no weights, no request to end."""
    parts = name.split("/")
    weights = parts[0] == RUNS_FOLDER and len(parts) > 3 and parts[2] in WEIGHTS_FOLDERS
    return parts[0] not in (DATA_FOLDER, STOP_FILE) and not weights


def fetch(remote: Remote, names: Iterable[str], folder: Path) -> None:
    """Fetches files, several at once.

    Raises:
        RemoteError: one cannot be.
    """

    with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
        list(pool.map(lambda name: remote.download(name, folder / name), names))


def fetch_results(remote: Remote, folder: Path) -> None:
    """Fetches a race, a tuning or a sweep as far as a report reads it.

    Raises:
        RemoteError: not all of it can be.
    """
    fetch(remote, [name for name in remote.files() if is_result(name)], folder)
