"""Where documents come from: generated problems, local JSONL or Parquet, any Hugging Face dataset.

A document is a prompt (may be empty) and a completion. Columns are named, or found among the usual pairs.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import DEFAULT_BUFFER_SIZE
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import pyarrow.parquet as parquet
from pyarrow import ArrowInvalid

from cggr_ray.data.problems import LEVELS, problems
from cggr_ray.hub import reading
from cggr_ray.seeds import check_seed

# (prompt column, completion column) of GSM8K, NuminaMath, instruction sets and plain text, tried in this order.
KNOWN_COLUMNS: tuple[tuple[str | None, str], ...] = (
    ("question", "answer"),
    ("problem", "solution"),
    ("prompt", "completion"),
    (None, "text"),
)


class Document(NamedTuple):
    prompt: str
    completion: str


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; neither given means one of `KNOWN_COLUMNS`."""

    prompt: str | None = None
    completion: str | None = None

    def resolve(self, present: Sequence[str], where: str) -> tuple[str | None, str]:
        """The columns to read out of those present.

        Raises:
            ValueError: a named column is missing, or none of the usual pairs is there.
        """
        if self.completion is None and self.prompt is None:
            for prompt, completion in KNOWN_COLUMNS:
                if completion in present and (prompt is None or prompt in present):
                    return prompt, completion
            usual = "; ".join("/".join(filter(None, pair)) for pair in KNOWN_COLUMNS)
            raise ValueError(f"{where}: columns {sorted(present)}; accepted: {usual}, or name prompt and completion")
        if self.completion is None:
            raise ValueError(f"{where}: prompt column {self.prompt!r} without a completion column; accepted: both")
        for name in filter(None, (self.prompt, self.completion)):
            if name not in present:
                raise ValueError(f"{where}: no column {name!r}; accepted: {', '.join(sorted(present))}")
        return self.prompt, self.completion


@dataclass(frozen=True)
class Source:
    """What all sources share: a name for val/loss/<name> and a folder, a share of the tokens, a limit on epochs."""

    IS_PART: ClassVar[bool] = True

    name: str
    weight: float = 1.0
    max_epochs: int | None = None

    def __post_init__(self) -> None:
        if not {"", ".", ".."}.isdisjoint(self.name.split("/")):
            raise ValueError(f"name = {self.name!r} of a source; accepted: that of a folder in the race's data")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight = {self.weight} of source {self.name!r}; accepted: a positive, finite number")
        if self.max_epochs is not None and self.max_epochs < 1:
            raise ValueError(f"max_epochs = {self.max_epochs} of source {self.name!r}; accepted: at least 1")

    def documents(self) -> Iterator[Document]:
        raise NotImplementedError


@dataclass(frozen=True)
class Problems(Source):
    """Generated maths problems with worked solutions: the first `count` of stream `seed`."""

    name: str = "problems"
    count: int = 20_000
    seed: int = 0
    levels: tuple[int, ...] = LEVELS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise ValueError(f"count = {self.count} of source {self.name!r}; accepted: at least 1 problem")
        check_seed("seed", self.seed, f"source {self.name!r}")
        if not self.levels or not set(self.levels) <= set(LEVELS):
            raise ValueError(f"levels = {list(self.levels)} of source {self.name!r}; accepted: some of {list(LEVELS)}")

    def documents(self) -> Iterator[Document]:
        for p in problems(self.seed, self.count, self.levels):
            yield Document(p.question, p.solution)


@dataclass(frozen=True)
class Jsonl(Source):
    """A local file with one JSON object a line, plain or .xz. Relative paths are relative to the race file."""

    name: str = "jsonl"
    path: str = ""
    columns: Columns = Columns()

    def documents(self) -> Iterator[Document]:
        chosen: tuple[str | None, str] | None = None
        for where, row in self.rows():
            chosen = chosen or self.columns.resolve(list(row), where)
            yield document(row, chosen, where)

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every line's object, after its file and number; blank lines are left out."""
        path = existing(self.path)
        number = 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(_xz_lines(file) if path.suffix == ".xz" else file, 1):
                    # A mark of the byte order, as some editors write it, is no text.
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if text.strip():
                        yield f"{path}:{number}", _json_row(text, f"{path}:{number}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason}); accepted: UTF-8, plain or .xz") from None
        except (lzma.LZMAError, EOFError) as error:
            raise ValueError(
                f"{path}: unreadable after line {number} ({error}); accepted: UTF-8, plain or .xz"
            ) from None


@dataclass(frozen=True)
class Parquet(Source):
    """A local Parquet file."""

    name: str = "parquet"
    path: str = ""
    columns: Columns = Columns()

    def documents(self) -> Iterator[Document]:
        path = existing(self.path)
        try:
            table = parquet.ParquetFile(path)
            chosen = self.columns.resolve(table.schema_arrow.names, str(path))
            for batch in table.iter_batches(columns=[name for name in chosen if name]):
                for row in batch.to_pylist():
                    yield document(row, chosen, str(path))
        except (ArrowInvalid, OSError, UnicodeDecodeError) as error:
            # What Arrow says of broken pages has no number of the system's.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{path}: {str(error).splitlines()[0]}; accepted: a Parquet file") from None


@dataclass(frozen=True)
class HuggingFace(Source):
    """A dataset by name, or a local dataset folder; `streaming` reads without downloading it whole."""

    KIND: ClassVar[str] = "hf"

    name: str = "hf"
    dataset: str = "AI-MO/NuminaMath-1.5"
    split: str = "train"
    streaming: bool = False
    max_documents: int | None = None
    columns: Columns = Columns()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"max_documents = {self.max_documents} of source {self.name!r}; accepted: at least 1")

    def documents(self) -> Iterator[Document]:
        chosen: tuple[str | None, str] | None = None
        for number, row in enumerate(islice(self._rows(), self.max_documents)):
            chosen = chosen or self.columns.resolve(list(row), self.dataset)
            yield document(row, chosen, f"{self.dataset} row {number}")

    def _rows(self) -> Iterator[dict[str, Any]]:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        # Of a dataset that is a script, it is a RuntimeError that says so.
        with reading(f"dataset {self.dataset!r}", "a local folder", DatasetsError, RuntimeError):
            yield from load_dataset(self.dataset, split=self.split, streaming=self.streaming)


# `--data NAME` on the command line: sources by a short name.
DATA_PRESETS: dict[str, tuple[Problems | HuggingFace, ...]] = {
    "problems": (Problems(),),
    "numinamath": (HuggingFace(name="numinamath", dataset="AI-MO/NuminaMath-1.5"),),
}


def existing(path: str) -> Path:
    """The path, or a ValueError that names it."""
    if not Path(path).is_file():
        raise ValueError(f"data file {path!r} does not exist; accepted: a .jsonl, .jsonl.xz or .parquet file")
    return Path(path)


def _xz_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of an .xz file, without their ends."""
    begun: list[bytes] = []
    for piece in _decompressed(file):
        *ends, rest = piece.split(b"\n")
        for end in ends:
            yield b"".join((*begun, end))
            begun.clear()
        begun.append(rest)
    if last := b"".join(begun):
        yield last


def _decompressed(file: BinaryIO) -> Iterator[bytes]:
    """What an .xz file holds, in pieces: all of its streams, with the padding between them left out. To `lzma.open`,
    what it cannot read behind a stream is the end of the file.

    Raises:
        LZMAError, EOFError: the file is no .xz, or not all of one.
    """
    stream = lzma.LZMADecompressor()
    for piece in iter(partial(file.read, DEFAULT_BUFFER_SIZE), b""):
        left = piece
        while left := (left.lstrip(b"\0") if stream.eof else left):
            if stream.eof:
                stream = lzma.LZMADecompressor()
            yield stream.decompress(left)
            left = stream.unused_data
    if not stream.eof:
        raise EOFError("it ends inside a stream")


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); accepted: one object a line"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {type(row).__name__}; accepted: one JSON object a line")
    return row


def document(row: dict[str, Any], columns: tuple[str | None, str], where: str) -> Document:
    """The document of a row; ValueError where what a column holds is no text."""
    prompt, completion = columns
    values = [row.get(name) if name else "" for name in (prompt, completion)]
    for name, value in zip((prompt, completion), values, strict=True):
        if value is None:
            raise ValueError(f"{where}: column {name!r} is missing or null; accepted: text")
        if not isinstance(value, str):
            raise ValueError(f"{where}: column {name!r} is {type(value).__name__}; accepted: text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: column {name!r} has {value[error.start]!r}; accepted: Unicode text") from None
    return Document(str(values[0]), str(values[1]))
