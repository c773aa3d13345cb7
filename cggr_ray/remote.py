"""Folders of an fsspec filesystem (S3, GCS, NFS, ...): of their files this project writes, reads, lists and removes.

An address is PROTOCOL://FOLDER. Who may read and write there, the filesystem's own library finds in the environment.
What is written is written aside and renamed where a torn file could pass for a whole one; an object store puts objects
whole anyway, and renames by copying on its own side.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar

from cggr_ray.files import FULL, flush

T = TypeVar("T")
P = ParamSpec("P")
ACCEPTED = "PROTOCOL://FOLDER such as s3://bucket/folder, gs://bucket/folder or file:///mnt/folder"
# Python packages of protocols whose filesystems do not come with fsspec.
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs",
            "sftp": "paramiko", "ssh": "paramiko"}  # fmt: skip
LOCAL = ("file", "local")
# What fsspec's filesystems look for files by when they move or remove some; `?` begins a query.
PATTERNS = frozenset("*[")
# Seconds before a call that has failed is made again.
WAITS = (1.0, 4.0)
AT_ONCE = 16 << 20
UNFINISHED = ".partial"


class RemoteError(RuntimeError):
    """A remote filesystem did not do what it was asked to, however often."""


def is_address(text: str) -> bool:
    return "://" in text


def is_below(name: str) -> bool:
    """Whether a path stays in its folder: an object's name may be any text, and is made a local path."""
    return not {"", ".", ".."}.intersection(name.split("/"))


def check_address(address: str) -> str:
    """The address without a slash at its end.

    Raises:
        ValueError: it is none, or not the same one everywhere; or it holds a password or another secret, which would
            land in every run's folder.
    """
    protocol, _, rest = address.partition("://")
    # Keys hold slashes and other signs that end a user's name in an address by its rules.
    user, _, where = rest.rpartition("@")
    folder, asks, _ = where.partition("?")
    if asks or not {":", "?"}.isdisjoint(user):
        raise ValueError(f"mirror '{protocol}://{folder}' with a password or a query; accepted: an address without "
                         "secrets, which the filesystem's library reads from the environment")  # fmt: skip
    if not is_address(address) or "::" in address or not folder.strip("/"):
        raise ValueError(f"mirror {address!r}; accepted: {ACCEPTED}")
    if protocol in LOCAL and not rest.startswith("/"):
        # Every worker has a working directory of its own.
        raise ValueError(f"mirror {address!r} is relative; accepted: a whole path, {protocol}:///mnt/folder")
    if not PATTERNS.isdisjoint(folder):
        raise ValueError(f"mirror {address!r} has one of {' '.join(sorted(PATTERNS))}, which filesystems take for a "
                         "pattern; accepted: a name without")  # fmt: skip
    return address.rstrip("/")


def outcome(do: Callable[[], T]) -> Future[T]:
    """What a call returned or raised. What fsspec's filesystems raise has no ancestor in common, so it is not caught by
    type: a future carries whatever it is."""
    with ThreadPoolExecutor(1) as one:
        return one.submit(do)


def said(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def again(method: Callable[Concatenate[Remote, P], T]) -> Callable[Concatenate[Remote, P], T]:
    """A method of a remote that is called again where it fails.

    Raises:
        RemoteError: it has failed three times.
        OSError: this machine's disk is full, of which another try changes nothing.
    """

    @wraps(method)
    def called(remote: Remote, *arguments: P.args, **named: P.kwargs) -> T:
        for wait in (*WAITS, None):
            done = outcome(lambda: method(remote, *arguments, **named))
            if (error := done.exception()) is None:
                return done.result()
            if isinstance(error, OSError) and error.errno in FULL:
                raise error
            if wait is None:
                raise RemoteError(f"{remote.address}: {said(error)}") from error
            time.sleep(wait)
        raise AssertionError

    return called


class Remote:
    """A folder at an address."""

    def __init__(self, address: str, filesystem: Any, path: str) -> None:
        self.address, self._fs, self._path = address, filesystem, path

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.address}/{name}", self._fs, f"{self._path}/{name}")

    @property
    def top(self) -> str:
        """The bucket, or the disk; what is missing below it is made."""
        return self._path.partition("/")[0] or "/"

    @again
    def has_top(self) -> bool:
        """Whether it is there, where a filesystem's paths say what it is."""
        return "://" in self._path or bool(self._fs.exists(self.top))

    @again
    def files(self) -> dict[str, int]:
        """The size of every file below that was written to its end, by its path from here; empty where nothing is."""
        self._fs.invalidate_cache()
        found = self._fs.find(self._path, detail=True)
        start = len(self._path.rstrip("/")) + 1
        sizes = {path[start:]: int(about["size"]) for path, about in found.items()}
        return {name: size for name, size in sizes.items() if is_below(name) and not name.endswith(UNFINISHED)}

    @again
    def read(self, name: str) -> bytes | None:
        """The content of a file, None where there is none."""
        try:
            content: bytes = self._fs.cat_file(self._at(name))
        except FileNotFoundError:
            return None
        return content

    @again
    def write(self, name: str, content: bytes) -> None:
        """A file that is whole, or the one that was there."""
        aside = self._at(name + UNFINISHED)
        self._made(name, lambda: self._fs.pipe_file(aside, content))
        self._fs.mv(aside, self._at(name))

    @again
    def upload(self, name: str, file: BinaryIO) -> None:
        """A file from an open one; torn, if this is interrupted."""
        file.seek(0)
        with self._made(name, lambda: self._fs.open(self._at(name), "wb")) as there:
            shutil.copyfileobj(file, there, AT_ONCE)

    @again
    def download(self, name: str, file: Path) -> None:
        """Into a local file that is whole, or the one that was there."""
        # Processes of a machine may fetch the same file.
        aside = file.with_name(f".{file.name}.{os.getpid()}{UNFINISHED}")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._fs.get_file(self._at(name), str(aside))
            flush(aside)
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)

    @again
    def remove(self, name: str = "") -> None:
        """Removes a file, or a folder with all that is in it, if it is there."""
        with suppress(FileNotFoundError):
            self._fs.rm(self._at(name), recursive=True)

    def _made(self, name: str, write: Callable[[], T]) -> T:
        """Writes a file, into folders that are made where the filesystem has such and they are missing."""
        try:
            return write()
        except FileNotFoundError:
            self._fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
            return write()

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path


def open_remote(address: str) -> Remote:
    """The folder at an address; nothing is asked of it yet.

    Raises:
        ValueError: no address, no such protocol, or its package is not installed.
    """
    from fsspec.core import url_to_fs
    from fsspec.registry import get_filesystem_class

    address = check_address(address)
    protocol = address.partition("://")[0]
    try:
        get_filesystem_class(protocol)
    except ImportError:
        package = PACKAGES.get(protocol, "the package that fsspec asks for")
        raise ValueError(f"mirror {address!r}: {protocol}:// needs {package}, which is not installed; accepted: "
                         f"pip install {package} on every machine, or another protocol") from None  # fmt: skip
    except ValueError:
        raise ValueError(f"mirror {address!r}: unknown protocol {protocol!r}; accepted: {ACCEPTED}") from None
    filesystem, path = url_to_fs(address)
    return Remote(address, filesystem, path.rstrip("/"))
