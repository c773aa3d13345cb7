"""Tokenizers: the shipped byte-level BPE, one trained from a race's train split, or a Hugging Face one.

Digits are tokens of their own, so that arithmetic is spelled the same way everywhere. One special token ends documents,
and begins them where a tokenizer has none for that.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cggr_ray import hub
from cggr_ray.codec import read_json

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
SHIPPED = Path(__file__).with_name("tokenizer.json")
SHIPPED_VOCABULARY = 2048
# A token for every byte, and the one that ends documents.
SMALLEST_VOCABULARY = 257
# Words with their leading space, single digits, runs of punctuation, runs of white space.
PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a byte-level BPE on `texts` and writes it to `path` (tokenizer.json). Any text can be encoded with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def is_file_name(where: str | Path) -> bool:
    """Whether a tokenizer is a file; else it is a folder or a name."""
    return str(where).endswith(".json")


def existing_tokenizer(where: str | Path) -> None:
    """Raises ValueError where a tokenizer is a file that is not there, or its files are no JSON, of which `tokenizers`
    says neither the name nor by what type of exception."""
    if is_file_name(where) and not Path(where).is_file():
        raise ValueError(f"tokenizer file {str(where)!r} does not exist; accepted: a tokenizer.json, a folder, a name")
    own = Path(where) if is_file_name(where) else Path(where) / "tokenizer.json"
    if own.is_file():
        read_json(own, "model")
    if (config := Path(where) / "tokenizer_config.json").is_file():
        read_json(config)


def load_tokenizer(where: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a tokenizer.json, a local folder, or a Hugging Face name (`owner/name@revision` pins one).

    Raises:
        ValueError: it cannot be read, names code, or declares no end-of-text token, which separates packed documents.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    existing_tokenizer(where)
    if is_file_name(where):
        return PreTrainedTokenizerFast(tokenizer_file=str(where), eos_token=END_OF_TEXT)
    repo, revision = (str(where), None) if Path(where).is_dir() else hub.parse(str(where))
    with hub.reading(f"tokenizer {str(where)!r}"):
        config = get_tokenizer_config(repo, revision=revision)
    hub.refuse_code(config, f"tokenizer_config.json of {str(where)!r}")
    with hub.reading(f"tokenizer {str(where)!r}"):
        # Beside the model of a family whose tokenizers it knows, AutoTokenizer would split text as that family does.
        as_written = config.get("tokenizer_class") in (PreTrainedTokenizerFast.__name__, "PreTrainedTokenizerFast")
        kind: Any = PreTrainedTokenizerFast if as_written else AutoTokenizer
        tokenizer = kind.from_pretrained(repo, revision=revision, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {str(where)!r} has no end-of-text token; accepted: one that sets eos_token")
    return tokenizer


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What documents begin with: the token that the tokenizer itself puts before a text, else the end of the last."""
    ids: list[int] = tokenizer("a")["input_ids"]
    begins: bool = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    first: int = tokenizer.bos_token_id if begins else tokenizer.eos_token_id
    return first
