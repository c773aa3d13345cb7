"""Arithmetic limits against figures worked out by hand, weights counted on a model, and keys counted one by one."""

from __future__ import annotations

import pytest
import torch
from small_models import small_model
from transformers import AutoModelForCausalLM

from cggr_ray.benchmarks import suffixes as module
from cggr_ray.benchmarks.costs import Costs, costs_of, mean_keys
from cggr_ray.benchmarks.suffixes import Suffixes
from cggr_ray.benchmarks.timing import Timing
from cggr_ray.models.adapter import Adapter
from cggr_ray.models.families import Family
from cggr_ray.models.presets import ModelSpec


def model_on_paper(preset: str) -> tuple[Family, Costs, int]:
    positions = {"smollm-135m": 1024, "gemma-3-4b": 2048}[preset]
    config = ModelSpec(preset=preset).config()
    with torch.device("meta"):
        family = Family(AutoModelForCausalLM.from_config(config))
    shapes = [family.shape(i) for i in range(len(family.layers))]
    vocabulary, width = family.head_VD.shape
    return family, costs_of(shapes, width, config.intermediate_size, vocabulary, positions), positions


@pytest.fixture(scope="module")
def smollm() -> tuple[Family, Costs, int]:
    return model_on_paper("smollm-135m")


@pytest.fixture(scope="module")
def gemma() -> tuple[Family, Costs, int]:
    return model_on_paper("gemma-3-4b")


def test_smollm_in_mflop_a_token(smollm: tuple[Family, Costs, int]) -> None:
    costs = smollm[1]
    # 30 layers of 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 weights; a head of 49152 * 576.
    assert [round(x / 1e6, 1) for x in (costs.matrices, costs.attention, costs.head)] == [212.3, 35.4, 56.6]
    assert costs.kv_share == pytest.approx(2 * 192 / (2 * 576 + 2 * 192 + 3 * 1536))


@pytest.mark.parametrize("name", ["smollm", "gemma"])
def test_products_are_the_weights_of_the_model(name: str, request: pytest.FixtureRequest) -> None:
    family, costs, _ = request.getfixturevalue(name)
    matrices = [p for layer in family.layers for p in layer.parameters() if p.ndim == 2]
    projections = [p for layer in family.layers for n, p in layer.named_parameters() if "k_proj" in n or "v_proj" in n]
    assert costs.matrices == 2 * sum(p.numel() for p in matrices)
    assert costs.head == 2 * family.head_VD.numel()
    assert costs.kv_share == pytest.approx(sum(p.numel() for p in projections) / sum(p.numel() for p in matrices))


@pytest.mark.parametrize("name", ["smollm", "gemma"])
def test_attention_is_two_products_for_every_pair(name: str, request: pytest.FixtureRequest) -> None:
    family, costs, positions = request.getfixturevalue(name)
    total = 0
    for i in range(len(family.layers)):
        shape = family.shape(i)
        pairs = sum(min(t + 1, shape.window or positions) for t in range(positions))
        # Scores and the sum of values, a multiplication and an addition each.
        total += 2 * 2 * shape.heads * shape.head_dim * pairs
    assert costs.attention == pytest.approx(total / positions, rel=1e-12)


@pytest.mark.parametrize("positions", [1, 2, 7, 32, 100])
@pytest.mark.parametrize("window", [None, 1, 2, 6, 7, 31, 99, 100, 5000])
def test_keys_counted_one_by_one(positions: int, window: int | None) -> None:
    seen = [len([j for j in range(i + 1) if window is None or i - j < window]) for i in range(positions)]
    assert mean_keys(positions, window) == pytest.approx(sum(seen) / positions, rel=1e-12)


@pytest.mark.parametrize(
    "name, ratio, own, live, expected",
    [
        ("smollm", 0.25, True, False, 2.02),
        ("smollm", 0.25, False, False, 2.26),
        ("smollm", 0.5, True, False, 1.51),
        ("gemma", 0.25, True, False, 2.00),
        ("gemma", 0.25, False, False, 2.22),
    ],
)
def test_limits_worked_out_by_hand(
    name: str, ratio: float, own: bool, live: bool, expected: float, request: pytest.FixtureRequest
) -> None:
    costs = request.getfixturevalue(name)[1]
    assert round(costs.limit(ratio, own=own, live=live), 2) == expected


def test_keeping_everything_saves_nothing(smollm: tuple[Family, Costs, int]) -> None:
    costs = smollm[1]
    for own in (False, True):
        for live in (False, True):
            assert costs.limit(1.0, own=own, live=live) == pytest.approx(1.0)


def test_nothing_kept_is_a_forward(smollm: tuple[Family, Costs, int]) -> None:
    """With the model's own scores all of it; with a known mask neither the head nor the last layer's rows."""
    _, costs, _ = smollm
    assert costs.full / costs.limit(0.0, own=True, live=False) == pytest.approx(
        costs.matrices + costs.attention + costs.head
    )
    weights = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    layers = 29 * (2 * weights + 4 * 576 * 512.5) + 2 * (2 * 576 * 192)
    assert costs.full / costs.limit(0.0, own=False, live=False) == pytest.approx(layers)


@pytest.mark.parametrize("own", [False, True])
def test_live_constants_cost_key_and_value_weights_of_dropped_rows(
    own: bool, smollm: tuple[Family, Costs, int]
) -> None:
    costs = smollm[1]
    cost = {live: costs.full / costs.limit(0.25, own=own, live=live) for live in (False, True)}
    assert cost[True] - cost[False] == pytest.approx(0.75 * 30 * 2 * (2 * 576 * 192))


def test_a_suffix_by_hand(smollm: tuple[Family, Costs, int]) -> None:
    costs = smollm[1]
    x, a, h = costs.matrices, costs.attention, costs.head
    assert costs.suffix(1.0) == pytest.approx(1.0)
    assert costs.suffix(0.5) == pytest.approx((x + a + h + 0.5 * (2 * x + 2.5 * a) + 2 * h) / (3 * x + 3.5 * a + 3 * h))
    assert Costs(4, 1.0, 0.0, 0.0, 0.1).suffix(0.25) == pytest.approx(1 / 2)


def test_the_share_of_its_limit_that_a_suffix_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = Adapter(ModelSpec(preset="tiny").build(64, 0, torch.device("cpu"), torch.float32))
    suffixes = Suffixes(adapter)
    assert list(suffixes.updates()) == ["update_1.0", "update_0.75", "update_0.5", "update_0.25"]
    milliseconds = {"suffix_0.5_graph": 80.0, "update_1.0": 20.0, "update_0.5": 12.0}
    times = {name: Timing(p50, p50, p50, 0.0) for name, p50 in milliseconds.items()}
    found = suffixes.values("suffix_0.5_graph", times, 100.0, Costs(4, 1.0, 0.0, 0.0, 0.1))
    assert found["arithmetic_limit"] == pytest.approx(1.5)
    assert found["limit_share"] == pytest.approx(100 / 80 / 1.5)
    assert found["speedup_with_optimizer"] == pytest.approx(120 / 92)
    assert found["limit_share_with_optimizer"] == pytest.approx(120 / 92 * (100 / 1.5 + 12) / 120)
    # Two of three layers are what half of them comes to.
    three = Suffixes(Adapter(small_model("llama"))).values(
        "suffix_0.5_graph", times, 100.0, Costs(3, 1.0, 0.0, 0.0, 0.1)
    )
    assert three["arithmetic_limit"] == pytest.approx(3 / (1 + 2 * 2 / 3))
    monkeypatch.setattr(module, "OPTIMIZER_BELOW", 1)
    alone = Suffixes(adapter)
    assert not alone.updates() and alone.values(
        "suffix_0.5_graph", times, 100.0, Costs(4, 1.0, 0.0, 0.0, 0.1)
    ).keys() == {
        "arithmetic_limit",
        "limit_share",
    }


def test_a_suffix_step_leaves_gradients_of_what_learns() -> None:
    adapter = Adapter(ModelSpec(preset="tiny").build(64, 0, torch.device("cpu"), torch.float32))
    seen = []

    def step(micro: None, scale: None) -> None:
        seen.append([p.requires_grad for layer in adapter.layers for p in layer.parameters()])

    Suffixes(adapter).steps(step)["suffix_0.25"](None, None)  # type: ignore[arg-type]
    (learns,) = seen
    assert sum(learns) * 4 == len(learns) and all(learns[-sum(learns) :])
    assert all(p.requires_grad for p in adapter.model.parameters())
