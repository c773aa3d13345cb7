"""Files that are whole or absent: written aside, flushed to disk, renamed; and what a full disk is called."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE

FULL = (errno.ENOSPC, errno.EDQUOT)
# What the system does not let this user do.
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class DiskFullError(OSError):
    """A run has stopped because there was no room left for what it writes; what was written before is whole."""


def write_whole(path: Path, text: str) -> None:
    """Writes UTF-8 text, in place of what is there. A process that is killed leaves the old file, or none."""
    _whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def copy_whole(source: Path, path: Path) -> None:
    """Copies a file in the same way."""
    _whole(path, lambda aside: shutil.copyfile(source, aside))


def aside_of(path: Path) -> Path:
    """Where a file is written before it takes its place. A process that is killed may leave it there."""
    return path.with_name(f".{path.name}.partial")


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    aside = aside_of(path)
    try:
        write(aside)
        flush(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    flush(path.parent)


def allow_as(folder: Path, file: Path) -> None:
    """Lets those read and write a file who may in the folder, which has what the umask gives: safetensors writes for
    its owner alone."""
    mode, own = (S_IMODE(path.stat().st_mode) for path in (folder, file))
    # Where they are alike nothing is asked of a file system that may know no permissions.
    if own != mode & 0o666:
        file.chmod(mode & 0o666)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def room_for(folder: Path) -> Iterator[None]:
    """Says what a run does whose disk, or quota, is full.

    Raises:
        DiskFullError: it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        said = f"{os.strerror(error.errno)}: the run in {folder} has stopped; what it saved before is whole, and " \
               "it goes on from there once there is room"  # fmt: skip
        raise DiskFullError(error.errno, said, error.filename) from error
