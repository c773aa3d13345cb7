from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.muon import Muon
from cggr_ray.recipe import Recipe, explain, load_recipe, recipe_names
from cggr_ray.routing.curriculum import Curriculum
from cggr_ray.routing.rows import AllRows, FewerRows
from cggr_ray.routing.tokens import AllTokens, RandomTokens, SelectedTokens

PARTS = ["rows", "tokens", "objective", "optimizer", "updates"]


def test_the_baseline_comes_first_and_no_name_twice() -> None:
    names = recipe_names()
    assert names[0] == "baseline"
    assert len(names) == len(set(names)) >= 5


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_round_trips_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.description
    assert Recipe.from_plain(json.loads(json.dumps(recipe.to_plain()))) == recipe
    lines = explain(recipe)
    assert [part for part, _, _ in lines if "." not in part] == [*PARTS, "execution"]
    assert all(kind and meaning for _, kind, meaning in lines)


def test_parts_inside_parts_are_explained() -> None:
    inside = {part: kind for part, kind, _ in explain(load_recipe("e3/full"))}
    assert inside["optimizer.matrix"] == "galore" and inside["optimizer.matrix.rule"] == "muon"
    execution = next(meaning for part, _, meaning in explain(load_recipe("e3/full")) if part == "execution")
    assert "gradient checkpointing" in execution and "loader" in execution
    cached = load_recipe("static_suffix").with_values({"execution.activation_cache": {"memory_gib": 1.0}})
    assert explain(cached)[-1][0] == "execution.activation_cache"
    assert inside["optimizer.matrix.rule.state"] == "int8_blockwise" and inside["objective.form"] == "heads"


def test_the_baseline_is_neutral() -> None:
    baseline = load_recipe("baseline")
    assert baseline == Recipe("baseline", baseline.description)
    assert (baseline.rows, baseline.tokens) == (AllRows(), AllTokens())


def test_shipped_files_mean_what_they_say() -> None:
    cggr = load_recipe("cggr_loss").tokens
    assert isinstance(cggr, SelectedTokens)
    assert (cggr.keep, cggr.score, cggr.selection, cggr.curriculum.target_at) == (0.25, "combined", "stratified", 0.1)
    sparse = load_recipe("cggr_importance_sparse").tokens
    assert isinstance(sparse, SelectedTokens)
    assert (sparse.keep, sparse.score, sparse.plan, sparse.detach) == (0.6, "gnorm", "after", "live")
    assert (sparse.selection, sparse.weights, sparse.importance_floor) == ("importance", "inverse_probability", 0.15)
    assert sparse.curriculum == Curriculum(full_until=0.4, target_at=0.4, full_from=0.9)
    assert load_recipe("fewer_rows").rows == FewerRows(0.5)
    control = load_recipe("random_tokens").tokens
    assert isinstance(control, RandomTokens)
    assert (control.keep, control.curriculum) == (cggr.keep, cggr.curriculum)


def test_dotted_overrides() -> None:
    recipe = load_recipe("cggr_loss")
    changed = recipe.with_values(
        {"tokens.keep": 0.5, "optimizer.matrix": "adamw", "optimizer.matrix.lr": 1e-3, "rows": "fewer_rows"}
    )
    assert isinstance(changed.tokens, SelectedTokens)
    assert (changed.tokens.keep, changed.tokens.num_strata) == (0.5, 4)
    assert changed.optimizer.matrix == AdamW(lr=1e-3)
    assert changed.rows == FewerRows()
    assert recipe == load_recipe("cggr_loss")


def test_a_scale_may_be_the_word_that_takes_parts_out() -> None:
    recipe = Recipe("x").with_values({"optimizer.matrix.scale": "none"})
    assert recipe.optimizer.matrix == Muon(scale="none")
    assert Recipe.from_plain(recipe.to_plain()) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens.kep": 0.5}, r"unknown key 'tokens\.kep'; did you mean 'keep'\?"),
        ({"tokens.keep": 0.0}, r"keep = 0\.0; accepted"),
        ({"tokens.keep": "half"}, r"tokens\.keep = 'half'; accepted: float"),
        ({"tokens.score": "entropie"}, r"did you mean 'entropy'\?"),
        ({"optimiser.clip_norm": 1.0}, r"did you mean 'optimizer'\?"),
        ({"tokens": "selected_token"}, r"did you mean 'selected_tokens'\?"),
    ],
)
def test_a_wrong_override_names_the_nearest(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("cggr_loss").with_values(values)


def test_a_recipe_file_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[tokens]\nkind = "random_tokens"\nkeep = 0.125\n')
    assert load_recipe(str(path)) == Recipe("mine", tokens=RandomTokens(0.125))


def test_a_shipped_recipe_in_a_folder_keeps_its_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "family").mkdir()
    (tmp_path / "family" / "one.toml").write_text("[rows]\nkind = 'fewer_rows'\n")
    monkeypatch.setattr("cggr_ray.recipe.RECIPES", tmp_path)
    assert recipe_names() == ["baseline", "family/one"]
    assert load_recipe("family/one") == Recipe("family/one", rows=FewerRows())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens = [", "broken"),
        ('[token]\nkind = "random_tokens"', r"unknown key 'token'; did you mean 'tokens'"),
        ('[tokens]\nkind = "random_tokens"\nkeep = 2.0', r"keep = 2\.0"),
        ('[tokens]\nkind = "random_tokens"\nkeep = "x"', r"tokens\.keep = 'x'"),
        ("[tokens]\nkeep = 0.5", r"tokens\.kind = None"),
    ],
)
def test_a_bad_recipe_file_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(str(path))
    assert str(error.value).startswith("broken.toml: ")
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_names_the_nearest_and_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'basline'; did you mean 'baseline'\? accepted: .*random_tokens.*\.toml"):
        load_recipe("basline")
    with pytest.raises(ValueError, match=r"nowhere\.toml"):
        load_recipe(str(tmp_path / "nowhere.toml"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"updates": {"kind": "static_suffix"}, "tokens": {"kind": "depth_buckets"}}, "with tokens 'depth_buckets'"),
        (
            {"updates": {"kind": "static_suffix"}, "optimizer.matrix": {"kind": "galore", "full_rank": 0.2}},
            "'static_suffix' with full_rank = 0.2",
        ),
        (
            {"updates": {"kind": "dynamic_suffix", "relevance": "decrease"}, "optimizer.matrix": {"kind": "galore"}},
            "relevance = 'decrease' with GaLore, whose gradients are projected",
        ),
        ({"updates": {"kind": "random_blocks"}, "execution.cuda_graphs": True}, "'random_blocks' with cuda_graphs"),
    ],
)
def test_what_cannot_rest_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Recipe("x").with_values(values)
    assert "accepted: " in str(error.value) and "\n" not in str(error.value)
    Recipe("x").with_values({key: value for key, value in values.items() if key != "updates"})
    Recipe("x").with_values({"updates": values["updates"]})
