from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cggr_ray.commands import check, specify
from cggr_ray.data.dataset import DataSpec, is_prepared, open_data, prepare
from cggr_ray.data.sources import HuggingFace, Jsonl, Parquet, Problems
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import RACES, RaceSpec, Trial, load_race, plan_trials
from cggr_ray.routing.tokens import RandomTokens, SelectedTokens


def test_trials_of_a_seed_run_together_and_every_other_seed_is_reversed(tmp_path: Path) -> None:
    spec = RaceSpec(recipes=("baseline", "cggr_loss", "fewer_rows"), seeds=(7, 3, 5))
    trials = plan_trials(spec, tmp_path)
    assert [(t.recipe.name, t.seed) for t in trials] == [
        ("baseline", 7), ("cggr_loss", 7), ("fewer_rows", 7),
        ("fewer_rows", 3), ("cggr_loss", 3), ("baseline", 3),
        ("baseline", 5), ("cggr_loss", 5), ("fewer_rows", 5),
    ]  # fmt: skip
    assert len({t.folder for t in trials}) == 9
    assert {t.data_folder for t in trials} == {str(tmp_path.resolve() / "data")}
    assert all(Path(t.folder).is_absolute() and Path(t.folder).name == t.trial_id for t in trials)


def test_seeds_with_an_order_of_their_own_read_the_same_data(tmp_path: Path) -> None:
    small = DataSpec(sources=(Problems(count=300),), row_tokens=64, seed=40)
    spec = RaceSpec(recipes=("baseline", "fewer_rows"), seeds=(2, 3), order_by_seed=True, data=small)
    prepare(spec.data, tmp_path)
    first: dict[int, list[list[tuple[int, ...]]]] = {}
    for trial in plan_trials(spec, tmp_path):
        assert trial.race.data.seed == 40 + trial.seed and is_prepared(trial.race.data, tmp_path)
        rows = open_data(trial.race.data, tmp_path).order().first_rows(3)
        first.setdefault(trial.seed, []).append([tuple(row.tokens.tolist()) for row in rows])
    assert first[2][0] == first[2][1] and first[3][0] == first[3][1] and first[2][0] != first[3][0]


def test_an_arm_overrides_the_race(tmp_path: Path) -> None:
    spec = RaceSpec(
        recipes=("cggr_loss", "random_tokens"),
        values={"tokens.keep": 0.5, "optimizer.clip_norm": 2},
        arms={"random_tokens": {"tokens.keep": 0.4}},
    )
    first, second = (t.recipe for t in plan_trials(spec, tmp_path))
    assert isinstance(first.tokens, SelectedTokens) and isinstance(second.tokens, RandomTokens)
    assert (first.tokens.keep, second.tokens.keep) == (0.5, 0.4)
    assert first.optimizer.clip_norm == second.optimizer.clip_norm == 2.0


def test_a_trial_round_trips_through_json(tmp_path: Path) -> None:
    data = DataSpec(
        sources=(Problems(levels=(1, 2)), Jsonl(name="a", path="x.jsonl", weight=2.0, max_epochs=3), HuggingFace())
    )
    spec = RaceSpec(
        recipes=("cggr_loss",),
        seeds=(1, 2),
        milestones=(0.5,),
        model=ModelSpec("llama-113m", tie_embeddings=False),
        data=data,
        values={"tokens.keep": 0.5},
        arms={"cggr_loss": {"tokens.curriculum": {"target_at": 0.2}, "execution.gradient_checkpointing": "block"}},
        step_seconds=0.5,
    )
    for trial in plan_trials(spec, tmp_path):
        again = Trial.from_plain(json.loads(json.dumps(trial.to_plain())))
        assert again == trial
        assert again.race.recipe("cggr_loss") == trial.recipe


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"budget_seconds": 0}, r"budget of 0\.0 seconds; accepted"),
        ({"budget_seconds": math.nan}, r"nan.*accepted"),
        ({"budget_seconds": "30"}, r"budget_seconds = '30'; accepted: float"),
        ({"seeds": [1, 1]}, r"seeds \[1, 1\]; accepted"),
        ({"seeds": []}, r"seeds \[\]; accepted"),
        ({"name": "a/b"}, r"name = 'a/b'; accepted: the name of a folder"),
        ({"seeds": [-1]}, r"seeds \[-1\]; accepted"),
        ({"seeds": [2**63]}, r"seeds \[9223372036854775808\]; accepted"),
        ({"tuning": {"seconds": 1.0, "seed": 2**63, "values": [{"optimizer.lr_scale": 1.0}]}}, r"seed = 9.*; accepted"),
        ({"recipes": []}, r"recipes \[\]; accepted"),
        ({"recipes": ["baseline", "baseline"]}, r"recipes .*; accepted"),
        ({"micro_rows": 32, "global_rows": 16}, r"micro_rows = 32; accepted: 1 to global_rows = 16"),
        ({"micro_rows": 0}, r"micro_rows = 0; accepted"),
        ({"milestones": [0.0]}, r"milestones \[0\.0\]; accepted"),
        ({"milestones": [0.5, 1.5]}, r"milestones .*; accepted"),
        ({"milestones": [math.nan]}, r"milestones .*; accepted"),
        ({"checkpoint_every_seconds": -1.0}, r"checkpoint_every_seconds = -1\.0; accepted: a positive"),
        ({"checkpoint_every_seconds": 0}, r"checkpoint_every_seconds = 0\.0; accepted: a positive"),
        ({"checkpoint_every_seconds": math.inf}, r"checkpoint_every_seconds = inf; accepted: a positive number"),
        ({"step_seconds": math.inf}, r"step_seconds = inf; accepted"),
        ({"step_seconds": 0.0}, r"step_seconds = 0\.0; accepted"),
        ({"step_seconds": -1.0}, r"step_seconds = -1\.0; accepted"),
        ({"arms": {"cggr_los": {}}}, r"arms\.cggr_los.*did you mean 'cggr_loss'\?"),
        ({"device": "gpu"}, r"device = 'gpu'.*cuda"),
        ({"budget": 3}, r"unknown key 'budget'; did you mean 'budget_seconds'\?"),
        ({"model": {"preset": "tinny"}}, r"'tinny'; did you mean 'tiny'\?"),
        ({"data": {"row_tokens": 8}}, r"row_tokens = 8; accepted"),
        ({"data": {"seed": -1}}, r"data seed = -1; accepted: from 0 to 2\^63 - 1"),
        ({"data": {"seed": 2**63}}, r"data seed = 9\d+; accepted"),
        (
            {"data": {"sources": [{"kind": "problems", "seed": -1}]}},
            r"seed = -1 of source 'problems'; accepted: from 0",
        ),
        ({"data": {"val_documents": 0}}, r"val_documents = 0; accepted"),
        ({"data": {"val_per_mille": 0}}, r"val_per_mille = 0; accepted"),
        ({"data": {"sources": []}}, r"sources \[\]; accepted"),
        ({"data": {"sources": ["problems", "problems"]}}, r"sources .*; accepted"),
        ({"data": {"sources": [{"kind": "problems", "max_epochs": 1}]}}, r"max_epochs; accepted"),
        ({"data": {"sources": [{"kind": "problems", "weight": 0.0}]}}, r"weight = 0\.0.*accepted"),
        ({"data": {"sources": [{"kind": "problems", "weight": math.inf}]}}, r"weight = inf.*accepted"),
        ({"data": {"sources": [{"kind": "jsonlines"}]}}, r"'jsonlines'; did you mean 'jsonl'\?"),
    ],
)
def test_an_impossible_race_says_what_is_accepted(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        RaceSpec.from_plain(plain)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_is_found_while_planning(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'cggr_los'; did you mean 'cggr_loss'"):
        plan_trials(RaceSpec(recipes=("baseline", "cggr_los")), tmp_path)


def test_a_value_that_does_not_fit_an_arm_is_found_while_planning(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown key 'tokens\.keep'"):
        plan_trials(RaceSpec(recipes=("baseline",), values={"tokens.keep": 0.5}), tmp_path)


def test_two_recipes_that_would_share_a_folder_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "baseline.toml"
    other.write_text("description = 'another one'")
    with pytest.raises(ValueError, match=r"baseline-s0.*accepted"):
        plan_trials(RaceSpec(recipes=("baseline", str(other))), tmp_path)


def race_file(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_paths_are_relative_to_the_race_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere, races = tmp_path / "elsewhere", tmp_path / "races"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (races / "models" / "m").mkdir(parents=True)
    (races / "models" / "m" / "config.json").write_text("{}")
    (races / "models" / "m" / "model.safetensors").touch()
    absolute = tmp_path / "c.jsonl"
    name = race_file(
        races,
        f"""
        [model]
        folder = "models/m"
        [data]
        sources = [
            {{ kind = "jsonl", name = "a", path = "../a.jsonl" }},
            {{ kind = "parquet", name = "b", path = "b.parquet" }},
            {{ kind = "jsonl", name = "c", path = "{absolute}" }},
            "problems",
        ]
        """,
    )
    spec = load_race(name)
    assert spec.name == "mine"
    assert spec.model.folder == str((races / "models" / "m").resolve())
    assert spec.data.sources == (
        Jsonl("a", path=str((tmp_path / "a.jsonl").resolve())),
        Parquet("b", path=str((races / "b.parquet").resolve())),
        Jsonl("c", path=str(absolute.resolve())),
        Problems(),
    )
    with pytest.raises(ValueError, match=r"a\.jsonl.*does not exist"):
        spec.data.check()


def test_names_of_what_lies_beside_the_race_file_are_its_paths(tmp_path: Path) -> None:
    """Recipes wherever they are named; a tokenizer and a dataset where there is one, else a name on the hub."""
    races = tmp_path.resolve() / "races"
    (races / "words").mkdir(parents=True)
    (races / "shipped").mkdir()
    (races / "own.toml").write_text("description = 'mine'")
    own, words = str(races / "own.toml"), str(races / "words")
    head = 'recipes = ["baseline", "own.toml"]\nglobal_rows = 4\nmicro_rows = 4\n'
    tables = '[arms."own.toml"]\n"optimizer.lr_scale" = 0.5\n[batches."own.toml"]\nglobal_rows = 2\n'
    data = '[data]\nsources = [{kind = "hf", dataset = "words"}, {kind = "hf", name = "hub"}]\ntokenizer = '
    spec = load_race(race_file(races, f'{head}{tables}{data}"words"'))
    assert spec.recipes == ("baseline", own) and spec.recipe(own).optimizer.lr_scale == 0.5
    assert spec.rows_of(own) == (2, 2) and spec.data.tokenizer == words
    assert [getattr(source, "dataset", None) for source in spec.data.sources] == [words, "AI-MO/NuminaMath-1.5"]
    assert load_race(race_file(races, f'{head}{data}"shipped"')).data.tokenizer == "shipped"


def test_names_on_the_command_line_are_paths_below_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "races").mkdir()
    (tmp_path / "own.toml").write_text("description = 'mine'")
    (tmp_path / "races" / "own.toml").write_text("description = 'another one'")
    name = race_file(tmp_path / "races", 'recipes = ["baseline", "own.toml"]\n[arms."own.toml"]\n"clip_norm" = 3.0')
    monkeypatch.chdir(tmp_path)
    own = str(tmp_path.resolve() / "own.toml")
    spec = specify(name, {"recipes": ["own.toml"]}, {"own.toml:optimizer.lr_scale": 0.25})
    assert spec.recipes == (own,) and spec.arms == {own: {"optimizer.lr_scale": 0.25}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = [", "mine"),
        ("seedz = [1]", r"did you mean 'seeds'"),
        ("data = 3", r"data = 3; accepted: a table"),
        ("model = 'tiny'", r"model = 'tiny'; accepted: a table"),
        ("data.sources = 3", r"data\.sources = 3; accepted: a list"),
        ("data.sources = [3]", r"data\.sources\[0\] = 3; accepted"),
        ("data.sources = [{kind = 'jsonl', path = 3}]", r"data\.sources\[0\]\.path = 3; accepted: str"),
        ("model.folder = 3", r"model\.folder = 3; accepted: str"),
        ("model.folder = '.'", r"has no config\.json"),
    ],
)
def test_a_bad_race_file_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_race(race_file(tmp_path, text))
    assert str(error.value).startswith("mine.toml: ")
    assert "\n" not in str(error.value)


def test_an_unknown_race_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown race 'nope'"):
        load_race("nope")


# Whether recipes fit the model and the micro-batches


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
    (folder / "model.safetensors").touch()
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
