"""A race's data: its specification, its preparation (tokenizer, token stores) and what a run opens.

Prepared once a race, in `<race>/data/`, and only read afterwards, so that all trials see the same bytes. `ready.json`
is written last, whole, when all else is on the disk: without it, or with that of other data, everything is written
again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cggr_ray.codec import read_json, to_plain
from cggr_ray.data.packing import RowOrder
from cggr_ray.data.sources import Document, HuggingFace, Jsonl, Parquet, Problems, existing
from cggr_ray.data.store import TokenStore, held_out, write_store
from cggr_ray.data.tokenizer import (
    SHIPPED,
    SMALLEST_VOCABULARY,
    is_file_name,
    load_tokenizer,
    train_bpe,
)
from cggr_ray.files import flush, write_whole
from cggr_ray.lock import only_writer
from cggr_ray.saying import Say, silent
from cggr_ray.seeds import check_seed

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# Documents a source gives to the training of a tokenizer.
TOKENIZER_DOCUMENTS = 50_000
READY, TOKENIZER = "ready.json", "tokenizer.json"

AnySource = Problems | Jsonl | Parquet | HuggingFace


@dataclass(frozen=True)
class DataSpec:
    """What a race reads.

    `tokenizer`: `shipped`, `train` (a BPE of `vocab_size` from the train split), `model` (that of the race's model,
    where this has trained weights), or a folder or name of a Hugging Face one. `chat` spells documents as its chat
    template does, which an instruction-tuned model knows. `val_per_mille` of the documents of every source are held out
    by a hash of their text.
    """

    sources: tuple[AnySource, ...] = field(default_factory=lambda: (Problems(),))
    row_tokens: int = 256
    mask_prompts: bool = False
    tokenizer: str = "shipped"
    chat: bool = False
    vocab_size: int = 8192
    val_per_mille: int = 20
    val_documents: int = 1000
    seed: int = 42

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"sources {names}; accepted: at least one, each with a name of its own")
        if self.chat and self.tokenizer in ("shipped", "train"):
            raise ValueError(f"chat = true with tokenizer {self.tokenizer!r}, which has no chat template; "
                             "accepted: chat = false, or the tokenizer of an instruction-tuned model")  # fmt: skip
        if self.row_tokens < 16:
            raise ValueError(f"row_tokens = {self.row_tokens}; accepted: at least 16")
        if not 1 <= self.val_per_mille <= 500:
            raise ValueError(f"val_per_mille = {self.val_per_mille}; accepted: 1 to 500")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size = {self.vocab_size}; accepted: at least {SMALLEST_VOCABULARY}, all bytes and one"
            )
        if self.val_documents < 1:
            raise ValueError(f"val_documents = {self.val_documents}; accepted: at least 1")
        check_seed("data seed", self.seed)
        if all(source.max_epochs is not None for source in self.sources):
            raise ValueError("every source has max_epochs; accepted: at least one without, to fill the budget")

    def check(self) -> None:
        """Looks at every local file, before anything is started."""
        own = self.tokenizer not in ("shipped", "train")
        if own and (is_file_name(self.tokenizer) or Path(self.tokenizer).is_dir()):
            load_tokenizer(self.tokenizer)
        for source in self.sources:
            if isinstance(source, Jsonl | Parquet):
                existing(source.path)
                next(source.documents(), None)

    def absent_files(self) -> list[str]:
        """Files that are to be put in their place."""
        files = {source.path: "data" for source in self.sources if isinstance(source, Jsonl | Parquet)}
        files |= {self.tokenizer: "tokenizer"} if is_file_name(self.tokenizer) else {}
        return [f"{what} file {path}" for path, what in files.items() if not Path(path).is_file()]

    def absent(self) -> list[str]:
        """What is not on this machine, or may not be: files to put in their place, datasets that the hub gives."""
        hub = [s.dataset for s in self.sources if isinstance(s, HuggingFace) and not Path(s.dataset).is_dir()]
        where = "the Hugging Face hub gives it, where it is not in the cache"
        return [*self.absent_files(), *(f"dataset {dataset}: {where}" for dataset in hub)]


@dataclass(frozen=True)
class PreparedData:
    """An opened, prepared dataset."""

    spec: DataSpec
    tokenizer: PreTrainedTokenizerBase
    train: tuple[TokenStore, ...]
    val: tuple[TokenStore, ...]

    @property
    def num_positions(self) -> int:
        """Tokens of all training streams; stable position ids are below it."""
        return sum(len(store.tokens) for store in self.train)

    def rows_needed(self) -> int:
        """Of an embedding, for the tokens that documents have; reads them all."""
        return 1 + max(int(store.tokens.max()) for store in (*self.train, *self.val))

    def order(self) -> RowOrder:
        sources, spec = self.spec.sources, self.spec
        return RowOrder(
            self.train,
            [s.weight for s in sources],
            [s.max_epochs for s in sources],
            spec.row_tokens,
            spec.mask_prompts,
            spec.seed,
            longest=max(int(store.lengths.max()) - 1 for store in (*self.train, *self.val)),
        )


def prepare(spec: DataSpec, folder: Path, say: Say = silent) -> None:
    """Writes the tokenizer and the stores into `folder` unless they are there for the same specification; waits for
    another process that does."""
    if is_prepared(spec, folder):
        return
    with only_writer(folder, wait_seconds=math.inf):
        if not is_prepared(spec, folder):
            (folder / READY).unlink(missing_ok=True)
            _write(spec, folder, say)


def _write(spec: DataSpec, folder: Path, say: Say) -> None:
    if spec.tokenizer == "train":
        say(f"training a tokenizer of {spec.vocab_size} tokens")
        train_bpe(_tokenizer_texts(spec), spec.vocab_size, folder / TOKENIZER)
        flush(folder / TOKENIZER)
    tokenizer = load_tokenizer(_tokenizer(spec, folder))
    counts = {}
    for source in spec.sources:
        say(f"tokenising {source.name}")
        held: list[Document] = []
        train = _without_held_out(source.documents(), spec.val_per_mille, held)
        counts[source.name] = write_store(folder / source.name / "train", train, tokenizer, spec.chat)
        write_store(folder / source.name / "val", held[: spec.val_documents], tokenizer, spec.chat)
        if not held or not counts[source.name]:
            raise ValueError(
                f"source {source.name!r} has {counts[source.name]} training and {len(held)} held-out documents; "
                "accepted: at least one of each (raise val_per_mille, or give more documents)"
            )
    write_whole(folder / READY, json.dumps({"spec": _plain(spec), "documents": counts}, indent=1))


def is_prepared(spec: DataSpec, folder: Path) -> bool:
    """Whether a folder holds the data of this very specification, in whatever order they are to be read."""
    ready = folder / READY
    if not ready.is_file():
        return False
    kept: dict[str, Any] = read_json(ready, "spec")["spec"]
    return kept | {"seed": spec.seed} == _plain(spec)


def open_data(spec: DataSpec, folder: Path) -> PreparedData:
    """What `prepare` wrote. The folder may have been moved since."""
    train = tuple(TokenStore.open(folder / s.name / "train") for s in spec.sources)
    val = tuple(TokenStore.open(folder / s.name / "val") for s in spec.sources)
    return PreparedData(spec, load_tokenizer(_tokenizer(spec, folder)), train, val)


def _plain(spec: DataSpec) -> Any:
    """As it reads back from JSON."""
    return json.loads(json.dumps(to_plain(spec)))


def _tokenizer(spec: DataSpec, folder: Path) -> str | Path:
    own = {"shipped": SHIPPED, "train": folder / TOKENIZER}
    return own.get(spec.tokenizer, spec.tokenizer)


def _tokenizer_texts(spec: DataSpec) -> Iterator[str]:
    for source in spec.sources:
        train = _without_held_out(source.documents(), spec.val_per_mille, [])
        for document in islice(train, TOKENIZER_DOCUMENTS):
            yield f"{document.prompt}\n{document.completion}"


def _without_held_out(documents: Iterator[Document], per_mille: int, held: list[Document]) -> Iterator[Document]:
    for document in documents:
        if held_out(document, per_mille):
            held.append(document)
        else:
            yield document
