"""Trained weights: from a folder or by a hub name, of a text model or of one that reads images too; and back again."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_batches import LENGTHS, packed
from small_models import COMMON, small_model
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, PreTrainedModel

from cggr_ray import checkpoint
from cggr_ray.data.batch import Batch
from cggr_ray.data.dataset import DataSpec
from cggr_ray.data.tokenizer import SHIPPED, load_tokenizer
from cggr_ray.hub import is_cached, parse
from cggr_ray.learner import Learner
from cggr_ray.models.adapter import Adapter
from cggr_ray.models.presets import PRETRAINED_VALUES, ModelSpec
from cggr_ray.progress import Progress
from cggr_ray.race import RaceSpec
from cggr_ray.recipe import Recipe

CPU = torch.device("cpu")
IDS = torch.arange(20)[None] * 3 % 96
TEXT = Gemma3TextConfig(
    **COMMON,
    head_dim=16,
    sliding_window=6,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    query_pre_attn_scalar=9,
    rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
)
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A checkpoint of a tiny Gemma 3 that reads images, as the published ones are laid out, and its logits of text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=TEXT, vision_config=VISION))
    folder = tmp_path_factory.mktemp("hub")
    model.save_pretrained(folder)
    load_tokenizer(SHIPPED).save_pretrained(folder)
    return folder, logits(model)


def renamed(folder: Path, to: Path) -> Path:
    """The checkpoint with the names of newer versions."""
    to.mkdir()
    weights = load_file(folder / "model.safetensors")
    assert "language_model.model.layers.0.mlp.up_proj.weight" in weights
    new = {f"model.{name.replace('language_model.model.', 'language_model.')}": w for name, w in weights.items()}
    save_file(new, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


def test_the_text_model_of_one_that_reads_images(multimodal: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, expected = multimodal
    for where in (folder, renamed(folder, tmp_path / "new")):
        spec = ModelSpec(folder=str(where))
        model = spec.build(spec.vocabulary(96), 0, CPU, torch.float32)
        assert model.config.model_type == "gemma3_text" and not any("vision" in n for n, _ in model.named_parameters())
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert torch.equal(logits(model), expected)
        # Its own layers attend as Hugging Face's do: windows, both rotary embeddings, scales.
        shapes = Adapter(model).shapes
        assert [shape.window for shape in shapes] == [6, None, 6]


def test_a_step_on_it_and_its_export(multimodal: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    model = ModelSpec(folder=str(multimodal[0])).build(None, 0, CPU, torch.float32)
    trained(model)
    model.save_pretrained(tmp_path / "text")
    assert all(name.startswith(("model.layers", "model.embed", "model.norm")) for name in weights_of(tmp_path / "text"))
    again = ModelSpec(folder=str(tmp_path / "text")).build(None, 0, CPU, torch.float32)
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(again), multimodal[1])


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def trained(model: PreTrainedModel, **values: Any) -> Learner:
    """The learner after one step, the model's parameters being views of stacks."""
    micro = packed(LENGTHS, 21)
    recipe = Recipe("x").with_values({"optimizer.schedule.warmup_tokens": 0, **values})
    learner = Learner(recipe, Adapter(model), 0, 1000)
    learner.step(Batch((micro,), micro.labelled), Progress(0, 1.0, 100.0, 1000))
    return learner


def test_missing_weights_are_refused(multimodal: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder = renamed(multimodal[0], tmp_path / "part")
    weights = weights_of(folder)
    del weights["model.language_model.layers.1.mlp.up_proj.weight"], weights["model.language_model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 weights, as 'model\.layers\.1\.mlp\.up_proj\.weight'; accepted"):
        ModelSpec(folder=str(folder)).build(None, 0, CPU, torch.float32)


def in_cache(monkeypatch: pytest.MonkeyPatch, cache: Path, name: str, commit: str, folder: Path) -> None:
    """Puts a folder into a hub cache, as one of a repository's commits, and forbids the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "snapshots").mkdir(parents=True, exist_ok=True)
    (repository / "snapshots" / commit).symlink_to(folder, target_is_directory=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


def test_a_hub_name_and_a_pinned_commit(
    multimodal: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, old, new = "someone/gemma-tiny", "a" * 40, "b" * 40
    in_cache(monkeypatch, tmp_path / "cache", name, old, multimodal[0])
    other = small_model("gemma3")
    other.save_pretrained(tmp_path / "other")
    in_cache(monkeypatch, tmp_path / "cache", name, new, tmp_path / "other")
    assert parse(f"{name}@{old}") == (name, old) and is_cached(name) and not is_cached("someone/else")
    newest, pinned = ModelSpec(hub=name), ModelSpec(hub=f"{name}@{old}")
    assert newest.is_here and pinned.is_here and not ModelSpec(hub=f"{name}@{'c' * 40}").is_here
    assert torch.equal(logits(pinned.build(None, 0, CPU, torch.float32)), multimodal[1])
    assert torch.equal(logits(newest.build(None, 0, CPU, torch.float32)), logits(other))
    assert len(load_tokenizer(f"{name}@{old}")) == len(load_tokenizer(SHIPPED))
    with pytest.raises(ValueError, match=r"^model 'someone/else' cannot be read: .*; accepted: a name on the Hugging"):
        ModelSpec(hub="someone/else").config()
    with pytest.raises(ValueError, match=r"^tokenizer 'someone/else' cannot be read"):
        load_tokenizer("someone/else")


def test_code_in_a_hub_s_config_and_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_model("llama").save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    in_cache(monkeypatch, tmp_path / "cache", "someone/m", "a" * 40, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}}))
    with pytest.raises(ValueError, match=r"'auto_map', which names code; accepted"):
        ModelSpec(hub="someone/m").config()
    nested = config | {"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(nested))
    with pytest.raises(ValueError, match=r"'auto_map', which names code; accepted"):
        ModelSpec(hub="someone/m").build(None, 0, CPU, torch.float32)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    torch.save(weights_of(tmp_path / "m"), tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read: .*; accepted: .*safetensors"):
        ModelSpec(hub="someone/m").build(None, 0, CPU, torch.float32)


CODE: tuple[dict[str, Any], ...] = (
    {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
    {"auto_map": {"AutoModelForCausalLM": "someone/else--evil.Model"}},
    {"trust_remote_code": True},
    {"custom_pipelines": {"text-generation": {"impl": "evil.Pipe"}}},
    {"_attn_implementation_internal": "someone/evil"},
    {"attn_implementation": "someone/evil@main"},
    {"_attn_implementation": {"text_config": "paged|someone/evil"}},
    {"vision_config": {"layers": [{"auto_map": {"AutoConfig": "evil.Config"}}]}},
)


@pytest.mark.parametrize("named", CODE)
def test_a_folder_that_names_code_is_refused_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: dict[str, Any]
) -> None:
    small_model("llama").save_pretrained(tmp_path / "m")
    # Would say so if it were imported, from the folder or from the working directory.
    (tmp_path / "m" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "m"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    spec = ModelSpec(folder=str(tmp_path / "m"))
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | named))
    for read in (
        lambda: ModelSpec(folder=str(tmp_path / "m")),
        spec.config,
        lambda: spec.build(None, 0, CPU, torch.float32),
    ):
        with pytest.raises(ValueError, match=r"sets '\w+', which names code; accepted: a config without it"):
            read()
    assert not (tmp_path / "ran").exists()


def test_a_plain_implementation_in_a_config_is_no_code(tmp_path: Path) -> None:
    small_model("llama").save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"attn_implementation": "sdpa"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert ModelSpec(folder=str(tmp_path / "m")).config().num_hidden_layers > 0


def test_a_tokenizer_that_names_code_is_refused(tmp_path: Path) -> None:
    load_tokenizer(SHIPPED).save_pretrained(tmp_path / "t")
    assert len(load_tokenizer(tmp_path / "t")) == len(load_tokenizer(SHIPPED))
    path = tmp_path / "t" / "tokenizer_config.json"
    named = {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json of '.*' sets 'auto_map', which names code; accepted"):
        load_tokenizer(tmp_path / "t")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hub": "gemma"}, "model hub 'gemma'; accepted: owner/name"),
        ({"hub": "https://x/y/z"}, "model hub 'https://x/y/z'; accepted: owner/name"),
        ({"hub": "a/b", "folder": "c"}, "accepted: one of the two"),
        ({"folder": "c", "preset": "e3"}, "model 'c' with preset; accepted: with a preset alone"),
        ({"hub": "a/b", "vocab_size": 64, "max_positions": 9}, "with max_positions, vocab_size; accepted"),
    ],
)
def test_what_is_no_hub_name(values: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ModelSpec(**values)


# What a race does with trained weights


def race_of(**changes: Any) -> RaceSpec:
    return RaceSpec(**{"recipes": ("baseline",), "model": ModelSpec(hub="a/b@c"), **changes})


def test_trained_weights_get_a_learning_rate_of_their_own() -> None:
    assert race_of().recipe("baseline").optimizer.lr_scale == PRETRAINED_VALUES["optimizer.lr_scale"]
    assert race_of(model=ModelSpec("tiny")).recipe("baseline").optimizer.lr_scale == 1.0
    optimizer = race_of().recipe("baseline").optimizer
    for rule in (optimizer.matrix, optimizer.rest):
        assert 1e-5 <= optimizer.lr_scale * rule.lr <= 3e-5


@pytest.mark.parametrize("place", ["values", "arms"])
@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ({"optimizer.lr_scale": 0.5}, 0.5),
        ({"optimizer.matrix.lr": 1e-4}, 1.0),
        ({"optimizer": {"kind": "optimizer", "lr_scale": 0.25}}, 0.25),
        ({"optimizer.schedule.warmup_tokens": 7, "tokens": "all_tokens"}, PRETRAINED_VALUES["optimizer.lr_scale"]),
    ],
)
def test_a_learning_rate_that_a_race_sets_is_kept(place: str, values: dict[str, Any], scale: float) -> None:
    spec = race_of(values=values) if place == "values" else race_of(arms={"baseline": values})
    assert spec.recipe("baseline").optimizer.lr_scale == scale
    assert RaceSpec.from_plain(spec.to_plain()) == spec


def test_one_of_two_rates_is_not_enough_for_trained_weights(tmp_path: Path) -> None:
    small_model("llama").save_pretrained(tmp_path / "model")
    spec = race_of(model=ModelSpec(folder=str(tmp_path / "model")), values={"optimizer.matrix.lr": 2e-5})
    spec = replace(spec, data=DataSpec(row_tokens=16))
    with pytest.raises(ValueError, match=r"optimizer.rest.lr = 0.003, a rate for random weights, and the model's are"):
        spec.check()
    both = {**spec.values, "optimizer.rest.lr": 2e-5}
    replace(spec, values=both).check()
    with pytest.raises(ValueError, match=r"optimizer.matrix.lr = 0.02, a rate for random weights.*: less than 0.003"):
        replace(spec, values=both | {"optimizer.matrix.lr": 0.02}).check()


def test_seeds_of_trained_weights_have_an_order_of_their_own(tmp_path: Path) -> None:
    small_model("llama").save_pretrained(tmp_path / "model")
    spec = race_of(model=ModelSpec(folder=str(tmp_path / "model")), seeds=(0, 1), data=DataSpec(row_tokens=16))
    with pytest.raises(ValueError, match=r"seeds \[0, 1\] with trained weights.*accepted: order_by_seed = true"):
        spec.check()
    replace(spec, order_by_seed=True).check()


def test_a_recipe_of_the_user_s_own_keeps_its_rates(tmp_path: Path) -> None:
    (own := tmp_path / "own.toml").write_text(
        '[optimizer.matrix]\nkind = "muon"\nlr = 2e-5\n[optimizer.rest]\nkind = "adamw"\nlr = 1e-5\n'
    )
    (plain := tmp_path / "plain.toml").write_text('[tokens]\nkind = "all_tokens"\n')
    scales = [race_of(recipes=(str(path),)).recipe(str(path)).optimizer.lr_scale for path in (own, plain)]
    assert scales == [1.0, PRETRAINED_VALUES["optimizer.lr_scale"]]


def test_the_tokenizer_of_the_model() -> None:
    spec = race_of(data=DataSpec(tokenizer="model"))
    assert spec.data.tokenizer == "a/b@c" and RaceSpec.from_plain(spec.to_plain()) == spec
    with pytest.raises(ValueError, match=r"tokenizer 'model' with preset 'tiny'.*accepted: shipped, train"):
        race_of(model=ModelSpec("tiny"), data=DataSpec(tokenizer="model"))


def test_rows_longer_than_the_trained_positions(multimodal: tuple[Path, torch.Tensor]) -> None:
    model = ModelSpec(folder=str(multimodal[0]))
    race_of(model=model, data=DataSpec(row_tokens=64)).check()
    with pytest.raises(ValueError, match="row_tokens = 65; accepted: at most 64 positions"):
        race_of(model=model, data=DataSpec(row_tokens=65)).check()


# Export

ELSEWHERE = """
import sys
for name in ("cggr_ray", "trainables", "analysis", "search_spaces"):
    sys.modules[name] = None  # importing it fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"], found
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(20)[None] * 3 % 96).logits
    tokenizer, written = AutoTokenizer.from_pretrained(folder), model.generation_config
    assert written.eos_token_id == tokenizer.eos_token_id and written.use_cache
    tokens = torch.tensor(tokenizer("1 + 2").input_ids)
    save_file({"logits": logits, "tokens": tokens}, folder + ".safetensors")
"""


def test_a_trained_model_opens_elsewhere(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(SHIPPED)
    heads = {"objective": {"kind": "multi_token", "form": {"kind": "heads", "num_heads": 2}}}
    expected = {}
    for family, values in (("llama", heads), ("gemma3", {}), ("gpt2", {})):
        model = small_model(family)
        before = logits(model)
        learner = trained(model, **values)
        folder = tmp_path / family
        checkpoint.save_model(folder, learner.adapter.model, tokenizer, {})
        expected[folder] = logits(model)
        assert not torch.equal(before, expected[folder])
        inside = {id(p) for p in model.parameters()}
        assert bool(values) == any(id(p) not in inside for _, p in learner.named_parameters())
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, expected)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, truth in expected.items():
        found = load_file(f"{folder}.safetensors")
        torch.testing.assert_close(found["logits"], truth, rtol=0, atol=0)
        assert found["tokens"].tolist() == tokenizer("1 + 2").input_ids
