"""A small model folder as a race leaves it: random weights, saved model and tokenizer, prepared problems."""

from __future__ import annotations

import pytest
import torch
from small_studies import Folders
from transformers import LlamaConfig, LlamaForCausalLM

from cggr_ray.data.dataset import DataSpec, open_data, prepare
from cggr_ray.data.sources import Problems

DATA = DataSpec((Problems(count=200),), row_tokens=64, val_per_mille=200, val_documents=12)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("race")
    prepare(DATA, root / "data")
    data = open_data(DATA, root / "data")
    config = LlamaConfig(
        vocab_size=-(-len(data.tokenizer) // 128) * 128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(root / "model")
    data.tokenizer.save_pretrained(root / "model")
    return Folders(root / "model", root / "data", data)
