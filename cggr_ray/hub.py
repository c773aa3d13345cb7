"""Names on the Hugging Face hub: `owner/name`, or `owner/name@revision`, which pins a commit, a branch or a tag.

A name may be a local folder too. What cannot be read is one line that says so, and only safetensors and JSON are read;
a configuration that names code, in the repository or in another one, is refused before anything of it is used.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cggr_ray.files import FULL

# One of each is enough: weights are one file or several with an index.
CONFIG = ("config.json",)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Keys of a configuration that name code to be imported, wherever they stand in it.
CODE_KEYS = (
    *("auto_map", "trust_remote_code", "custom_pipelines", "custom_generate", "use_kernels", "kernel_config"),
    *("_attn_implementation_internal", "_experts_implementation_internal"),
)
# Ends of keys whose value is a known name, or else a repository with kernels to download and run.
IMPLEMENTATION = "_implementation"


class HubName(NamedTuple):
    """`revision` None is the newest there is."""

    repo: str
    revision: str | None


def parse(name: str) -> HubName:
    """`owner/name@revision` in its two parts."""
    repo, _, revision = name.partition("@")
    return HubName(repo, revision or None)


def is_cached(name: str, files: Sequence[str] = CONFIG) -> bool:
    """Whether one of the files of a repository is on this machine already; asks no network."""
    return any(_cached(name, file) for file in files)


def commit(name: str) -> str | None:
    """The commit that a name stands for on this machine; None where its configuration has not been read here."""
    found = _cached(name, CONFIG[0])
    return found.parent.name if found else None


def _cached(name: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    repo, revision = parse(name)
    found = try_to_load_from_cache(repo, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


@contextmanager
def reading(what: str, folder: str = "a local folder, in safetensors", *errors: type[Exception]) -> Iterator[None]:
    """Raises ValueError where the hub, or a folder, does not give what is read inside; a full disk is left as it is.

    Args:
        errors: what the library that reads raises, beside what all do.
    """
    from huggingface_hub.errors import StrictDataclassError

    unreadable: tuple[type[Exception], ...] = (OSError, ValueError, StrictDataclassError, *errors)
    try:
        yield
    except unreadable as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{what} cannot be read: {said.strip()}; accepted: a name on the Hugging Face hub that can "
                         f"be reached or is in its cache, or {folder}") from None  # fmt: skip


def check_readable(file: Path) -> None:
    """Raises PermissionError where this user may not read a file: others say of it that it is not there."""
    if file.exists() and not os.access(file, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))


def refuse_code(config: Any, where: str) -> None:
    """Raises ValueError where a configuration, or anything inside it, names code."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key in CODE_KEYS or (key.endswith(IMPLEMENTATION) and "/" in str(value)):
                raise ValueError(f"{where} sets {key!r}, which names code; accepted: a config without it")
            refuse_code(value, where)
    elif isinstance(config, list):
        for value in config:
            refuse_code(value, where)
