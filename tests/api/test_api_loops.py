"""What other people's loops do with the API beside its plain use, and the README's own loops."""

from __future__ import annotations

import ast
import copy
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CONFIGS, small_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, LlamaModel, PreTrainedModel

import cggr_ray
from cggr_ray import CGGRLoss, CGGRModel, CGGRWrapper, MatrixOptimizer, create_truncated_router
from cggr_ray.api.curriculum import StepCurriculum
from cggr_ray.routing.curriculum import DynamicThreshold

ROOT = Path(__file__).resolve().parents[2]
ROWS, WIDTH, VOCABULARY = 3, 17, 96


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (ROWS, WIDTH), generator=torch.Generator().manual_seed(seed))


def selecting(model: PreTrainedModel, **options: Any) -> CGGRModel:
    return CGGRModel(model, **{"dynamic_threshold": False, "warmup_steps": 0, "min_tokens_ratio": 0.3} | options)


def test_the_readme_s_loops_run_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "README.md").read_text().split("## In your own loop")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 5
    model, ids = AutoModelForCausalLM.from_config(config), tokens()
    before = model.lm_head.weight.detach().clone()
    mask = torch.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    exec(blocks[0], {"model": model, "loader": [batch] * 2, "optimizer": optimizer})
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(saved.lm_head.weight, model.lm_head.weight) and not torch.equal(saved.lm_head.weight, before)
    out = model(ids, output_hidden_states=True)
    names = {"model": model, "input_ids": ids, "labels": ids, "targets": ids.roll(-1, 1)}
    exec(blocks[1], names | {"logits": out.logits, "hidden": out.hidden_states[-1]})
    names = {"model": model, "torch": torch}
    exec(blocks[2], names)
    MatrixOptimizer(small_model("llama"), *names["eight_bits"])
    MatrixOptimizer(small_model("llama"), *names["low_rank"])
    assert len(blocks) == 3


def test_defaults_are_what_upstream_documents() -> None:
    """A caller who gives nothing gets them: they do not change with what the races find."""
    selection = {"scoring": "combined", "selection": "topk", "num_strata": 4, "min_tokens_per_sequence": 1}
    ratio = {"min_tokens_ratio": 0.25, "warmup_steps": 1000}
    dynamic = {"dynamic_threshold": True, "threshold_sensitivity": 0.5, "threshold_rule": "upstream"}
    wrapper = {"num_buckets": 4, "warmup_steps": 1000, "leak_rate": 0.0, "scoring": "entropy_confidence"}
    wanted = ((CGGRLoss, selection | ratio | dynamic), (CGGRModel, selection | ratio | dynamic), (CGGRWrapper, wrapper))
    for made, expected in (*wanted, (create_truncated_router, {"num_layers": 4})):
        given = {name: taken.default for name, taken in inspect.signature(made).parameters.items()}
        assert {name: given[name] for name in expected} == expected, made


def test_public_names_are_listed_and_known_to_type_checkers() -> None:
    assert set(cggr_ray.__all__) <= set(dir(cggr_ray))
    tree = ast.parse((ROOT / "cggr_ray" / "__init__.py").read_text())
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "cggr_ray" in (node.module or "")]
    typed = {alias.asname: node.module for node in froms for alias in node.names}
    assert sorted(typed, key=str) == cggr_ray.__all__
    assert all(module == cggr_ray._PUBLIC[str(name)] for name, module in typed.items())


@pytest.mark.parametrize("count", [0, torch.tensor(0)])
def test_a_step_without_labels_changes_nothing(count: int | Tensor) -> None:
    """Every micro-batch of a step may be prompts alone: the count of its labels is then 0."""
    for wrap in (selecting, lambda m: CGGRModel(m, mode="sequence", warmup_steps=0), lambda m: CGGRWrapper(m)):
        model = small_model("llama")
        loss = wrap(model)(input_ids=tokens(), labels=torch.full((ROWS, WIDTH), -100), num_items_in_batch=count)
        loss.backward()
        assert loss.item() == 0
        assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"plan": "dense", "selection": "stratified"}, {"router": 1}])
def test_a_loop_may_compile_the_whole(options: dict[str, Any]) -> None:
    def make() -> CGGRModel:
        model = small_model("qwen2")
        own = {"router": create_truncated_router(model, 1)} if "router" in options else {}
        return selecting(model, **options | own)

    plain, compiled = make(), make()
    run = torch.compile(compiled, backend="eager")
    for seed in range(2):
        losses = [call(input_ids=tokens(seed), labels=tokens(seed)) for call in (plain, run)]
        torch.testing.assert_close(losses[1], losses[0])
        for loss in losses:
            loss.backward()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)


def test_a_loop_may_compile_the_criterion() -> None:
    logits = torch.randn(ROWS, WIDTH, VOCABULARY, generator=torch.Generator().manual_seed(1))
    found = torch.compile(CGGRLoss(warmup_steps=0), backend="eager")(logits, tokens(), shift=True)
    torch.testing.assert_close(found, CGGRLoss(warmup_steps=0)(logits, tokens(), shift=True))


def test_a_cast_of_the_module_leaves_the_mean_confidence_exact() -> None:
    """In bf16 a mean that moves by a twentieth of a small difference would stand still."""
    curriculum = StepCurriculum(0.25, 0, DynamicThreshold("corrected")).bfloat16()
    expected = 0.5
    curriculum.observe(torch.tensor(0.5))
    for _ in range(40):
        curriculum.observe(torch.tensor(0.51))
        expected = 0.95 * expected + 0.05 * 0.51
    assert curriculum.confidence[-1, 0].item() == pytest.approx(expected, abs=1e-6)


class Event:
    """As one of a GPU: what it waits for is there when it has been asked for."""

    def __init__(self, host: Tensor, value: float) -> None:
        self.host, self.value = host, value

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle 'Event' object")

    def synchronize(self) -> None:
        self.host.fill_(self.value)


def test_a_model_may_be_copied_while_values_are_on_their_way() -> None:
    ids = tokens()
    cggr = CGGRModel(small_model("llama"), warmup_steps=0)
    cggr(ids, labels=ids)
    arriving = cggr.curriculum._arriving[-1]
    arriving._event = Event(arriving._host, 0.25)
    again = copy.deepcopy(cggr)
    assert again.curriculum._arriving[-1].values() == [0.25, 0.25]
    again(ids, labels=ids).backward()
    assert all(p.grad is None for p in cggr.parameters()) and all(p.grad is not None for p in again.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_a_call_on_the_model_takes_what_the_model_takes(training: bool) -> None:
    """In eval mode, and in train mode without labels."""
    model, labels = small_model("llama"), None if training else tokens()
    cggr = selecting(model).train(training)
    found = cggr(tokens(), labels=labels, output_hidden_states=True)
    expected = model(tokens(), labels=labels, output_hidden_states=True)
    assert len(found.hidden_states) == 4
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    assert isinstance(cggr(tokens(), labels=labels, return_dict=False), tuple)
    embedded = model.get_input_embeddings()(tokens())
    assert torch.equal(cggr(inputs_embeds=embedded, labels=labels).logits, expected.logits)


class Around(nn.Module):
    """Another library's wrapper, which hands on what it does not have itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


def mistakes() -> list[tuple[Callable[[], Any], str]]:
    llama, biased = small_model("llama"), small_model("llama")
    biased.lm_head = nn.Linear(32, VOCABULARY)
    body, classifier = LlamaModel(CONFIGS["llama"]()), LlamaForSequenceClassification(CONFIGS["llama"]())
    ids, logits = tokens(), torch.zeros(ROWS, WIDTH, VOCABULARY)
    wrapper, meta, embedded = CGGRWrapper(llama), ids.to("meta"), torch.zeros(ROWS, WIDTH, 32)
    return [
        (lambda: CGGRModel(body), "LlamaModel; accepted: a causal LM"),
        (lambda: create_truncated_router(body), "LlamaModel; accepted: a causal LM"),
        (lambda: CGGRModel(classifier), "LlamaForSequenceClassification; accepted: a causal LM"),
        (lambda: CGGRModel(Around(llama)), "Around; accepted: a causal LM"),
        (lambda: CGGRModel(biased), "bias=True.* as the head; accepted: a head without bias"),
        (lambda: selecting(llama)(ids, labels=ids.float()), "labels of torch.float32; accepted: whole numbers"),
        (lambda: selecting(llama)(ids, labels=ids, token_type_ids=ids), "token_type_ids with labels in train mode"),
        (lambda: wrapper(input_ids=ids, labels=ids, token_type_ids=ids), "token_type_ids with labels in train mode"),
        (
            lambda: wrapper(inputs_embeds=embedded, labels=ids),
            "inputs_embeds with labels in train mode; accepted: input",
        ),
        (lambda: selecting(llama)(inputs_embeds=embedded, labels=ids), "inputs_embeds with labels in train mode"),
        (lambda: selecting(llama)(labels=ids), "no input_ids with labels in train mode; accepted: input_ids"),
        (lambda: selecting(llama, return_dict=True)(ids), "no labels in train mode with return_dict=True; accepted"),
        (lambda: CGGRLoss()(logits, ids.float()), "targets of torch.float32; accepted: whole numbers"),
        (lambda: CGGRLoss()(logits, ids.to("meta")), "targets on 'meta'; accepted: 'cpu', as logits"),
        (lambda: selecting(llama)(ids, labels=ids.to("meta")), "labels on 'meta'; accepted: 'cpu', as input_ids"),
        (lambda: selecting(llama)(meta, labels=meta), "input_ids on 'meta'; accepted: 'cpu', as the model's weights"),
        (lambda: CGGRLoss()(logits[:, :0], ids[:, :0]), r"targets \(3, 0\); accepted: .* none of them empty"),
    ]


@pytest.mark.parametrize("number", range(17))
def test_mistakes_are_named(number: int) -> None:
    call, message = mistakes()[number]
    with pytest.raises(ValueError, match=message):
        call()
    assert len(mistakes()) == 17
