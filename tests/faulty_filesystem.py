"""fsspec's own local filesystem at faulty://, that does something before every operation and inside every write.

`Faulty.does` is told what is about to happen: `read`, `write`, `half` (so much of a write has been done), `move`,
`remove` or `list`, and the path. It may raise, wait, look around or end the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from cggr_ray import copying

Does = Callable[[str, str], None]


def nothing(operation: str, path: str) -> None:
    """A filesystem that works."""


class Faulty(LocalFileSystem):  # type: ignore[misc]
    protocol = "faulty"
    does: ClassVar[Does] = staticmethod(nothing)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return LocalFileSystem._strip_protocol(path.removeprefix("faulty://"))

    def open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        if "w" not in mode:
            return super().open(path, mode, **more)
        Faulty.does("write", path)
        return Halved(super().open(path, mode, **more), path)

    def cat_file(self, path: str, **more: Any) -> Any:
        Faulty.does("read", path)
        return super().cat_file(path, **more)

    def get_file(self, rpath: str, lpath: str, **more: Any) -> None:
        Faulty.does("read", rpath)
        super().get_file(rpath, lpath, **more)

    def mv(self, path1: str, path2: str, **more: Any) -> None:
        Faulty.does("move", path2)
        super().mv(path1, path2, **more)

    def rm(self, path: str, **more: Any) -> None:
        Faulty.does("remove", path)
        super().rm(path, **more)

    def find(self, path: str, **more: Any) -> Any:
        Faulty.does("list", path)
        return super().find(path, **more)


class Halved:
    """A file whose writes come in two halves, both of which are on the disk at once."""

    def __init__(self, file: Any, path: str) -> None:
        self._file, self._path = file, path

    def write(self, content: bytes) -> int:
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        Faulty.does("half", self._path)
        self._file.write(content[half:])
        return len(content)

    def __enter__(self) -> Halved:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


fsspec.register_implementation("faulty", Faulty, clobber=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For every test of a module that imports it: short waits, and a filesystem that works again after the test."""
    monkeypatch.setattr(copying, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr("cggr_ray.remote.WAITS", (0.0, 0.0))
    yield
    Faulty.does = staticmethod(nothing)
