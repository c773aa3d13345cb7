"""One writer a run folder, by a lock that the kernel takes back when its holder ends, however it ends.

The lock is `flock` on run.lock, which stays where it is. On one machine nothing else is needed. On NFS, Linux asks the
server, so that the lock holds between machines too: with NFSv4, or v3 with its lock daemon, but not where the mount
says `nolock` or `local_lock`, which leaves it to one machine. The server keeps the lock of a machine that is gone for
one lease, 90 s by default. Where a file system has no locks at all, taking one raises OSError and nothing runs.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from cggr_ray.schema import LOCK_FILE

# Longer than a killed race's workers live, and than an NFS server keeps the locks of a machine that is gone.
WAIT_SECONDS, AGAIN_SECONDS = 100.0, 0.2

log = logging.getLogger(__name__)


class InUseError(RuntimeError):
    """Another process is writing into the run's folder."""


@contextmanager
def only_writer(folder: Path, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Inside, no other process is in here with the same folder, which is made where it is missing.

    Raises:
        InUseError: another one still was after `wait_seconds`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        _take(file, folder, wait_seconds)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _take(file: TextIO, folder: Path, wait_seconds: float) -> None:
    until, told = time.monotonic() + wait_seconds, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            file.seek(0)
            holder = file.read()
        if time.monotonic() >= until:
            raise InUseError(f"{holder} is writing into {str(folder)!r}, waited {wait_seconds:g} s; "
                             "accepted: one run at a time in a folder")  # fmt: skip
        if not told:
            log.warning("%s is writing into %s; waiting for its end", holder, folder)
            told = True
        time.sleep(AGAIN_SECONDS)
