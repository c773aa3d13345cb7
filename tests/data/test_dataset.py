from __future__ import annotations

import errno
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cggr_ray.data import dataset
from cggr_ray.data.dataset import DataSpec, is_prepared, open_data, prepare
from cggr_ray.data.sources import Jsonl, Problems
from cggr_ray.data.store import TokenStore


@pytest.fixture
def spec(tmp_path: Path) -> DataSpec:
    lines = [json.dumps({"question": f"Q{i}?", "answer": f"ä{i}\n" * (i % 5 + 1)}) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return DataSpec((Problems(count=150), Jsonl("own", path=str(tmp_path / "a.jsonl"))), val_per_mille=100)


def texts(spec: DataSpec, store: TokenStore, folder: Path) -> list[tuple[str, str]]:
    """Prompt and completion of every document, decoded."""
    tokenizer = open_data(spec, folder).tokenizer
    found = []
    for d in range(store.documents):
        tokens = store.tokens[store.offsets[d] : store.offsets[d + 1]].tolist()
        assert tokens[0] == tokens[-1] == tokenizer.eos_token_id
        at = int(store.prompts[d])
        prompt, completion = tokenizer.decode(tokens[1:at]), tokenizer.decode(tokens[at:-1])
        assert store.text_bytes[:, d].tolist() == [len(prompt.encode()), len(completion.encode())]
        found.append((prompt, completion))
    return found


def test_every_document_is_in_one_split_and_complete(spec: DataSpec, tmp_path: Path) -> None:
    prepare(spec, tmp_path / "data")
    data = open_data(spec, tmp_path / "data")
    for source, train, val in zip(spec.sources, data.train, data.val, strict=True):
        expected = sorted((f"{d.prompt}\n", d.completion) for d in source.documents())
        both = [texts(spec, store, tmp_path / "data") for store in (train, val)]
        assert sorted(both[0] + both[1]) == expected
        assert 0.03 < len(both[1]) / len(expected) < 0.2


def test_held_out_documents_do_not_depend_on_their_neighbours(spec: DataSpec, tmp_path: Path) -> None:
    own = spec.sources[1]
    assert isinstance(own, Jsonl)
    path = Path(own.path)
    prepare(spec, tmp_path / "a")
    before = set(texts(spec, open_data(spec, tmp_path / "a").val[1], tmp_path / "a"))
    path.write_text("\n".join(reversed(path.read_text().splitlines()[50:])))
    prepare(spec, tmp_path / "b")
    after = set(texts(spec, open_data(spec, tmp_path / "b").val[1], tmp_path / "b"))
    assert after < before


def test_prepared_data_is_read_again_only_for_the_same_specification(spec: DataSpec, tmp_path: Path) -> None:
    prepare(spec, tmp_path / "data")
    said: list[str] = []
    prepare(spec, tmp_path / "data", said.append)
    assert not said
    prepare(DataSpec(spec.sources, val_per_mille=200), tmp_path / "data", said.append)
    assert said


def test_data_whose_last_file_found_no_room_is_prepared_again(
    spec: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, text: str, encoding: str | None = None) -> None:
        path.write_bytes(text.encode()[: len(text) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="No space left"):
            prepare(spec, tmp_path / "data")
    assert not is_prepared(spec, tmp_path / "data")
    prepare(spec, tmp_path / "data")
    assert is_prepared(spec, tmp_path / "data")


def test_data_is_on_the_disk_before_it_counts_as_prepared(
    spec: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, before = os.fsync, set[Path]()

    def seen(descriptor: int) -> None:
        if not (tmp_path / "data" / "ready.json").exists():
            before.add(Path(f"/proc/self/fd/{descriptor}").readlink())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    prepare(replace(spec, tokenizer="train", vocab_size=320), tmp_path / "data")
    files = {*tmp_path.glob("data/*/*/*.npy"), tmp_path / "data" / "tokenizer.json"}
    assert len(files) == 2 * 2 * 4 + 1 and files <= before


def test_data_of_another_specification_does_not_count_once_it_is_overwritten(
    spec: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(spec, tmp_path / "data")
    write, left = dataset.write_store, [1]

    def interrupted(*arguments: Any) -> int:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return write(*arguments)

    monkeypatch.setattr(dataset, "write_store", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(replace(spec, val_per_mille=200), tmp_path / "data")
    assert not is_prepared(spec, tmp_path / "data")


def test_a_second_process_waits_and_writes_nothing(
    spec: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would empty files that the first one's trials read already."""
    write, wrote = dataset.write_store, list[int]()
    second = threading.Thread(target=lambda: prepare(spec, tmp_path / "data"))

    def slow(*arguments: Any) -> int:
        wrote.append(threading.get_ident())
        if len(wrote) == 1:
            second.start()
            second.join(0.5)
        return write(*arguments)

    monkeypatch.setattr(dataset, "write_store", slow)
    prepare(spec, tmp_path / "data")
    second.join()
    assert wrote == [threading.get_ident()] * 4


def test_a_tokenizer_of_the_races_own(spec: DataSpec, tmp_path: Path) -> None:
    own = DataSpec(spec.sources, tokenizer="train", vocab_size=320, val_per_mille=100)
    prepare(own, tmp_path / "data")
    assert len(open_data(own, tmp_path / "data").tokenizer) == 320


def test_a_vocabulary_has_a_token_for_every_byte_and_one_more(spec: DataSpec, tmp_path: Path) -> None:
    smallest = DataSpec(spec.sources, tokenizer="train", vocab_size=257, val_per_mille=100)
    prepare(smallest, tmp_path / "data")
    assert len(open_data(smallest, tmp_path / "data").tokenizer) == 257
    with pytest.raises(ValueError, match=r"vocab_size = 256; accepted: at least 257"):
        replace(smallest, vocab_size=256)


def test_a_source_too_small_to_hold_out_from_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "alone"}\n')
    with pytest.raises(ValueError, match=r"'jsonl' has 1 training and 0 held-out documents; accepted"):
        prepare(DataSpec((Jsonl(path=str(tmp_path / "one.jsonl")),), val_per_mille=1), tmp_path / "data")
