"""Models by shape, and where a model comes from: a preset with random weights, or a local folder in safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from cggr_ray.codec import nearest

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
    "llama-113m": Preset(16, 768, 12, 4, 2048, 16384),
    "e3": Preset(12, 1024, 16, 4, 3584, 32000),
    "smollm-135m": Preset(30, 576, 9, 3, 1536, 49152),
    "llama-1.5b": Preset(24, 2048, 32, 8, 8192, 49152),
    "gemma-3-4b": Preset(34, 2560, 8, 4, 10240, 262144, "gemma3"),
}
# Gemma 3's heads are wider than width / heads; one layer in six sees the whole document.
GEMMA_HEAD, GEMMA_WINDOW = 256, 1024
# Keys of a config.json that name code to be imported; a model folder with one of them is refused.
CODE_KEYS = ("auto_map", "_attn_implementation_internal", "trust_remote_code", "custom_pipelines")


@dataclass(frozen=True)
class ModelSpec:
    """Which model a race trains: a preset's name, or `folder` with config.json and *.safetensors.

    The rest applies to presets: `vocab_size` is the tokenizer's where it is not given, `max_positions` bounds a row.
    """

    preset: str = "tiny"
    folder: str | None = None
    vocab_size: int | None = None
    tie_embeddings: bool = True
    max_positions: int = 4096

    def __post_init__(self) -> None:
        if self.folder is None and self.preset not in PRESETS:
            raise ValueError(f"model preset {self.preset!r}; {nearest(self.preset, PRESETS)}")
        if self.folder is not None:
            check_folder(Path(self.folder))

    @property
    def name(self) -> str:
        return Path(self.folder).name if self.folder else self.preset

    def vocabulary(self, num_tokens: int) -> int | None:
        """The rows to give the embedding for a tokenizer of so many tokens; None leaves a folder's own.

        A preset without a size of its own takes the next multiple of 128, for the GEMMs.

        Raises:
            ValueError: the model has fewer rows than the tokenizer has tokens.
        """
        own = self.config().get_text_config().vocab_size if self.folder else self.vocab_size
        if own is not None and own < num_tokens:
            raise ValueError(f"model {self.name!r} with a vocabulary of {own}; "
                             f"accepted: at least the tokenizer's {num_tokens}")  # fmt: skip
        return None if self.folder else own or -(-num_tokens // 128) * 128

    def config(self, vocab_size: int | None = None) -> Any:
        """The Hugging Face configuration; `vocab_size` replaces a preset's own (a folder keeps its own)."""
        from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig

        if self.folder:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
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

    def build(self, vocab_size: int | None, seed: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The model on `device`, its parameters in `dtype`. Random weights depend on `seed` alone: drawn on the CPU in
        float32. Buffers keep their dtype, as when Hugging Face loads a model: rotary frequencies rounded to bf16 would
        turn far positions by a tenth of a radian."""
        from transformers import AutoModelForCausalLM

        model: Any
        if self.folder:
            model = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
            return model.to(device=device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(self.config(vocab_size), dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model.to(device=device)


def parameter_count(config: Any) -> int:
    """Parameters of a configuration, a shared one once, without allocating them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def check_folder(folder: Path) -> None:
    """Refuses what cannot be read safely, before anything is started.

    Raises:
        ValueError: no such folder, no config.json, no *.safetensors, or a config that is no JSON or names code.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder {str(folder)!r} has no config.json; accepted: config.json and *.safetensors")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"model folder {str(folder)!r} has no *.safetensors; accepted: weights in safetensors only")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}; accepted: JSON") from None
    named = [key for key in CODE_KEYS if key in config]
    if named:
        raise ValueError(f"{folder / 'config.json'} sets {named[0]!r}, which names code; accepted: a config without it")
