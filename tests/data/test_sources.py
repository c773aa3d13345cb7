from __future__ import annotations

import errno
import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets.exceptions import DatasetNotFoundError

from cggr_ray.data.sources import Columns, Document, HuggingFace, Jsonl, Parquet, Problems

TEXTS = [("What is 1 + 1?", "Two.\n#### 2"), ("Wie heißt π?", "Pi — ”π“ \U0001f967"), ("", "no prompt")]


def rows(prompt: str, completion: str) -> list[dict[str, Any]]:
    return [{"id": i, prompt: p, completion: c} for i, (p, c) in enumerate(TEXTS)]


def write_jsonl(path: Path, table: list[dict[str, Any]]) -> str:
    text = "\n\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(table)) + "\n"
    path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())
    return str(path)


def write_parquet(path: Path, table: list[dict[str, Any]]) -> str:
    parquet.write_table(pa.Table.from_pylist(table), path, row_group_size=2)
    return str(path)


WRITERS = {"a.jsonl": (Jsonl, write_jsonl), "a.jsonl.xz": (Jsonl, write_jsonl), "a.parquet": (Parquet, write_parquet)}


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("pair", [("question", "answer"), ("problem", "solution"), ("prompt", "completion")])
def test_the_usual_columns_are_found(tmp_path: Path, file: str, pair: tuple[str, str]) -> None:
    source, write = WRITERS[file]
    path = write(tmp_path / file, rows(*pair))
    assert list(source(path=path).documents()) == [Document(p, c) for p, c in TEXTS]


@pytest.mark.parametrize("file", WRITERS)
def test_text_has_no_prompt_and_named_columns_win(tmp_path: Path, file: str) -> None:
    source, write = WRITERS[file]
    table = [{"question": "q", "answer": "a", "text": "t", "note": "n"}]
    path = write(tmp_path / file, table)
    assert list(source(path=path).documents()) == [("q", "a")]
    assert list(source(path=path, columns=Columns(completion="text")).documents()) == [("", "t")]
    assert list(source(path=path, columns=Columns("note", "question")).documents()) == [("n", "q")]
    only = write(tmp_path / f"only_{file}", [{"text": "t", "note": "n"}])
    assert list(source(path=only).documents()) == [("", "t")]


@pytest.mark.parametrize("file", WRITERS)
def test_a_column_that_is_not_there_lists_those_that_are(tmp_path: Path, file: str) -> None:
    source, write = WRITERS[file]
    path = write(tmp_path / file, [{"left": "l", "right": "r"}])
    with pytest.raises(ValueError, match=r"\['left', 'right'\]; accepted: question/answer; problem/solution"):
        list(source(path=path).documents())
    with pytest.raises(ValueError, match=r"no column 'rigth'; accepted: left, right"):
        list(source(path=path, columns=Columns("left", "rigth")).documents())
    with pytest.raises(ValueError, match=r"'left' without a completion column"):
        list(source(path=path, columns=Columns("left")).documents())


@pytest.mark.parametrize("file", WRITERS)
def test_what_is_not_text_is_refused(tmp_path: Path, file: str) -> None:
    source, write = WRITERS[file]
    path = write(tmp_path / file, [{"question": "q", "answer": 4}])
    with pytest.raises(ValueError, match=r"a\.\S+: column 'answer' is int; accepted: text"):
        list(source(path=path).documents())


@pytest.mark.parametrize("source", [Jsonl, Parquet])
def test_a_missing_file_is_named(source: type[Jsonl] | type[Parquet]) -> None:
    with pytest.raises(ValueError, match=r"'nowhere/x\.jsonl' does not exist; accepted"):
        next(source(path="nowhere/x.jsonl").documents())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', r"bad\.jsonl:3: not JSON"),
        ('["b"]', r"bad\.jsonl:3: list; accepted: one JSON object a line"),
        ('{"other": "b"}', r"bad\.jsonl:3: column 'text' is missing or null; accepted: text"),
        ('{"text": null}', r"bad\.jsonl:3: column 'text' is missing or null; accepted: text"),
        ('{"text": "a\\ud800"}', r"bad\.jsonl:3: column 'text' has '\\ud800'; accepted: Unicode text"),
    ],
)
def test_a_broken_line_is_named_after_the_whole_ones(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{line}\n{{"text": "c"}}\n')
    documents = Jsonl(path=str(path)).documents()
    assert next(documents) == ("", "a")
    with pytest.raises(ValueError, match=message):
        next(documents)


def test_a_file_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    latin, torn, no_xz = tmp_path / "latin.jsonl", tmp_path / "torn.jsonl.xz", tmp_path / "no.jsonl.xz"
    latin.write_bytes(b'{"text": "a"}\n' * 40 + '{"text": "Größe"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl:41: not UTF-8 \(.*\); accepted: UTF-8, plain or \.xz"):
        list(Jsonl(path=str(latin)).documents())
    torn.write_bytes(lzma.compress(b'{"text": "a"}\n' * 1000)[:-20])
    no_xz.write_bytes(b'{"text": "a"}\n')
    for path in (torn, no_xz):
        with pytest.raises(ValueError, match=rf"{path.name}: unreadable"):
            list(Jsonl(path=str(path)).documents())


def a_stream(*texts: str) -> bytes:
    return lzma.compress(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts))


@pytest.mark.parametrize("padding", [0, 4, 8, 1 << 20])
def test_an_xz_file_of_several_streams_is_read_to_its_end(tmp_path: Path, padding: int) -> None:
    """`xz` pads them, and may end one inside a line."""
    path, long = tmp_path / "a.jsonl.xz", "".join(chr(0x4E00 + n % 9000) for n in range(300_000))
    whole = json.dumps({"text": "torn"}).encode() + b"\n"
    torn = [lzma.compress(part) for part in (whole[:7], b"", whole[7:])]
    path.write_bytes(bytes(padding).join([a_stream("a", "b"), *torn, a_stream(long, "c")]) + bytes(padding))
    assert [d.completion for d in Jsonl(path=str(path)).documents()] == ["a", "b", "torn", long, "c"]


@pytest.mark.parametrize("behind", [b"garbage", a_stream("c")[1:], bytes(4) + b"\xfd7zXY" + a_stream("c")[5:]])
def test_what_cannot_be_read_behind_an_xz_stream_is_no_end_of_the_file(tmp_path: Path, behind: bytes) -> None:
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(a_stream("a", "b") + behind)
    with pytest.raises(ValueError, match=r"a\.jsonl\.xz: unreadable after line 2 "):
        list(Jsonl(path=str(path)).documents())


def test_a_file_that_is_no_parquet_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for content in ("", "no parquet"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"x\.parquet: .*; accepted: a Parquet file"):
            next(Parquet(path=str(path)).documents())


def test_broken_pages_of_a_parquet_file_are_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, [{"question": f"What is {n}?", "answer": str(n)} for n in range(400)])
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + bytes(340) + whole[400:])
    with pytest.raises(ValueError, match=r"x\.parquet: .*; accepted: a Parquet file"):
        list(Parquet(path=str(path)).documents())


def test_a_parquet_column_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path, latin = tmp_path / "x.parquet", "Größe".encode("latin-1")
    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, len(latin)], np.int32)), pa.py_buffer(latin)]
    )
    parquet.write_table(pa.table({"text": text}), path)
    with pytest.raises(ValueError, match=r"x\.parquet: .*; accepted: a Parquet file"):
        list(Parquet(path=str(path)).documents())


def test_files_as_other_systems_write_them(tmp_path: Path) -> None:
    """A mark of the byte order, and lines that end with two characters."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"question": q, "answer": a}, ensure_ascii=False) for q, a in TEXTS]
    path.write_bytes(("\r\n".join(lines) + "\r\n").encode("utf-8-sig"))
    assert list(Jsonl(path=str(path)).documents()) == [Document(q, a) for q, a in TEXTS]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": -5}, "count = -5 of source 'problems'; accepted: at least 1 problem"),
        ({"count": 0}, "count = 0 "),
        ({"levels": (1, 9)}, r"levels = \[1, 9\] of source 'problems'; accepted: some of \[1, 2, 3, 4, 5\]"),
        ({"levels": ()}, r"levels = \[\]"),
        *(
            ({"name": name}, f"name = '{name}' of a source; accepted: ")
            for name in ("", "..", "../mine", "/mine", "a/")
        ),
    ],
)
def test_generated_problems_that_cannot_be_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Problems(**settings)


@pytest.fixture(scope="module")
def hub_offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Real `datasets` without a network and with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_local_dataset_folder_is_read_with_datasets(
    tmp_path: Path, hub_offline: None, form: str, streaming: bool
) -> None:
    write = write_parquet if form == "parquet" else write_jsonl
    write(tmp_path / f"train.{form}", rows("problem", "solution"))
    write(tmp_path / f"test.{form}", [{"id": 9, "problem": "held", "solution": "out"}])
    source = HuggingFace(dataset=str(tmp_path), streaming=streaming)
    assert list(source.documents()) == [Document(p, c) for p, c in TEXTS]
    limited = HuggingFace(dataset=str(tmp_path), streaming=streaming, max_documents=2)
    assert list(limited.documents()) == [Document(p, c) for p, c in TEXTS[:2]]
    assert list(HuggingFace(dataset=str(tmp_path), streaming=streaming, split="test").documents()) == [("held", "out")]
    wrong = HuggingFace(dataset=str(tmp_path), streaming=streaming, columns=Columns("problem", "id"))
    with pytest.raises(ValueError, match=r"row 0: column 'id' is int"):
        next(wrong.documents())


@pytest.mark.parametrize("most", [0, -1])
def test_a_dataset_of_no_documents_is_refused_at_once(most: int) -> None:
    with pytest.raises(ValueError, match=rf"max_documents = {most} of source 'hf'; accepted: at least 1"):
        HuggingFace(max_documents=most)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_folder_that_cannot_be_read_is_one_line(tmp_path: Path, hub_offline: None, streaming: bool) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows("problem", "solution"))
    source = HuggingFace(dataset=str(tmp_path), streaming=streaming)
    said = r"^dataset '.*' cannot be read: .*; accepted: .* or a local folder$"
    with pytest.raises(ValueError, match=said):
        next(replace(source, split="tset").documents())
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"problem": \n')
    with pytest.raises(ValueError, match=said):
        list(source.documents())
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / f"{tmp_path.name}.py").write_text("")
    with pytest.raises(ValueError, match=said):
        next(source.documents())


@pytest.mark.parametrize(
    "said", [ConnectionError("Couldn't reach 'a/b' on the Hub"), DatasetNotFoundError("Dataset 'a/b' doesn't exist")]
)
def test_a_dataset_that_the_hub_does_not_give_is_one_line(said: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise said

    monkeypatch.setattr("datasets.load_dataset", fails)
    with pytest.raises(ValueError, match=r"dataset 'a/b' cannot be read: .*'a/b'.*; accepted: .* or a local folder$"):
        next(HuggingFace(dataset="a/b").documents())


def test_a_disk_that_a_dataset_fills_is_no_mistake_in_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datasets.load_dataset", fails)
    with pytest.raises(OSError, match="No space left"):
        next(HuggingFace(dataset="a/b").documents())
