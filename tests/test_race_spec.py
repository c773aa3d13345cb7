"""A race's specification: what it accepts, its trials and arms, and files whose paths are relative to them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from cggr_ray.commands import specify
from cggr_ray.data.dataset import DataSpec, is_prepared, open_data, prepare
from cggr_ray.data.sources import HuggingFace, Jsonl, Parquet, Problems
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import RaceSpec, Trial, load_race, plan_trials
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
    save_file({}, races / "models" / "m" / "model.safetensors")
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
    # Or by the name that tables and reports have.
    assert load_race(race_file(races, f'{head}{tables.replace(".toml", "")}{data}"words"')) == spec
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
    assert specify(name, {"recipes": ["own.toml"]}, {"own:optimizer.lr_scale": 0.25}) == spec
    with pytest.raises(ValueError, match=r"arms\.owm: no such recipe in the race; did you mean 'own'"):
        specify(name, {"recipes": ["own.toml"]}, {"owm:optimizer.lr_scale": 0.25})


def test_a_value_for_an_arm_by_its_name_leaves_its_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.toml").write_text("description = 'mine'")
    name = race_file(tmp_path, 'recipes = ["baseline", "own.toml"]\n[arms."own.toml"]\n"optimizer.lr_scale" = 0.5')
    own = str(tmp_path.resolve() / "own.toml")
    spec = specify(name, {}, {"own:optimizer.clip_norm": 3.0})
    assert spec.arms == {own: {"optimizer.lr_scale": 0.5, "optimizer.clip_norm": 3.0}}
    monkeypatch.chdir(tmp_path)
    both = specify(name, {}, {"own:optimizer.clip_norm": 3.0, "own.toml:optimizer.matrix.lr": 0.01})
    assert both.arms == {own: {**spec.arms[own], "optimizer.matrix.lr": 0.01}}


def test_a_name_means_one_arm_and_an_arm_has_one_table(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "own.toml").write_text("")
    (tmp_path / "mine" / "own.toml").write_text("name = 'other'")
    (tmp_path / "mine" / "baseline.toml").write_text("name = 'another'")
    values = '"optimizer.lr_scale" = 0.5\n'
    twice = f'recipes = ["own.toml"]\n[arms."own.toml"]\n{values}[arms.own]\n{values}'
    with pytest.raises(
        ValueError, match=r"arms\.own beside another table of '.*/own\.toml'; accepted: one table an arm"
    ):
        load_race(race_file(tmp_path, twice))
    with pytest.raises(
        ValueError, match=r"'own' is the name of .*/mine/own\.toml, .*/own\.toml; accepted: the path of one"
    ):
        load_race(race_file(tmp_path, f'recipes = ["own.toml", "mine/own.toml"]\n[arms.own]\n{values}'))
    # A shipped recipe keeps its name, whatever a file is called.
    shipped = load_race(race_file(tmp_path, f'recipes = ["baseline", "mine/baseline.toml"]\n[arms.baseline]\n{values}'))
    assert shipped.arms == {"baseline": {"optimizer.lr_scale": 0.5}}


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
