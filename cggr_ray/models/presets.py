"""Models by shape, and where a model comes from: a preset with random weights, or weights in safetensors, from a local
folder or by a name on the Hugging Face hub.

Of a checkpoint that reads images too (Gemma 3 from 4B up), the text model alone is built and exported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from cggr_ray.codec import nearest, read_json
from cggr_ray.hub import HubName, check_readable, is_cached, parse, reading, refuse_code
from cggr_ray.models.families import check_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Preset(NamedTuple):
    """A model's shape. `vocabulary` is the published model's; a race sets its tokenizer's."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    family: Literal["llama", "gemma3"] = "llama"


PRESETS: dict[str, Preset] = {
    "tiny": Preset(4, 128, 4, 2, 384, 2048),
    "llama-24m": Preset(12, 384, 6, 2, 960, 8192),
    "llama-113m": Preset(16, 768, 12, 4, 2048, 16384),
    "e3": Preset(12, 1024, 16, 4, 3584, 32000),
    "smollm-135m": Preset(30, 576, 9, 3, 1536, 49152),
    "llama-1.5b": Preset(24, 2048, 32, 8, 8192, 49152),
    "llama-3.2-3b": Preset(28, 3072, 24, 8, 8192, 128256),
    "gemma-3-4b": Preset(34, 2560, 8, 4, 10240, 262144, "gemma3"),
}
# Gemma 3's heads are wider than width / heads; one layer in six sees the whole document.
GEMMA_HEAD, GEMMA_WINDOW = 256, 1024
# Of weights in several files.
INDEX = "model.safetensors.index.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Where the text model of a checkpoint stands that reads images too: as published, and as newer versions write it.
TEXT_OF_MULTIMODAL = {r"^(model\.)?language_model\.(model\.)?": "model."}
# The learning rates of the recipes are those of random weights. On trained ones 3e-3 becomes 2e-5: AdamW fine-tunes
# with 1e-5 to 3e-5, and Muon's update here has AdamW's size.
PRETRAINED_VALUES = {"optimizer.lr_scale": 2e-5 / 3e-3}


@dataclass(frozen=True)
class ModelSpec:
    """Which model a race trains: a preset's name; `folder` with config.json and *.safetensors; or `hub`, a name on the
    Hugging Face hub, `owner/name` or `owner/name@revision`.

    The rest applies to presets: `vocab_size` is the tokenizer's where it is not given, `max_positions` bounds a row.
    """

    preset: str = "tiny"
    folder: str | None = None
    hub: str | None = None
    vocab_size: int | None = None
    tie_embeddings: bool = True
    max_positions: int = 4096

    def __post_init__(self) -> None:
        if self.folder is not None and self.hub is not None:
            raise ValueError(f"model folder {self.folder!r} and hub {self.hub!r}; accepted: one of the two")
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if self.pretrained and (of_presets := given.keys() - {"folder", "hub"}):
            raise ValueError(f"model {self.name!r} with {', '.join(sorted(of_presets))}; accepted: with a preset alone")
        if self.pretrained is None and self.preset not in PRESETS:
            raise ValueError(f"model preset {self.preset!r}; {nearest(self.preset, PRESETS)}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"model vocab_size = {self.vocab_size}; accepted: at least the tokenizer's tokens")
        if self.hub is not None and not HUB_NAME.fullmatch(self.hub):
            raise ValueError(f"model hub {self.hub!r}; accepted: owner/name or owner/name@revision")
        if self.folder is not None and self.is_here:
            check_folder(Path(self.folder))

    @property
    def pretrained(self) -> str | None:
        """Where trained weights and their tokenizer are; None for a preset."""
        return self.folder or self.hub

    @property
    def name(self) -> str:
        return Path(self.folder).name if self.folder else self.hub or self.preset

    @property
    def is_here(self) -> bool:
        """Whether `config` can be read now: a folder may be written by a race that has not been run yet."""
        return Path(self.folder).exists() if self.folder else self.hub is None or is_cached(self.hub)

    @property
    def values(self) -> dict[str, Any]:
        """Recipe values that this model asks for, where a race says nothing about the learning rate."""
        return {} if self.pretrained is None else dict(PRETRAINED_VALUES)

    def vocabulary(self, num_tokens: int, rows_needed: Callable[[], int] | None = None) -> int | None:
        """The rows to give the embedding for a tokenizer of so many tokens; None leaves trained weights their own.

        A preset without a size of its own takes the next multiple of 128, for the GEMMs. Gemma's tokenizer has a token
        for images of which its text models have no row: `rows_needed`, asked then, says what documents need.

        Raises:
            ValueError: the model has fewer rows than the tokenizer has tokens, and than are needed.
        """
        own = self.config().vocab_size if self.pretrained else self.vocab_size
        if own is not None and own < num_tokens and (rows_needed is None or own < rows_needed()):
            raise ValueError(f"model {self.name!r} with a vocabulary of {own}; "
                             f"accepted: at least the tokenizer's {num_tokens}")  # fmt: skip
        return None if self.pretrained else own or -(-num_tokens // 128) * 128

    def config(self, vocab_size: int | None = None) -> Any:
        """The Hugging Face configuration of the text model; `vocab_size` replaces a preset's own.

        Raises:
            ValueError: a hub name or a folder that cannot be read, or a configuration that names code.
        """
        from transformers import Gemma3TextConfig, LlamaConfig

        if self.pretrained:
            return self._published(ask_hub=not self.is_here).get_text_config()
        shape = PRESETS[self.preset]
        common: dict[str, Any] = {
            "num_hidden_layers": shape.layers,
            "hidden_size": shape.width,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "intermediate_size": shape.ffn,
            "vocab_size": vocab_size or shape.vocabulary,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_positions,
            "use_cache": False,
        }
        if shape.family == "llama":
            return LlamaConfig(**common)
        return Gemma3TextConfig(
            **common, head_dim=GEMMA_HEAD, sliding_window=GEMMA_WINDOW, query_pre_attn_scalar=GEMMA_HEAD
        )

    def config_to_run(self) -> Any:
        """`config`, of a model that an adapter can run.

        Raises:
            ValueError: what `families.check_config` refuses too.
        """
        config = self.config()
        check_config(config)
        return config

    def _published(self, ask_hub: bool) -> Any:
        """The configuration as it was published, which may have more in it than a text model."""
        from transformers import AutoConfig, PretrainedConfig

        assert self.pretrained is not None
        if self.folder is not None:
            check_folder(Path(self.folder))
        repo, revision = self._repository
        where: dict[str, Any] = {"revision": revision, "local_files_only": not ask_hub}
        with reading(f"model {self.name!r}"):
            raw, _ = PretrainedConfig.get_config_dict(repo, **where)
        refuse_code(raw, f"config.json of {self.name!r}")
        with reading(f"model {self.name!r}"):
            return AutoConfig.from_pretrained(repo, **where, trust_remote_code=False)

    @property
    def _repository(self) -> HubName:
        return parse(self.hub) if self.hub else HubName(str(self.folder), None)

    def build(self, vocab_size: int | None, seed: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The model on `device`, its parameters in `dtype`. Random weights depend on `seed` alone: drawn on the CPU in
        float32. Buffers keep their dtype, as when Hugging Face loads a model: rotary frequencies rounded to bf16 would
        turn far positions by a tenth of a radian.

        Raises:
            ValueError: trained weights that cannot be read, that are not in safetensors, or that lack some.
        """
        from cggr_ray.models.random_weights import with_random_weights

        model: Any
        if self.pretrained:
            return self._load(dtype).to(device=device)
        model = with_random_weights(self.config(vocab_size), seed)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model.to(device=device)

    def _load(self, dtype: torch.dtype) -> Any:
        from transformers import AutoModelForCausalLM

        whole = self._published(ask_hub=True)
        text = whole.get_text_config()
        repo, revision = self._repository
        with reading(f"model {self.name!r}"), errors_only():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                repo,
                revision=revision,
                config=text,
                dtype=dtype,
                key_mapping=None if text is whole else TEXT_OF_MULTIMODAL,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        model, found = loaded
        if found["missing_keys"]:
            raise ValueError(f"model {self.name!r} lacks {len(found['missing_keys'])} weights, as "
                             f"{min(found['missing_keys'])!r}; accepted: a checkpoint with all of them")  # fmt: skip
        if text is not whole:
            # Else the names of the larger model would be written again, into the export of the text model.
            model._weight_conversions = None
        return model


@contextmanager
def errors_only() -> Iterator[None]:
    """Inside, Hugging Face does not list the weights of a checkpoint that a text model leaves out."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def parameter_count(config: Any) -> int:
    """Parameters of a configuration, a shared one once, without allocating them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def check_folder(folder: Path) -> None:
    """Refuses what cannot be read safely, before anything is started.

    Raises:
        ValueError: no such folder, no config.json, no *.safetensors or not all of them, one that is not whole, or a
            config that is no JSON or names code.
        PermissionError: this user may not read one of these.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder {str(folder)!r} has no config.json; accepted: config.json and *.safetensors")
    if not (weights := list(folder.glob("*.safetensors"))):
        raise ValueError(f"model folder {str(folder)!r} has no *.safetensors; accepted: weights in safetensors only")
    for file in weights:
        check_readable(file)
        try:
            safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file}: {error}; accepted: whole weights in safetensors") from None
    if (index := folder / INDEX).is_file():
        shards = set(read_json(index, "weight_map")["weight_map"].values())
        if missing := sorted(shards - {file.name for file in weights}):
            raise ValueError(
                f"model folder {str(folder)!r} has no {missing[0]}, which {INDEX} names; accepted: all files"
            )
    refuse_code(read_json(folder / "config.json"), str(folder / "config.json"))
