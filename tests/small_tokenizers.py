"""A tokenizer small enough to read: a token a letter, one end-of-text, fewer tokens than `small_models` have rows."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = 0
LETTERS = [chr(c) for c in range(ord(" "), ord("z"))]


def letters() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"<end>": END} | {letter: n for n, letter in enumerate(LETTERS, 1)}, "<end>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def tokens_of(text: str) -> list[int]:
    """As a document begins."""
    return [END, *(LETTERS.index(letter) + 1 for letter in text)]


def text_of(tokens: list[int]) -> str:
    return "".join(LETTERS[n - 1] for n in tokens if n != END)
