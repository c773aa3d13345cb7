"""Whether the recipes of a race fit its model, its device and its micro-batches, before anything starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cggr_ray.commands import check
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import RACES, RaceSpec, load_race


@pytest.mark.parametrize("name", [path.stem for path in RACES.glob("*.toml")])
def test_a_shipped_race_fits(name: str) -> None:
    load_race(name).check()


@pytest.mark.parametrize(
    ("recipe", "values", "least"),
    [
        ("cggr_model", {}, 5),
        ("cggr_model_sequence", {}, 5),
        ("cggr_seed", {}, 5),
        ("cggr_skip", {}, 5),
        ("cggr_model", {"tokens.router.layers": 6}, 7),
        ("cggr_model_sequence", {"rows.layers": 9}, 10),
        ("cggr_skip", {"tokens.entry": 0, "tokens.exit": 4}, 5),
        ("cggr_model", {"tokens.score": "loss", "tokens.router": {"kind": "probe", "layers": 4}}, 5),
    ],
)
def test_a_recipe_that_reads_more_layers_than_there_are(recipe: str, values: dict[str, Any], least: int) -> None:
    spec = RaceSpec(recipes=("baseline", recipe), arms={recipe: values})
    said = rf"^recipe '{recipe}': .*at least {least} layers, 'tiny' has 4; accepted: "
    with pytest.raises(ValueError, match=said) as error:
        spec.check()
    assert "\n" not in str(error.value)
    RaceSpec(recipes=("baseline", recipe), arms={recipe: values}, model=ModelSpec("llama-113m")).check()


@pytest.mark.parametrize(
    ("recipe", "values"),
    [
        ("baseline", {}),
        ("cggr_loss", {}),
        ("cggr_wrapper", {}),
        ("random_tokens", {}),
        ("cggr_model", {"tokens.router.layers": 3}),
        ("cggr_model", {"tokens.score": "loss", "tokens.router": {"kind": "stale_scores"}}),
        ("cggr_model_sequence", {"rows.layers": 3}),
        ("cggr_skip", {"tokens.entry": 0, "tokens.exit": 3}),
    ],
)
def test_what_reads_fewer_layers_fits(recipe: str, values: dict[str, Any]) -> None:
    RaceSpec(recipes=(recipe,), values=values).check()


def test_a_cache_of_activations_needs_an_embedding_that_rests() -> None:
    values = {"execution.activation_cache": {"memory_gib": 1.0}}
    spec = RaceSpec(recipes=("static_suffix",), values=values)
    untied = RaceSpec(recipes=("static_suffix",), values=values, model=ModelSpec(tie_embeddings=False))
    with pytest.raises(ValueError, match=r"^recipe 'static_suffix': .*tied to the embedding.*accepted: "):
        spec.check()
    untied.check()


DROPS_NOTHING = {"model_type": "gpt2", "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def model_folder(folder: Path, config: dict[str, Any]) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({}, folder / "model.safetensors")
    return ModelSpec(folder=str(folder))


@pytest.mark.parametrize("config", [DROPS_NOTHING | {"n_layer": 3}, {"model_type": "llama", "num_hidden_layers": 3}])
def test_layers_of_a_model_folder(config: dict[str, Any], tmp_path: Path) -> None:
    model = model_folder(tmp_path, config)
    RaceSpec(recipes=("cggr_model",), values={"tokens.router.layers": 2}, model=model).check()
    with pytest.raises(ValueError, match=r"at least 4 layers, .* has 3; accepted"):
        RaceSpec(recipes=("cggr_model",), values={"tokens.router.layers": 3}, model=model).check()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "gpt_neox"}, "model family 'gpt_neox'"),
        ({"model_type": "gpt2"}, "attn_pdrop = 0.1, resid_pdrop = 0.1, embd_pdrop = 0.1"),
        ({"model_type": "llama", "attention_dropout": 0.2}, "attention_dropout = 0.2"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"model_type": "qwen3", "head_dim": 512}, "head_dim = 512"),
    ],
)
def test_a_model_folder_that_no_trial_could_run(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    spec = RaceSpec(recipes=("baseline",), model=model_folder(tmp_path, config))
    with pytest.raises(ValueError, match=f"^{named}; accepted: "):
        spec.check()


def test_a_precision_that_the_device_has_not() -> None:
    spec = RaceSpec(recipes=("baseline",), values={"execution.precision": "fp32"}, device="cuda")
    with pytest.raises(ValueError, match=r"^recipe 'baseline': precision 'fp32' on a GPU; accepted: bf16, auto"):
        spec.check()
    for device in ("auto", "cpu"):
        replace(spec, device=device).check()
    replace(spec, values={"execution.precision": "bf16"}).check()


def test_a_precision_that_the_device_of_this_machine_has_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = RaceSpec(recipes=("baseline",), values={"execution.precision": "fp32"})
    check(replace(spec, device="cpu"), "train", None, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"precision 'fp32' on a GPU"):
        check(spec, "train", None, tmp_path)


@pytest.mark.parametrize("recipe", ["random_rows", "cggr_model_sequence"])
@pytest.mark.parametrize(
    ("global_rows", "micro_rows", "keep", "refused"),
    [
        (16, 16, 0.25, None),
        (16, 4, 0.25, None),
        (16, 1, 0.25, 1),
        (16, 6, 0.5, None),
        (16, 6, 0.25, 6),
        (10, 8, 0.25, 2),
        (12, 8, 0.25, None),
        (25, 25, 0.28, None),
        (9, 3, 0.3333, None),
        (9, 3, 0.33, 3),
        (5, 1, 1.0, None),
    ],
)
def test_a_micro_batch_has_to_hold_a_whole_share(
    recipe: str, global_rows: int, micro_rows: int, keep: float, refused: int | None
) -> None:
    spec = RaceSpec(
        recipes=("baseline", recipe),
        arms={recipe: {"rows.keep": keep}},
        global_rows=global_rows,
        micro_rows=micro_rows,
        model=ModelSpec("llama-113m"),
    )
    if refused is None:
        spec.check()
        return
    with pytest.raises(ValueError, match=rf"^recipe '{recipe}': keep = {keep} of .* of {refused} rows.*; accepted: "):
        spec.check()
