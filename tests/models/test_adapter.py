from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_batches import document_spans
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma3Config, GPT2Config, PreTrainedModel

from cggr_ray.data.batch import MicroBatch
from cggr_ray.data.loader import micro_batches
from cggr_ray.data.packing import RowOrder
from cggr_ray.data.store import TokenStore
from cggr_ray.models.adapter import Adapter
from cggr_ray.models.attention import document_mask, documents_of
from cggr_ray.models.checkpointing import Checkpointing

ROW_TOKENS = 40


@pytest.fixture
def micro(make_store: Callable[..., TokenStore]) -> MicroBatch:
    """Four packed rows of short and long documents, some with padding."""
    rng = random.Random(1)
    order = RowOrder([make_store([rng.randint(2, 60) for _ in range(60)])], (1.0,), (None,), ROW_TOKENS, False, 2)
    state, rows = order.start(), []
    while len(rows) < 4:
        row, state = order.next_row(state)
        if len(row.starts) >= 2:
            rows.append(row)
    return micro_batches(rows, 4, order.shape, torch.device("cpu"))[0]


def alone(model: PreTrainedModel, micro: MicroBatch, row: int, columns: slice) -> tuple[Tensor, Tensor]:
    """Last hidden states and logits of one document by the plain Hugging Face forward."""
    out = model(input_ids=micro.tokens_BT[row, columns].unsqueeze(0), output_hidden_states=True, use_cache=False)
    return out.hidden_states[-1][0], out.logits[0]


def test_packed_rows_equal_each_document_alone(tiny_model: PreTrainedModel, micro: MicroBatch) -> None:
    reference = copy.deepcopy(tiny_model).eval()
    stream = Adapter(tiny_model).forward(micro)
    hidden = stream.hidden_RD.view(4, ROW_TOKENS, -1)
    logits = hidden @ stream.head_VD.mT
    found = list(document_spans(micro))
    assert len(found) >= 8
    with torch.no_grad():
        for row, columns in found:
            expected_hidden, expected_logits = alone(reference, micro, row, columns)
            torch.testing.assert_close(hidden[row, columns], expected_hidden, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(logits[row, columns], expected_logits, atol=1e-4, rtol=1e-5)


def test_gradients_equal_those_of_each_document_alone(tiny_model: PreTrainedModel, micro: MicroBatch) -> None:
    reference = copy.deepcopy(tiny_model)
    probe = torch.randn(4, ROW_TOKENS, 32, generator=torch.Generator().manual_seed(0))
    hidden = Adapter(tiny_model).forward(micro).hidden_RD.view(4, ROW_TOKENS, -1)
    (hidden * probe).sum().backward()
    for row, columns in document_spans(micro):
        (alone(reference, micro, row, columns)[0] * probe[row, columns]).sum().backward()
    expected = dict(reference.named_parameters())
    assert float(tiny_model.get_input_embeddings().weight.grad.abs().max()) > 0.1
    for name, parameter in tiny_model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=2e-4, rtol=1e-4, msg=name)


def test_a_document_does_not_see_its_neighbours(tiny_model: PreTrainedModel, micro: MicroBatch) -> None:
    adapter = Adapter(tiny_model)
    hidden = adapter.forward(micro).hidden_RD.view(4, ROW_TOKENS, -1)
    row, columns = next((r, c) for r, c in document_spans(micro) if c.start > 0)
    gradient = torch.autograd.grad(hidden[row, columns].sum(), tiny_model.get_input_embeddings().weight)[0]
    inside = set(micro.tokens_BT[row, columns].tolist())
    assert {i for i in range(128) if gradient[i].abs().sum() > 0} == inside


class Products(TorchDispatchMode):
    """Counts matrix products of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def learned(model: PreTrainedModel, checkpointing: Checkpointing, micro: MicroBatch) -> tuple[int, int, list[Tensor]]:
    """(products forward and backward, bytes kept for the backward, gradients) of a copy."""
    model, kept = copy.deepcopy(model), {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with Products() as products:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            total = Adapter(model, checkpointing).forward(micro).hidden_RD.square().sum()
        total.backward()
    return products.count, sum(kept.values()), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", ["block", "selective"])
def test_gradient_checkpointing_changes_no_gradient(
    tiny_model: PreTrainedModel, micro: MicroBatch, checkpointing: Checkpointing
) -> None:
    plain_products, plain_bytes, plain = learned(tiny_model, "none", micro)
    products, kept_bytes, found = learned(tiny_model, checkpointing, micro)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    # All seven products of a layer but the last, whose output nobody needs, are computed again, or none of them.
    assert products - plain_products == (6 * 2 if checkpointing == "block" else 0)
    assert kept_bytes < plain_bytes


def test_document_mask_by_hand() -> None:
    mask = document_mask(torch.tensor([[0, 0, 2], [0, 0, 0]]))
    assert mask.shape == (2, 1, 3, 3)
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]
    assert mask[1, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    window = document_mask(torch.tensor([[0, 0, 0, 3]]), window=2)[0, 0]
    assert window.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_what_the_adapter_says_about_the_model(tiny_model: PreTrainedModel) -> None:
    adapter = Adapter(tiny_model)
    assert len(adapter.layers) == 2
    assert adapter.head_VD is tiny_model.get_input_embeddings().weight
    names = [name for name, _ in adapter.named_parameters()]
    assert sorted(set(names) - set(adapter.hidden_names())) == ["model.embed_tokens.weight", "model.norm.weight"]
    adapter.set_active_layers([False, True])
    frozen = {name for name, p in adapter.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in names if ".layers.0." in name}


def test_a_vision_tower_beside_the_language_model_has_nothing_to_learn() -> None:
    text = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    adapter = Adapter(AutoModelForCausalLM.from_config(config))
    learning = dict(adapter.named_parameters())
    assert learning and not any("vision" in name or "projector" in name for name in learning)
    tokens = torch.randint(64, (1, 8), generator=torch.Generator().manual_seed(1))
    hidden = adapter.family.embed(tokens, torch.arange(8)[None])
    documents = documents_of(torch.arange(8)[None], torch.tensor([0, 8]).int(), 8)
    adapter.run_layers(hidden, torch.arange(8)[None], documents).square().sum().backward()
    missing = {name for name, p in learning.items() if p.grad is None}
    assert missing == {name for name in learning if name.endswith("norm.weight") and ".layers." not in name}


def test_an_unsupported_family_is_refused() -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16)
    with pytest.raises(ValueError, match=r"attn_pdrop = 0.1, .*; accepted: 0"):
        Adapter(AutoModelForCausalLM.from_config(config))
