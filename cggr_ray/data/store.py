"""Tokenised documents on disk: flat arrays, memory-mapped, one folder a source and split.

    tokens.npy       uint16 or uint32, all documents one after the other, each [first, prompt, completion, end]
    offsets.npy      int64, document i is tokens[offsets[i]:offsets[i + 1]]
    prompts.npy      int32, tokens of document i up to and including its prompt
    text_bytes.npy   int32 (2, documents), bytes of prompt and of completion: what nats per byte divide by

Held-out documents are chosen by a hash of their text, so every race on the same data holds out the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cggr_ray.data.chat import Turns
from cggr_ray.data.sources import Document
from cggr_ray.data.tokenizer import first_token
from cggr_ray.files import flush

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

TOKENISE_AT_ONCE = 2048


@dataclass(frozen=True)
class TokenStore:
    """One source's documents of one split."""

    tokens: np.ndarray
    offsets: np.ndarray
    prompts: np.ndarray
    text_bytes: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        names = ("tokens", "offsets", "prompts", "text_bytes")
        # Plain views of the maps: slicing np.memmap itself costs several times as much.
        return cls(*(np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray) for n in names))

    @property
    def documents(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, both end markers included."""
        return np.diff(self.offsets)


def held_out(document: Document, per_mille: int) -> bool:
    """Whether a document belongs to validation: a hash of its text, the same on every machine."""
    text = f"{document.prompt}\n{document.completion}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") % 1000 < per_mille


def write_store(
    folder: Path, documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, chat: bool = False
) -> int:
    """Tokenises documents into `folder`, as turns of a chat if so asked, and waits until they are on the disk; returns
    how many."""
    first, end = first_token(tokenizer), tokenizer.eos_token_id
    spelled = Turns(tokenizer).document if chat else _plain
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    tokens: list[np.ndarray] = []
    prompts: list[int] = []
    text_bytes: list[tuple[int, int]] = []
    for group in _groups(map(spelled, documents)):
        heads = [d.prompt for d in group]
        encoded_heads, encoded_tails = encode(tokenizer, heads), encode(tokenizer, [d.completion for d in group])
        for head, head_ids, tail_ids, document in zip(heads, encoded_heads, encoded_tails, group, strict=True):
            tokens.append(np.array([first, *head_ids, *tail_ids, end], dtype=dtype))
            prompts.append(1 + len(head_ids))
            text_bytes.append((len(head.encode()), len(document.completion.encode())))
    folder.mkdir(parents=True, exist_ok=True)
    lengths = [len(t) for t in tokens]
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))
    np.save(folder / "prompts.npy", np.array(prompts, dtype=np.int32))
    np.save(folder / "text_bytes.npy", np.array(text_bytes, dtype=np.int32).reshape(-1, 2).T)
    np.save(folder / "tokens.npy", np.concatenate(tokens) if tokens else np.zeros(0, dtype))
    for path in (*folder.iterdir(), folder):
        flush(path)
    return len(tokens)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, whole and without special tokens. A Rust tokenizer is asked directly: masks and types
    cost more."""
    if not tokenizer.is_fast:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids
    core = tokenizer.backend_tokenizer
    # A tokenizer.json may ask for both.
    core.no_truncation()
    core.no_padding()
    return [found.ids for found in core.encode_batch_fast(texts, add_special_tokens=False)]


def _plain(document: Document) -> Document:
    """The prompt on a line of its own."""
    return Document(f"{document.prompt}\n" if document.prompt else "", document.completion)


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while group := list(islice(iterator, TOKENISE_AT_ONCE)):
        yield group
