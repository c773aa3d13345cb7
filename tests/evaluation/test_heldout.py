from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from cggr_ray.data.dataset import DataSpec, PreparedData
from cggr_ray.data.sources import Jsonl
from cggr_ray.data.store import TokenStore
from cggr_ray.evaluation.heldout import HeldOut
from cggr_ray.models.adapter import Adapter

CPU = torch.device("cpu")
ROW_TOKENS = 32
NAMES = ("short", "long")


@pytest.fixture
def val(make_store: Callable[..., TokenStore]) -> tuple[TokenStore, ...]:
    rng = random.Random(0)
    ranges = ((2, 30), (20, 90))
    return tuple(
        make_store([rng.randint(*r) for _ in range(17)], seed=s, prompt_share=0.6) for s, r in enumerate(ranges)
    )


def prepared(val: tuple[TokenStore, ...], mask_prompts: bool) -> PreparedData:
    sources = tuple(Jsonl(name) for name in NAMES[: len(val)])
    return PreparedData(DataSpec(sources, ROW_TOKENS, mask_prompts), None, val, val)  # type: ignore[arg-type]


def by_hand(model: PreTrainedModel, store: TokenStore, mask_prompts: bool) -> tuple[float, int, int]:
    """(nats, labelled positions, bytes), document by document in float64; a long document in pieces of a row."""
    nats, labelled, text_bytes = 0.0, 0, 0
    for d in range(store.documents):
        tokens = torch.from_numpy(store.tokens[store.offsets[d] : store.offsets[d + 1]].astype(int))
        prompt = int(store.prompts[d]) if mask_prompts else 1
        for at in range(0, len(tokens) - 1, ROW_TOKENS):
            piece = tokens[at : at + ROW_TOKENS + 1]
            log_p = model(piece[:-1].unsqueeze(0)).logits[0].log_softmax(-1)
            for i in range(len(piece) - 1):
                if at + i + 1 >= prompt:
                    nats -= float(log_p[i, piece[i + 1]])
                    labelled += 1
        text_bytes += int(store.text_bytes[1, d]) + (0 if mask_prompts else int(store.text_bytes[0, d]))
    return nats, labelled, text_bytes


@pytest.mark.parametrize("mask_prompts", [False, True])
@pytest.mark.parametrize("sources", [1, 2])
def test_it_equals_a_loop_over_documents(
    tiny_model: PreTrainedModel, val: tuple[TokenStore, ...], sources: int, mask_prompts: bool
) -> None:
    data = prepared(val[-sources:], mask_prompts)
    reference = copy.deepcopy(tiny_model).double().eval()
    with torch.no_grad():
        sums = [by_hand(reference, store, mask_prompts) for store in data.val]
    nats, labelled, text_bytes = (sum(x) for x in zip(*sums, strict=True))
    values = HeldOut(data, data.order(), 3, CPU).evaluate(Adapter(tiny_model))
    apart = {f"val/loss/{name}": s[0] / s[1] for name, s in zip(NAMES, sums, strict=False)} if sources > 1 else {}
    expected = {"val/loss": nats / labelled, "val/nats_per_byte": nats / text_bytes, "val/labelled_tokens": labelled}
    assert values == pytest.approx(expected | apart, rel=1e-5)
    assert values["val/labelled_tokens"] == labelled


def test_neither_the_rows_of_a_forward_nor_an_evaluation_before_matter(
    tiny_model: PreTrainedModel, val: tuple[TokenStore, ...]
) -> None:
    data, adapter = prepared(val, False), Adapter(tiny_model)
    before = [p.clone() for p in tiny_model.parameters()]
    heldout = HeldOut(data, data.order(), 4, CPU)
    first = heldout.evaluate(adapter)
    assert heldout.evaluate(adapter) == first
    for micro_rows in (1, 7, 64):
        assert HeldOut(data, data.order(), micro_rows, CPU).evaluate(adapter) == pytest.approx(first, rel=1e-6)
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(tiny_model.parameters(), before, strict=True))
