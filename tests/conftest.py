"""What several test modules share: hand-made token stores, and a model small enough for a laptop's core."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

    from cggr_ray.data.store import TokenStore

END = 0
# The models of the tests are too small to share out; this must be said before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads this when a kernel is defined. Without a GPU the kernels run in its interpreter, on CPU tensors.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-points", type=int, default=50, help="Points at which tests/faults kills a run.")


@pytest.fixture(scope="session")
def kernel_device() -> str:
    """Where a Triton kernel runs in this session: the GPU, or the CPU through the interpreter."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(scope="session")
def make_store() -> Callable[..., TokenStore]:
    """A store of documents of given lengths (tokens, end markers included): random tokens between end markers."""
    from cggr_ray.data.store import TokenStore

    def make(lengths: Sequence[int], seed: int = 0, vocabulary: int = 128, prompt_share: float = 0.4) -> TokenStore:
        rng = np.random.default_rng(seed)
        documents = [[END, *rng.integers(1, vocabulary, n - 2).tolist(), END] for n in lengths]
        prompts = [1 + int(prompt_share * (n - 2)) for n in lengths]
        return TokenStore(
            tokens=np.array([t for document in documents for t in document], np.uint16),
            offsets=np.array([sum(lengths[:i]) for i in range(len(lengths) + 1)], np.int64),
            prompts=np.array(prompts, np.int32),
            text_bytes=np.array([[2 * p for p in prompts], [3 * n for n in lengths]], np.int32),
        )

    return make


@pytest.fixture
def tiny_config() -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        use_cache=False,
        initializer_range=0.3,
    )


@pytest.fixture
def tiny_model(tiny_config: LlamaConfig) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return AutoModelForCausalLM.from_config(tiny_config, dtype=torch.float32)


@pytest.fixture
def small_tensors_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """State in 8 bits also of models as small as the tests', whose tensors are kept in float32 otherwise."""
    from cggr_ray.optim import state_formats

    monkeypatch.setattr(state_formats, "SMALLEST_TENSOR", 1)
