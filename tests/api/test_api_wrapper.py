"""CGGRWrapper against gradients of a model whose gates are hung by hand with cuts found by sorting."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import CONFIGS, small_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, PreTrainedModel

from cggr_ray import CGGRModel, CGGRWrapper
from cggr_ray.api.hooks import find_layers
from cggr_ray.routing.depth import cut_layers

VOCABULARY = 96


class Layer(nn.Module):
    """Causal mixing and an MLP, on (B, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.inner = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = x + self.mix(x).cumsum(1) / 4
        return x + torch.tanh(self.inner(x)), None


class Plain(nn.Module):
    """Somebody's own model: no configuration, layers that return tuples."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.blocks = nn.ModuleList(Layer(16) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)[0]
        return self.head(x)


def plain_model(layers: int = 6) -> Plain:
    torch.manual_seed(0)
    return Plain(layers)


TOKENS = torch.randint(VOCABULARY, (3, 13), generator=torch.Generator().manual_seed(2))


def quietly(model: nn.Module, **options: Any) -> CGGRWrapper:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CGGRWrapper(model, **{"warmup_steps": 0} | options)


def cuts_by_hand(logits: Tensor, counted: Tensor, layers: int, buckets: int, last: int) -> Tensor:
    """The cut of every position by sorting H - p1 over the whole batch, in float64; uncounted ones are easiest."""
    p = logits.detach().double().softmax(-1)
    scores = (-(p * p.log()).sum(-1) - p.amax(-1)).flatten().tolist()
    ranked = sorted(counted.flatten().nonzero().flatten().tolist(), key=lambda t: scores[t])
    bucket = [buckets - 1] * len(scores)
    for rank, t in enumerate(ranked):
        bucket[t] = buckets - 1 - rank * buckets // len(ranked)
    cuts = [layers - layers * (buckets - min(b, last)) // buckets - 1 for b in bucket]
    return torch.tensor(cuts).view(counted.shape)


def gated(model: nn.Module, run: Callable[[], Tensor], cuts_BT: Tensor, leak: float, only: set[int] | None) -> None:
    """Backward of `run()` with a tensor hook at the output of each layer, and at the input of the first."""
    layers = find_layers(model)

    def gate(hidden: Tensor, layer: int) -> None:
        mask = torch.where(cuts_BT < layer, 1.0, leak).unsqueeze(-1)
        hidden.register_hook(lambda grad: grad * mask)

    def after(layer: int) -> Callable[..., None]:
        return lambda module, args, out: gate(out if isinstance(out, Tensor) else out[0], layer)

    def before(module: nn.Module, args: Any, keywords: Any) -> None:
        gate(args[0] if args else keywords["hidden_states"], 0)

    handles = [layer.register_forward_hook(after(i)) for i, layer in enumerate(layers) if only is None or i in only]
    if only is None:
        handles.append(layers[0].register_forward_pre_hook(before, with_kwargs=True))
    loss = run()
    for handle in handles:
        handle.remove()
    loss.backward()


def assert_same_gradients(found: nn.Module, expected: nn.Module) -> None:
    largest = max(p.grad.norm().item() for p in expected.parameters() if p.grad is not None)
    for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        wanted = torch.zeros_like(b) if b.grad is None else b.grad
        got = torch.zeros_like(a) if a.grad is None else a.grad
        assert (got - wanted).norm().item() <= 1e-5 * max(wanted.norm().item(), 0.05 * largest), name


@pytest.mark.parametrize(("engine", "leak"), [("every", 0.0), ("faithful", 0.0), ("faithful", 0.25)])
@pytest.mark.parametrize("buckets", [2, 4])
def test_hooks_gate_somebody_s_own_model(engine: str, leak: float, buckets: int) -> None:
    model = plain_model()
    expected = copy.deepcopy(model)
    wrapper = quietly(model, num_buckets=buckets, engine=engine, leak_rate=leak)
    logits = wrapper(TOKENS)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    cuts = cuts_by_hand(logits, torch.ones_like(TOKENS), 6, buckets, buckets - 1)
    assert len(cuts.unique()) == buckets
    only = set(cut_layers(6, buckets)) if engine == "faithful" else None

    def run() -> Tensor:
        return F.cross_entropy(expected(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())

    gated(expected, run, cuts, leak, only)
    assert_same_gradients(model, expected)


def test_the_first_engine_that_fits_is_chosen() -> None:
    with pytest.warns(UserWarning, match="'Plain' gates gradients by hooks"):
        assert CGGRWrapper(plain_model(), leak_rate=0.1).depth.engine == "faithful"
    assert quietly(plain_model()).depth.engine == "every"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CGGRWrapper(small_model("llama")).depth.engine == "sparse"


def test_a_model_that_the_sparse_engine_cannot_run_is_hooked_and_said_so() -> None:
    dropping = AutoModelForCausalLM.from_config(GPT2Config(n_layer=4, n_head=2, n_embd=16, vocab_size=VOCABULARY))
    checkpointed = small_model("llama")
    checkpointed.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="'gpt2' gates gradients by hooks.*attn_pdrop = 0.1"):
        wrapper = CGGRWrapper(dropping, warmup_steps=0)
    assert wrapper.depth.engine == "every"
    wrapper(input_ids=TOKENS, labels=TOKENS).loss.backward()
    with pytest.warns(UserWarning, match="'llama' gates gradients by hooks.*gradient checkpointing"):
        hooked = CGGRWrapper(checkpointed, num_buckets=3, warmup_steps=0)
    hooked(input_ids=TOKENS, labels=TOKENS).loss.backward()
    expected = small_model("llama")
    CGGRWrapper(expected, num_buckets=3, warmup_steps=0)(TOKENS, labels=TOKENS).backward()
    assert_same_gradients(checkpointed, expected)


class Adapted(nn.Module):
    """A matrix that is frozen, and a product of two thin ones beside it, as LoRA has them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base.requires_grad_(False), nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def test_a_model_with_modules_of_somebody_s_own_in_its_layers_is_hooked() -> None:
    model = small_model("llama").requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
    with pytest.raises(ValueError, match=r"layer 0: 'Adapted' .* 'weight'; accepted: layers as transformers builds"):
        CGGRModel(model)
    with pytest.warns(UserWarning, match="'llama' gates gradients by hooks.*layers as transformers builds them"):
        wrapper = CGGRWrapper(model, num_buckets=3, warmup_steps=0)
    assert wrapper.depth.engine == "every"
    wrapper(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for layer in model.model.layers:
        assert layer.self_attn.q_proj.up.weight.grad.abs().sum() > 0


def test_recomputing_layers_changes_no_gradient_of_the_sparse_engine() -> None:
    found = []
    for recompute in (False, True):
        model = small_model("qwen3")
        wrapper = CGGRWrapper(model, num_buckets=3, warmup_steps=0, gradient_checkpointing=recompute)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            loss = wrapper(TOKENS, labels=TOKENS)
        loss.backward()
        found.append((model, sum(sizes)))
    assert_same_gradients(found[1][0], found[0][0])
    assert found[1][1] < 0.5 * found[0][1]


def padded() -> dict[str, Tensor]:
    mask, labels = torch.ones_like(TOKENS), TOKENS.clone()
    mask[0, 9:], labels[0, 9:], labels[1, :4] = 0, -100, -100
    return {"input_ids": TOKENS, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_sparse_engine_is_the_gradient_of_gates_at_every_layer(family: str) -> None:
    inputs, model = padded(), small_model(family)
    expected = copy.deepcopy(model)
    wrapper = CGGRWrapper(model, num_buckets=3, warmup_steps=0)
    loss = wrapper(**inputs)
    loss.backward()
    counted = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100) >= 0
    logits = expected(input_ids=TOKENS, attention_mask=inputs["attention_mask"]).logits
    cuts = cuts_by_hand(logits, counted, 3, 3, 2)
    gated(expected, lambda: expected(**inputs).loss, cuts, 0.0, None)
    torch.testing.assert_close(loss, expected(**inputs).loss, rtol=1e-5, atol=1e-6)
    assert_same_gradients(model, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_hooks_on_a_transformers_model_give_the_same(family: str) -> None:
    inputs, model = padded(), small_model(family)
    expected = copy.deepcopy(model)
    CGGRWrapper(model, num_buckets=3, warmup_steps=0)(**inputs).backward()
    CGGRWrapper(expected, num_buckets=3, warmup_steps=0, engine="every")(**inputs).loss.backward()
    assert_same_gradients(model, expected)


def test_without_labels_a_sparse_wrapper_returns_gated_logits() -> None:
    model = small_model("qwen3")
    expected = copy.deepcopy(model)
    mask = padded()["attention_mask"]
    out = CGGRWrapper(model, num_buckets=3, warmup_steps=0)(TOKENS, attention_mask=mask)
    F.cross_entropy(out.logits.flatten(0, 1), TOKENS.flatten()).backward()
    cuts = cuts_by_hand(out.logits, mask, 3, 3, 2)

    def run() -> Tensor:
        return F.cross_entropy(expected(TOKENS, attention_mask=mask).logits.flatten(0, 1), TOKENS.flatten())

    gated(expected, run, cuts, 0.0, None)
    assert_same_gradients(model, expected)


@pytest.mark.parametrize("sparse", [True, False])
def test_buckets_are_told_apart_one_after_the_other(sparse: bool) -> None:
    model = small_model("llama")
    wrapper = CGGRWrapper(model, num_buckets=3, warmup_steps=4, engine=None if sparse else "every")
    for step in range(6):
        expected = copy.deepcopy(model)
        out = wrapper(input_ids=TOKENS, labels=TOKENS)
        (out if sparse else out.loss).backward()
        last = min(2, int(min(1.0, step / 4) * 2))
        counted = torch.ones_like(TOKENS)
        counted[:, -1] = 0
        cuts = cuts_by_hand(expected(TOKENS).logits, counted, 3, 3, last)
        gated(expected, lambda expected=expected: expected(TOKENS, labels=TOKENS).loss, cuts, 0.0, None)
        assert_same_gradients(model, expected)
        model.zero_grad()
        wrapper.step()
    state = wrapper.state_dict()
    assert int(state["curriculum.num_steps"]) == 6 and "model.model.norm.weight" in state
    other = CGGRWrapper(small_model("llama", seed=9), num_buckets=3, warmup_steps=4)
    other.load_state_dict(state)
    assert other.curriculum.passed == 1.0
    if sparse:
        assert torch.equal(other(TOKENS, labels=TOKENS), wrapper(TOKENS, labels=TOKENS))


def test_several_forwards_may_wait_for_their_backward() -> None:
    model = plain_model()
    wrapper = quietly(model)
    others = TOKENS.flip(0) + torch.arange(3).unsqueeze(1) % VOCABULARY
    found = []
    for together in (True, False):
        losses = []
        for tokens in (TOKENS, others % VOCABULARY):
            losses.append(wrapper(tokens).logsumexp(-1).square().mean())
            if not together:
                losses.pop().backward()
        for loss in losses:
            loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(found[0], found[1])


def neox() -> PreTrainedModel:
    torch.manual_seed(1)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("engine", ["every", "faithful"])
def test_no_hook_stays_on_the_layers(engine: str) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    model = plain_model()
    seen: list[int] = []
    model.head.register_forward_hook(lambda *_: seen.append(hooks()))
    wrapper = quietly(model, engine=engine)
    assert hooks() == 1
    wrapper(TOKENS).sum().backward()
    cuts = [cut for cut in cut_layers(6, 4) if cut >= 0]
    assert seen == [1 + (7 if engine == "every" else len(cuts))] and hooks() == 1
    with pytest.raises(IndexError):
        wrapper(TOKENS + VOCABULARY)
    assert hooks() == 1


def test_another_family_of_transformers_runs_with_hooks_and_learns() -> None:
    with pytest.warns(UserWarning, match="'gpt_neox' gates gradients by hooks, which saves no time"):
        wrapper = CGGRWrapper(neox(), warmup_steps=2, scoring="combined")
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = wrapper(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wrapper.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_the_documented_loop_learns() -> None:
    model = CGGRWrapper(small_model("llama"), num_buckets=3, warmup_steps=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(TOKENS, labels=TOKENS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert model.metrics()["train/loss"] == pytest.approx(losses[-1])


def test_in_evaluation_and_without_gradient_it_is_the_model() -> None:
    model = plain_model()
    expected = copy.deepcopy(model)(TOKENS)
    wrapper = quietly(model)
    with torch.no_grad():
        assert torch.equal(wrapper(TOKENS), expected)
    logits = wrapper.eval()(TOKENS)
    F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).backward()
    plain = plain_model()
    F.cross_entropy(plain(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    assert_same_gradients(model, plain)


def test_the_stack_of_layers_is_found() -> None:
    for family in CONFIGS:
        model = small_model(family)
        layers = model.transformer.h if family == "gpt2" else model.model.layers
        assert find_layers(model) == list(layers)
    nested = plain_model(3)
    nested.blocks[0].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert find_layers(nested) == list(nested.blocks)
    twice = plain_model(3)
    twice.others = nn.ModuleList(Layer(4) for _ in range(3))
    with pytest.raises(ValueError, match="blocks, others; accepted: one, or layers="):
        find_layers(twice)
    with pytest.raises(ValueError, match="in Linear: none; accepted"):
        find_layers(nn.Linear(2, 2))
    logits = quietly(twice, layers=list(twice.blocks), num_buckets=3)(TOKENS)
    logits.sum().backward()


class Pooled(Plain):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)[:, ::2]


class Classifier(Plain):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)[:, 0]


def mistakes() -> list[tuple[Callable[[], Any], str]]:
    llama = small_model("llama")
    return [
        (lambda: quietly(plain_model(), num_buckets=0), "num_buckets = 0; accepted"),
        (lambda: quietly(plain_model(), leak_rate=2.0), "leak_rate = 2.0"),
        (lambda: quietly(plain_model(), engine="fast"), "engine = 'fast'; accepted: sparse, every, faithful"),
        (lambda: quietly(plain_model(), engine="sparse"), "Plain; accepted: a causal LM of transformers"),
        (lambda: quietly(neox(), engine="sparse"), "model family 'gpt_neox'"),
        (lambda: quietly(llama, engine="sparse", leak_rate=0.5), "leak_rate = 0.5 with engine 'sparse'"),
        (lambda: quietly(llama, engine="every", detach="const"), "detach 'const' with engine 'every'"),
        (lambda: quietly(llama, engine="every", gradient_checkpointing=True), "gradient_checkpointing with engine 'ev"),
        (lambda: quietly(llama, scoring="hardness"), "scoring = 'hardness'"),
        (lambda: quietly(llama, scoring="loss")(TOKENS), "scoring 'loss' without labels; accepted"),
        (lambda: quietly(Pooled())(TOKENS), r"layers on \[\(3, 13\)\], logits \(3, 7, 96\)"),
        (lambda: quietly(Classifier())(TOKENS), r"a model that returns \(3, 96\); accepted: logits"),
    ]


@pytest.mark.parametrize("number", range(12))
def test_mistakes_are_named(number: int) -> None:
    call, message = mistakes()[number]
    with pytest.raises(ValueError, match=message):
        call()
    assert len(mistakes()) == 12
