"""Generation by bf16 models on the GPU: near what float32 says, and without a trace in the training beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from on_gpu import DEVICE, POSITIONS, ROWS, VOCABULARY, batches_of, no_waiting, small_twins, tiny, warmed
from small_tokenizers import END, letters, tokens_of
from torch._dynamo.utils import counters

from cggr_ray.data.packing import RowOrder
from cggr_ray.evaluation.generate import fill, generate
from cggr_ray.evaluation.task import Question, Task
from cggr_ray.learner import Learner, Levels
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress
from cggr_ray.recipe import load_recipe
from cggr_ray.schema import GRAD_NORM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPTS = ["What is 1 + 1?", "x", "A longer question, of more than a window", "Two?", "of", "the last"]
QUESTIONS = [Question(str(number), prompt, "") for number, prompt in enumerate(PROMPTS)]


@dataclass(frozen=True)
class Asked(Task):
    name: str = "asked"
    max_new_tokens: int = 20
    seconds: float = 600.0


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_greedy_samples_are_nearly_always_what_float32_would_say(family: str) -> None:
    """Given the tokens before, the most probable one of a full forward; where two are nearly equal, the other one."""
    tokenizer, same = letters(), []
    for low, exact in small_twins(family):
        Adapter(low)
        attention = low.config.get_text_config()._attn_implementation
        found = generate(low, tokenizer, QUESTIONS, Asked(), 4)
        assert low.config.get_text_config()._attn_implementation == attention and low.training
        for prompt, (sample,) in zip(PROMPTS, found, strict=True):
            before, new = tokens_of(prompt), tokens_of(sample.text)[1:] + ([] if sample.truncated else [END])
            with torch.no_grad():
                logits = exact(torch.tensor([before + new])).logits[0, len(before) - 1 : -1, : len(tokenizer)]
            same += (logits.argmax(-1) == torch.tensor(new)).tolist()
    assert len(same) > 100 and sum(same) / len(same) > 0.9


@pytest.mark.parametrize("graphs", [False, True])
def test_training_does_not_notice(graphs: bool, order: RowOrder) -> None:
    """Weights, state, draws and compiled code are what they were, and the next step waits for nothing."""
    recipe = load_recipe("random_tokens").with_values({"execution.cuda_graphs": graphs})
    learner = Learner(recipe, Adapter(tiny()), 7, POSITIONS)
    steps = [Progress(step, 0.9, 1.0, 10**6) for step in range(4)]
    batches = batches_of(order, len(steps), ROWS // 2)
    levels = {Levels(learner.rows.ratio(at), learner.router.ratio(at), learner.updates.begin(at)) for at in steps}
    warmed(learner, sorted(levels), order, ROWS // 2)
    for batch, step in zip(batches[:2], steps[:2], strict=True):
        learner.step(batch, step)
    micro = batches[2].micros[0]

    def state() -> dict[str, Any]:
        torch.cuda.synchronize()
        with torch.no_grad():
            hidden = learner.adapter.forward(micro).hidden_RD.clone()
        weights = {name: p.detach().clone() for name, p in learner.named_parameters()}
        memory = {name: t.clone() for name, t in learner.optimizer.state_dict().items()}
        draws = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(DEVICE)}
        return weights | memory | draws | {"hidden": hidden}

    before, compiled = state(), dict(counters["stats"])
    model, tokenizer = learner.adapter.model, letters()
    assert model.config.vocab_size >= VOCABULARY >= len(tokenizer)
    for task in (Asked(), Asked(samples=2, temperature=1.0, stop=("ab", "x"))):
        generate(model, tokenizer, QUESTIONS, task, 4)
        fill(model, tokenizer, QUESTIONS, task, 4)
    after = state()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    torch.cuda.synchronize()
    with no_waiting():
        rows = [learner.step(batch, step) for batch, step in zip(batches[2:], steps[2:], strict=True)]
    assert dict(counters["stats"]) == compiled
    assert all(row.device_values[GRAD_NORM].isfinite().all() for row in rows)
