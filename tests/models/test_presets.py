from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from cggr_ray.models.presets import PRESETS, ModelSpec, check_folder, parameter_count

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("llama-1.5b", 1.56e9),
        ("llama-3.2-3b", 3.21e9),
        ("llama-113m", 113e6),
        ("smollm-135m", 134.5e6),
        ("tiny", 1.05e6),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_by_hand(preset: str, published: float, tied: bool) -> None:
    layers, width, heads, kv_heads, ffn, vocabulary, _ = PRESETS[preset]
    attention = 2 * width * width + 2 * width * (width // heads) * kv_heads
    block = attention + 3 * width * ffn + 2 * width
    expected = vocabulary * width * (1 if tied else 2) + layers * block + width
    assert parameter_count(ModelSpec(preset, tie_embeddings=tied).config()) == expected
    if tied:
        assert expected == pytest.approx(published, rel=0.005)


def test_a_race_sets_the_vocabulary() -> None:
    small, large = (parameter_count(ModelSpec("tiny").config(v)) for v in (256, 512))
    assert large - small == 256 * 128


def test_a_preset_gets_the_tokenizer_s_rows_and_a_folder_keeps_its_own(tmp_path: Path) -> None:
    assert ModelSpec("tiny").vocabulary(257) == 384
    assert ModelSpec("tiny", vocab_size=300).vocabulary(300) == 300
    with pytest.raises(ValueError, match="'tiny' with a vocabulary of 300; accepted: at least the tokenizer's 301"):
        ModelSpec("tiny", vocab_size=300).vocabulary(301)
    # Like GPT-2's, an odd number of rows, as many as the tokenizer has tokens.
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=257, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    model.save_pretrained(tmp_path)
    assert ModelSpec(folder=str(tmp_path)).vocabulary(257) is None
    with pytest.raises(ValueError, match="a vocabulary of 257"):
        ModelSpec(folder=str(tmp_path)).vocabulary(258)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_random_weights_depend_on_the_seed_alone() -> None:
    spec = ModelSpec("tiny")
    torch.manual_seed(1)
    first = weights(spec.build(256, 7, CPU, torch.float32))
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = weights(spec.build(256, 7, CPU, torch.float32))
    assert torch.equal(before, torch.random.get_rng_state())
    half = weights(spec.build(256, 7, CPU, torch.bfloat16))
    other = weights(spec.build(256, 8, CPU, torch.float32))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert half[name].dtype == torch.bfloat16 and torch.equal(tensor.bfloat16(), half[name])
    name = "model.embed_tokens.weight"
    assert not torch.equal(first[name], other[name])


def test_rotary_frequencies_are_not_rounded(tmp_path: Path) -> None:
    spec = ModelSpec("tiny")
    exact = spec.build(256, 7, CPU, torch.float32)
    exact.save_pretrained(tmp_path / "saved")
    loaded = ModelSpec(folder=str(tmp_path / "saved"))
    for model in (spec.build(256, 7, CPU, torch.bfloat16), loaded.build(None, 7, CPU, torch.bfloat16)):
        assert model.dtype == torch.bfloat16
        assert torch.equal(model.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)


@pytest.fixture
def folder(tiny_model: PreTrainedModel, tmp_path: Path) -> Path:
    tiny_model.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back(folder: Path, tiny_model: PreTrainedModel, dtype: torch.dtype) -> None:
    spec = ModelSpec(folder=str(folder))
    loaded = spec.build(None, 3, CPU, dtype)
    assert spec.name == "mine"
    assert parameter_count(spec.config()) == sum(p.numel() for p in tiny_model.parameters())
    assert weights(loaded).keys() == weights(tiny_model).keys()
    for name, tensor in weights(tiny_model).items():
        assert torch.equal(weights(loaded)[name], tensor.to(dtype))


def test_a_folder_that_is_not_safe_is_refused(folder: Path) -> None:
    check_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(ValueError, match=r"'auto_map', which names code; accepted"):
        ModelSpec(folder=str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*\.safetensors; accepted"):
        ModelSpec(folder=str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json; accepted"):
        ModelSpec(folder=str(folder))


def test_weights_that_are_not_whole_are_refused(folder: Path) -> None:
    """Half a copy, what git keeps in the place of a large file, and a file that others name."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"version https://git-lfs.github.com/spec/v1\nsize 9\n", b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors: .*; accepted: whole weights in safetensors"):
            ModelSpec(folder=str(folder))
    first = folder / "model-00001-of-00002.safetensors"
    file.unlink()
    first.write_bytes(whole)
    shards = {"a": first.name, "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ValueError, match=r"has no model-00002-of-00002\.safetensors, which .*; accepted: all files"):
        ModelSpec(folder=str(folder))


@pytest.mark.parametrize("config", [{}, {"model_type": "nobody's"}, {"model_type": "llama", "num_hidden_layers": "x"}])
def test_a_configuration_that_transformers_refuses_is_one_line(folder: Path, config: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"^model 'mine' cannot be read: .*; accepted: .* a local folder, in safetensors$"
    ):
        ModelSpec(folder=str(folder)).config()


def test_a_vocabulary_has_a_token() -> None:
    for size in (0, -1):
        with pytest.raises(ValueError, match=rf"model vocab_size = {size}; accepted: at least"):
            ModelSpec(vocab_size=size)


def test_weights_that_may_not_be_read_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers says that there is no such file."""
    weights, access = folder / "model.safetensors", os.access
    weights.chmod(0)
    # The superuser may read everything.
    monkeypatch.setattr(os, "access", lambda path, mode: path != weights and access(path, mode))
    with pytest.raises(PermissionError, match=r"Permission denied: .*model\.safetensors"):
        ModelSpec(folder=str(folder)).config()


def test_a_config_that_is_not_json_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelSpec(folder=str(folder))


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'llama-113'; did you mean 'llama-113m'\? accepted: .*tiny"):
        ModelSpec("llama-113")
