"""The parts of multi-token prediction: what they own, how it is drawn, how weights move, what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import small_model

from cggr_ray.models.adapter import Adapter
from cggr_ray.objectives.extra_heads import IndependentHeads
from cggr_ray.objectives.multi_token import Heads, MultiToken, Sequential, SharedLogits, TrunkHeads
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.objectives.objective import Objective
from cggr_ray.progress import Progress
from cggr_ray.recipe import Recipe, load_recipe

FORMS: dict[str, Any] = {
    "shared_logits": SharedLogits(),
    "heads": Heads(3),
    "trunk_heads": TrunkHeads(3),
    "sequential": Sequential(),
}


def built(name: str, family: str = "llama", seed: int = 1, dtype: torch.dtype = torch.float32) -> Objective:
    return MultiToken(FORMS[name]).build(Adapter(small_model(family, dtype=dtype)), seed)


def test_extra_layers_are_hidden_matrices_and_the_rest_is_not() -> None:
    found = {}
    for name in FORMS:
        objective = built(name)
        named, hidden = dict(objective.named_parameters()), set(objective.hidden_names())
        assert hidden <= named.keys() and all(key.startswith("objective.") for key in named)
        found[name] = sorted(named.keys() - hidden), sum(named[key].ndim == 2 for key in hidden)
    norms = ["objective.embedding_norm.weight", "objective.hidden_norm.weight"]
    assert found == {
        "shared_logits": ([], 0),
        "heads": ([f"objective.heads.{i}.weight" for i in range(3)], 0),
        "trunk_heads": ([], 2 * 7),
        "sequential": ([*norms, "objective.join.weight"], 7),
    }


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("name", ["heads", "trunk_heads", "sequential"])
def test_weights_are_drawn_as_the_models_from_a_seed_of_their_own(name: str, family: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (dict(built(name, family, seed).named_parameters()) for seed in (1, 1, 2))
    half = dict(built(name, family, dtype=torch.bfloat16).named_parameters())
    assert torch.equal(before, torch.get_rng_state())
    model = {key.split(".")[-2]: p for key, p in small_model(family, seed=9).named_parameters() if p.ndim == 2}
    for key, p in first.items():
        assert torch.equal(p, again[key]) and torch.equal(half[key], p.bfloat16())
        if p.ndim == 1:
            assert (p == (0.0 if key.endswith("bias") or family == "gemma3" else 1.0)).all(), key
        else:
            assert not torch.equal(p, other[key])
            spread = model[key.split(".")[-2]].std().item() if key.startswith("objective.layers.") else 0.3
            assert p.std().item() == pytest.approx(spread, rel=0.15), key


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.0, [0.5, 0.25]),
        (1 / 6, [0.5, 0.125]),
        (1 / 3, [0.5, 0.0]),
        (0.5, [0.25, 0.0]),
        (2 / 3, [0.0, 0.0]),
        (1.0, [0.0, 0.0]),
    ],
)
def test_targets_fade_one_after_the_other(fraction: float, expected: list[float]) -> None:
    assert SharedLogits().weights_at(fraction) == pytest.approx(expected)


def test_no_head_counts_less_than_a_hundredth_of_the_weight() -> None:
    objective = Heads(9, 0.2).build(NextToken(), Adapter(small_model("llama")), 0)
    assert isinstance(objective, IndependentHeads)
    halves = [0.2, 0.1, 0.05, 0.025, 0.0125, 0.00625, 0.003125]
    assert objective.weights == pytest.approx([*halves, 0.002, 0.002], rel=1e-12)


def test_the_layer_that_sees_the_next_token_counts_less_later() -> None:
    def at(form: Sequential, fraction: float) -> float:
        return form.weight_at(Progress(0, fraction, 1.0, 0))

    assert [at(Sequential(), f) for f in (0.0, 0.67, 0.68, 1.0)] == pytest.approx([0.3, 0.3, 0.1, 0.1])
    ramp = Sequential(0.4, 0.0, 0.5, 1.0)
    assert [at(ramp, f) for f in (0.0, 0.5, 0.75, 1.0)] == pytest.approx([0.4, 0.4, 0.2, 0.0])


@pytest.mark.parametrize("name", ["shared_logits", "sequential"])
def test_weights_that_change_stay_where_a_graph_reads_them(name: str) -> None:
    objective: Any = built(name)
    where = objective._weights_J if name == "shared_logits" else objective._weight
    address, before = where.data_ptr(), where.clone()
    objective.begin(Progress(9, 0.9, 1.0, 0))
    assert where.data_ptr() == address and not torch.equal(where, before)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SharedLogits(()), "weights = []"),
        (lambda: SharedLogits((-0.5, 0.1)), "weights = [-0.5, 0.1]"),
        (lambda: SharedLogits((0.5,)), "phase_ends = [0.333"),
        (lambda: SharedLogits(phase_ends=(0.7, 0.3)), "phase_ends = [0.7, 0.3]"),
        (lambda: SharedLogits(phase_ends=(0.5, 1.1)), "phase_ends = [0.5, 1.1]"),
        (lambda: Heads(0), "num_heads = 0"),
        (lambda: Heads(weight=-1.0), "weight = -1.0"),
        (lambda: TrunkHeads(1), "num_tokens = 1"),
        (lambda: TrunkHeads(weight=float("inf")), "weight = inf"),
        (lambda: Sequential(weight_end=-0.1), "weight_end = -0.1"),
        (lambda: Sequential(anneal_from=0.8), "anneal_from = 0.8, anneal_until = 0.676"),
    ],
)
def test_mistakes_name_the_value(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match="accepted: ") as error:
        make()
    assert str(error.value).startswith(named) and "\n" not in str(error.value)


KEPT: dict[str, Any] = {"kind": "selected_tokens", "plan": "after"}
REFUSED: list[dict[str, Any]] = [
    KEPT,
    KEPT | {"plan": "two_pass"},
    KEPT | {"plan": "before", "score": "loss", "router": {"kind": "probe"}},
    {"kind": "random_tokens", "plan": "before"},
    {"kind": "skipped_tokens", "exit": 0},
    {"kind": "depth_buckets", "engine": "sparse"},
]
ACCEPTED: list[dict[str, Any]] = [
    {"kind": "all_tokens"},
    KEPT | {"plan": "dense"},
    {"kind": "random_tokens", "plan": "dense"},
    {"kind": "skipped_tokens", "exit": 1},
    {"kind": "depth_buckets", "engine": "every"},
    {"kind": "depth_buckets", "engine": "faithful"},
]


@pytest.mark.parametrize("tokens", REFUSED + ACCEPTED)
@pytest.mark.parametrize("name", FORMS)
def test_extra_layers_need_every_position(name: str, tokens: dict[str, Any]) -> None:
    values = {"tokens": tokens, "objective": {"kind": "multi_token", "form": {"kind": name}}}
    if tokens in ACCEPTED or name in ("shared_logits", "heads"):
        recipe = Recipe("x").with_values(values)
        assert Recipe.from_plain(recipe.to_plain()) == recipe
        return
    with pytest.raises(ValueError, match=r"accepted: all_tokens, plan 'dense'") as error:
        Recipe("x").with_values(values)
    assert "reads all positions" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", FORMS)
def test_shipped_recipes_have_the_defaults(name: str) -> None:
    objective = load_recipe(f"mtp_{name}").objective
    assert objective == MultiToken(type(FORMS[name])())
    assert load_recipe(f"mtp_{name}").with_values({"objective": "next_token"}).objective == Recipe("x").objective


def test_the_next_tokens_settings_are_keys_of_a_recipe() -> None:
    values = {"objective.next.label_smoothing": 0.1, "objective.next.entropy_bonus": 0.01}
    objective = load_recipe("mtp_heads").with_values(values).objective
    assert isinstance(objective, MultiToken)
    assert (objective.next.label_smoothing, objective.next.entropy_bonus) == (0.1, 0.01)
