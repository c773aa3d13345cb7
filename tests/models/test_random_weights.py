from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from scipy.stats import ks_2samp
from transformers import AutoModelForCausalLM, LlamaConfig

from cggr_ray.models.random_weights import with_random_weights
from tests.small_models import COMMON, CONFIGS

# One parameter in so many may look as if it were drawn otherwise.
UNLIKELY = 1e-6


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(name: str, seed: int = 7) -> dict[str, torch.Tensor]:
    return dict(with_random_weights(CONFIGS[name](), seed).named_parameters())


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_weights_are_distributed_as_hugging_face_draws_them(name: str) -> None:
    ours, theirs = drawn(name), AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    assert ours.keys() == dict(theirs.named_parameters()).keys()
    for which, expected in theirs.named_parameters():
        found = ours[which]
        assert found.dtype == torch.float32 and found.device.type == "cpu"
        if expected.unique().numel() == 1:
            assert torch.equal(found, expected), which
        else:
            same = ks_2samp(found.detach().flatten().numpy(), expected.detach().flatten().numpy())
            assert same.pvalue > UNLIKELY, which
    buffers = dict(with_random_weights(CONFIGS[name](), 0).named_buffers())
    assert all(torch.equal(buffers[which], buffer) for which, buffer in theirs.named_buffers())


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_no_two_weights_are_drawn_alike(name: str) -> None:
    found = [weight for weight in drawn(name).values() if weight.unique().numel() > 1]
    starts = {tuple(weight.flatten()[:8].tolist()) for weight in found}
    assert len(starts) == len(found)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_depend_on_the_seed_and_neither_on_threads_nor_on_the_process(name: str, threads: None) -> None:
    torch.set_num_threads(1)
    first = drawn(name)
    torch.set_num_threads(4)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    second, other = drawn(name), drawn(name, seed=8)
    assert torch.equal(before, torch.random.get_rng_state())
    for which, weight in first.items():
        assert torch.equal(weight, second[which]), which
        assert weight.unique().numel() == 1 or not torch.equal(weight, other[which]), which


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_weights_are_the_same_whatever_the_caller_has_for_defaults(name: str) -> None:
    """A device that would hold no weights, and a dtype that would round them."""
    expected = with_random_weights(CONFIGS[name](), 7).state_dict()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = with_random_weights(CONFIGS[name](), 7).state_dict()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for which, weight in expected.items():
        torch.testing.assert_close(found[which], weight, rtol=0, atol=0)


def test_a_layer_is_drawn_alike_in_a_deeper_model() -> None:
    deep = dict(with_random_weights(LlamaConfig(**COMMON | {"num_hidden_layers": 5}), 7).named_parameters())
    for which, weight in with_random_weights(LlamaConfig(**COMMON), 7).named_parameters():
        assert torch.equal(weight, deep[which]), which


def test_tied_weights_stay_tied() -> None:
    model = with_random_weights(CONFIGS["qwen2"](), 7)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
