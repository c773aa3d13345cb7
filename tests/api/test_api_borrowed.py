"""The caller's model: what it is before, while and after it is ours, and the models, batches and options refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_calls import VOCABULARY, WIDTH, batch, keep_all, selecting
from small_models import small_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, PreTrainedModel

from cggr_ray import CGGRModel, CGGRWrapper, create_truncated_router


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_model_is_the_caller_s_afterwards(family: str) -> None:
    model = small_model(family)
    model.set_attn_implementation("eager")
    untouched, inputs = copy.deepcopy(model), batch("right")
    router = create_truncated_router(model.eval(), 2)
    cggr = selecting(model, router=router)
    assert not model.training
    cggr.train()
    cggr(**inputs).backward()
    assert model.config._attn_implementation == "eager" and model.training
    cggr.eval()
    found, expected = cggr(**inputs), untouched.eval()(**inputs)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits)
    train = cggr.train()(input_ids=inputs["input_ids"])
    torch.testing.assert_close(train.logits, untouched(inputs["input_ids"]).logits)
    prompt = inputs["input_ids"][:, :5]
    keywords = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = cggr.model.eval().generate(prompt, **keywords)
    assert torch.equal(generated, untouched.generate(prompt, **keywords))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_is_restored_when_a_forward_fails_and_in_the_backward(checkpointing: bool) -> None:
    model = small_model("llama")
    model.set_attn_implementation("eager")
    cggr = keep_all(model, gradient_checkpointing=checkpointing)
    loss = cggr(**batch())
    assert model.config._attn_implementation == "eager"
    loss.backward()
    assert model.config._attn_implementation == "eager"
    with pytest.raises(IndexError):
        cggr(input_ids=torch.full((1, 4), VOCABULARY), labels=torch.ones(1, 4, dtype=torch.int64))
    assert model.config._attn_implementation == "eager"


def test_each_module_keeps_its_own_mode_when_wrapped() -> None:
    model = small_model("llama").train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    CGGRModel(model)
    create_truncated_router(model, 2)
    assert {name: module.training for name, module in model.named_modules()} == before


def cut(model: PreTrainedModel) -> None:
    model.model.layers = model.model.layers[:2]


def drop(model: PreTrainedModel) -> None:
    del model.model.layers[1]


def adapt(model: PreTrainedModel) -> None:
    attention = model.model.layers[1].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj, nn.Identity())


def normalise(model: PreTrainedModel) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[2].mlp.up_proj)


@pytest.mark.parametrize("change", [cut, drop, adapt, normalise])
@pytest.mark.parametrize("kind", [CGGRModel, CGGRWrapper])
def test_layers_that_are_changed_afterwards_are_named(kind: type, change: Callable[[PreTrainedModel], None]) -> None:
    model, inputs = small_model("llama"), batch()
    wrapped = kind(model, warmup_steps=0)
    model.resize_token_embeddings(100)
    copied = copy.deepcopy(wrapped)
    for one in (wrapped, copied):
        assert one(**inputs).isfinite()
    change(model)
    with pytest.raises(ValueError, match="layers that are not those it was made of"):
        wrapped(**inputs)
    assert copied(**inputs).isfinite()


@pytest.mark.parametrize("kind", [CGGRModel, CGGRWrapper])
def test_a_model_that_begins_to_checkpoint_its_layers_is_named(kind: type) -> None:
    model, inputs = small_model("llama"), batch()
    model.set_attn_implementation("eager")
    wrapped = kind(model)
    expected = wrapped(**inputs).item()
    model.gradient_checkpointing_enable()
    with pytest.raises(
        ValueError, match="gradient checkpointing of the model's own; accepted: gradient_checkpointing=T"
    ):
        wrapped(**inputs).backward()
    model.gradient_checkpointing_disable()
    assert wrapped(**inputs).item() == expected
    model.gradient_checkpointing_enable()
    assert wrapped.eval()(**inputs).loss.item() == pytest.approx(expected, rel=1e-5)


def mistakes() -> list[tuple[Callable[[], Any], str]]:
    llama, gpt2 = small_model("llama"), small_model("gpt2")
    foreign = AutoModelForCausalLM.from_config(
        GPTNeoXConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    adapted, checkpointed = small_model("llama"), small_model("llama")
    adapted.model.layers[1].self_attn.q_proj.register_parameter("lora_A", nn.Parameter(torch.ones(2, 2)))
    checkpointed.gradient_checkpointing_enable()
    dropping = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    late, later = copy.deepcopy(dropping), small_model("llama")
    late.config.attn_pdrop = late.config.resid_pdrop = late.config.embd_pdrop = 0.0
    later.model.layers[2].self_attn.attention_dropout = 0.1
    tokens = batch()["input_ids"]
    holes, left, jump = torch.ones_like(tokens), torch.ones_like(tokens), torch.arange(WIDTH).repeat(3, 1)
    # One position out of its place is enough.
    holes[1, 5], left[2, 0], jump[1, -1] = 0, 0, 3

    def call(model: PreTrainedModel, **inputs: Tensor) -> Callable[[], Any]:
        return lambda: keep_all(model)(**{"input_ids": tokens, "labels": tokens} | inputs)

    return [
        (call(llama, attention_mask=holes), "attention_mask with holes; accepted: ones in one piece"),
        (call(gpt2, attention_mask=left), "padded on the left, of a model with absolute positions; accepted"),
        (call(llama, position_ids=torch.arange(WIDTH).expand(3, -1) + 1), "position_ids that are no documents"),
        (call(llama, position_ids=jump), "position_ids that are no documents"),
        (call(llama, labels=tokens[:, 1:]), r"labels of shape \(3, 16\); accepted: \(3, 17\)"),
        (call(llama, attention_mask=torch.ones(3, 1, 17, 17)), r"attention_mask of shape \(3, 1, 17, 17\)"),
        (call(llama, input_ids=tokens[0], labels=tokens[0]), r"input_ids of shape \(17,\); accepted: \(B, T\)"),
        (lambda: CGGRModel(foreign), "model family 'gpt_neox'; accepted: llama, mistral"),
        (lambda: CGGRModel(adapted), "parameter 'self_attn.q_proj.lora_A' of layer 1; accepted"),
        (lambda: CGGRModel(checkpointed), "gradient checkpointing of the model's own; accepted"),
        (lambda: CGGRModel(dropping), "attn_pdrop = 0.1, resid_pdrop = 0.1, embd_pdrop = 0.1; accepted: 0"),
        (lambda: CGGRModel(late), "dropout of drop = 0.1; accepted: 0 when the model is built"),
        (lambda: CGGRModel(later), "dropout of layers.2.self_attn = 0.1; accepted: 0 when the model is built"),
        (lambda: CGGRModel(nn.Linear(2, 2)), "Linear; accepted: a causal LM of transformers"),
        (lambda: create_truncated_router(llama), "num_layers = 4 of a model with 3; accepted: 1 to 2"),
        (lambda: create_truncated_router(llama, 0), "num_layers = 0"),
        (lambda: CGGRModel(llama, router=create_truncated_router(gpt2, 1)), "router .* of the same model"),
        (lambda: CGGRModel(llama, mode="rows"), "mode = 'rows'; accepted: token, sequence"),
        (lambda: CGGRModel(llama, plan="fast"), "plan = 'fast'; accepted: dense"),
        (lambda: CGGRModel(llama, plan="before"), "plan 'before' with the model's own scores"),
        (lambda: CGGRModel(llama, detach="both"), "detach = 'both'; accepted: const, live"),
        (lambda: CGGRModel(llama, mode="sequence", selection="stratified"), "mode 'sequence' with 'stratified'"),
        (lambda: CGGRModel(llama, min_tokens_ratio=2), "min_tokens_ratio = 2; accepted"),
    ]


@pytest.mark.parametrize("number", range(23))
def test_mistakes_are_named(number: int) -> None:
    call, message = mistakes()[number]
    with pytest.raises(ValueError, match=message):
        call()
    assert len(mistakes()) == 23
