"""Plans in bf16 on the GPU, compiled, against the float32 oracles of the CPU.

The measure is what an ordinary dense bf16 pass on the same GPU, with the same constants, is off by.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from on_gpu import DEVICE, DTYPE, Found, Twins, assert_as_good, mean_error, moved, moved_route, small_twins, twins
from small_models import CONFIGS
from test_plans import (
    ODD,
    PACKED,
    PLANS,
    ROUTES,
    gradients,
    keep_only,
    kept_mask,
    micro_of,
    oracle_gradients,
    plan_gradients,
    route_of,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cggr_ray.data.batch import MicroBatch
from cggr_ray.models.attention import document_mask, documents_of
from cggr_ray.models.families import Family
from cggr_ray.routing.route import TokenRoute

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def eager_gradients(
    model: PreTrainedModel, micro: MicroBatch, route: TokenRoute, keep_BT: Tensor, keys_too: bool
) -> Found:
    """The oracle in a model's own dtype and on its device: Hugging Face's layers one by one, nothing compiled."""
    family = Family(model)
    first_BT = documents_of(micro.positions_BT, micro.document_starts, micro.longest_document).first_BT
    hidden = family.embed(micro.tokens_BT, micro.positions_BT)
    rotary = family.rotary(hidden, micro.positions_BT)
    with keep_only(model, list(family.layers), keep_BT, keys_too):
        for i, layer in enumerate(family.layers):
            shape = family.shape(i)
            extra = {} if shape.rotary is None else {"position_embeddings": rotary[shape.rotary]}
            out = layer(hidden, attention_mask=document_mask(first_BT, shape.window), **extra)
            hidden = out if isinstance(out, Tensor) else out[0]
    logits = (family.norm(hidden) @ family.head_VD.mT).flatten(0, 1)
    index = route.flat_index(micro.tokens_BT.shape[1])
    labels = micro.labels_BT.flatten()[index]
    nll = F.cross_entropy(logits[index].float(), labels, reduction="none", ignore_index=-100)
    loss = (nll * route.weights_BK.flatten()).sum() / micro.labelled
    loss.backward()
    return loss.detach(), gradients(model)


def check(models: list[Twins], case: tuple[MicroBatch, TokenRoute], detach: str, plans: Iterable[str] = PLANS) -> None:
    """Every plan on the same models."""
    micro, route = case
    here, routed, const = moved(micro), moved_route(route), detach == "const"
    keep = kept_mask(micro, route).to(DEVICE)
    expected = [oracle_gradients(model.exact, micro, route, keys_too=const) for model in models]
    dense = [eager_gradients(model.low, here, routed, keep, keys_too=const) for model in models]
    assert all(loss > 0 for loss, _ in expected)
    for plan in plans:
        found = [plan_gradients(model.low, here, routed, plan, detach) for model in models]
        assert all(g.dtype == DTYPE and g.isfinite().all() for _, gradients in found for g in gradients.values())
        assert_as_good(found, dense, expected)


@pytest.mark.parametrize("detach", ["const", "live"])
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_of_every_plan_are_as_good_as_those_of_a_dense_pass(family: str, detach: str) -> None:
    check(small_twins(family), ROUTES["packed rows, empty slots"], detach)


# In as many slots as the case above has: no other shapes, nothing to compile again.
ODD_ROUTES = {
    "one position of all": route_of(PACKED, [[], [7], []], 6),
    "first positions": route_of(PACKED, [[0], [0], [0, 1]], 6),
    "a row with nothing kept": route_of(PACKED, [[], [3, 7], [20]], 6),
    "a row with no slot to spare": route_of(PACKED, [[5, 6, 7, 8, 9, 10], [20], [18, 19]], 6),
}


@pytest.mark.parametrize("detach", ["const", "live"])
def test_odd_routes(detach: str) -> None:
    for route in ODD_ROUTES.values():
        check(small_twins("qwen3"), (PACKED, route), detach)


def test_a_single_slot() -> None:
    check(small_twins("qwen3"), (ODD, route_of(ODD, [[13]], 1)), "const", ["after", "before"])


def wide_llama() -> PreTrainedModel:
    """Heads of 64, as the models of the races have."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return LlamaForCausalLM(config)


def long_rows() -> tuple[MicroBatch, TokenRoute]:
    """Two rows of 256 positions in seven documents; 67 and 53 kept in 67 slots a row, about every fourth position."""
    micro = micro_of([[100, 37, 90, 29], [190, 60, 6]], width=256, seed=5)
    g = torch.Generator().manual_seed(6)
    index, weights = torch.full((2, 67), 255), torch.zeros(2, 67)
    for row, kept in enumerate((67, 53)):
        index[row, :kept] = torch.randperm(256, generator=g)[:kept].sort().values
        weights[row, :kept] = torch.rand(kept, generator=g) * 3 + 0.5
    return micro, TokenRoute(index, weights)


@pytest.mark.parametrize("detach", ["const", "live"])
def test_rows_of_several_tiles(detach: str) -> None:
    check([twins(wide_llama())], long_rows(), detach)


@pytest.mark.parametrize(("asked", "computed"), [("const", "live"), ("live", "const")])
def test_the_measure_tells_a_wrong_gradient_from_a_rounded_one(asked: str, computed: str) -> None:
    """One kind of constant in the place of the other does not pass for rounding."""
    (micro, route), models, const = ROUTES["packed rows, empty slots"], small_twins("llama"), asked == "const"
    here, routed, keep = moved(micro), moved_route(route), kept_mask(micro, route).to(DEVICE)
    expected = [oracle_gradients(model.exact, micro, route, keys_too=const) for model in models]
    dense = [eager_gradients(model.low, here, routed, keep, keys_too=const) for model in models]
    other = [plan_gradients(model.low, here, routed, "after", computed) for model in models]
    assert mean_error(other, expected) > 2 * (1.5 * mean_error(dense, expected) + 0.01)
