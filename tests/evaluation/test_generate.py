"""Generation: batched, cached and padded equals one prompt at a time by full forwards; drawn as the softmax says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from small_models import CONFIGS, small_model
from small_tokenizers import END, LETTERS, letters, text_of, tokens_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cggr_ray.evaluation import generate as module
from cggr_ray.evaluation.generate import StopStrings, check_prompts, generate
from cggr_ray.evaluation.task import Question, Sample, Task
from cggr_ray.models.adapter import Adapter


@dataclass(frozen=True)
class Asked(Task):
    name: str = "asked"
    max_new_tokens: int = 20


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return letters()


def questions_of(prompts: Sequence[str]) -> list[Question]:
    return [Question(str(number), prompt, "") for number, prompt in enumerate(prompts)]


PROMPTS = ["What is 1 + 1?", "x", "A longer question, of more than a window", "Two?", "of", "the last"]


@torch.no_grad()
def serial(model: PreTrainedModel, tokens: list[int], most: int, vocabulary: int) -> list[int]:
    """The most probable tokens one by one, by full forwards of one sequence."""
    tokens, new = list(tokens), []
    while len(new) < most and END not in new:
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1, :vocabulary]
        new.append(int(logits.argmax()))
        tokens.append(new[-1])
    return new


@pytest.mark.parametrize(("family", "rows"), [*((family, 4) for family in CONFIGS), ("gemma3", 1)])
def test_greedy_samples_are_those_of_full_forwards(family: str, rows: int, tokenizer: Any) -> None:
    model = small_model(family)
    adapter = Adapter(model)
    with torch.no_grad():
        adapter.head_VD[END] *= 1.5  # so that some samples end early
    found = generate(model, tokenizer, questions_of(PROMPTS), Asked(), rows)
    for prompt, (sample,) in zip(PROMPTS, found, strict=True):
        new = serial(model, tokens_of(prompt), 20, len(tokenizer))
        assert sample == Sample(text_of(new), truncated=END not in new)
    assert model.training and model.config.get_text_config()._attn_implementation == "sdpa"


def test_a_token_is_computed_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, widths = small_model("llama"), []
    model.model.register_forward_pre_hook(
        lambda _, arguments, keywords: widths.append(tuple(keywords["input_ids"].shape)), with_kwargs=True
    )
    samples = generate(model, tokenizer, questions_of(["a", "bcd"]), Asked(max_new_tokens=5), 2)
    longest = max(len(sample.text) for (sample,) in samples)
    assert widths == [(2, 4), *[(2, 1)] * (longest - 1)] and longest == 5


def test_attention_is_none_that_plans_for_every_length(tokenizer: Any) -> None:
    model, cudnn = small_model("llama"), []
    model.model.register_forward_pre_hook(lambda *_: cudnn.append(torch.backends.cuda.cudnn_sdp_enabled()))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    generate(model, tokenizer, questions_of(["a"]), Asked(max_new_tokens=5), 1)
    assert cudnn and not any(cudnn) and torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_samples_are_drawn_as_the_softmax_says(top_p: float, tokenizer: Any) -> None:
    """Of 4000 draws of one token the frequencies lie within four standard deviations of the probabilities."""
    model, temperature, draws = small_model("llama"), 2.0, 4000
    task = Asked(samples=draws, temperature=temperature, top_p=top_p, max_new_tokens=1, seconds=600.0)
    (samples,) = generate(model, tokenizer, questions_of(["What is"]), task, 500)
    with torch.no_grad():
        logits = model(torch.tensor([tokens_of("What is")])).logits[0, -1, : len(tokenizer)].double() / temperature
    p, order = logits.softmax(-1).sort(descending=True)
    kept = torch.where(p.cumsum(0) - p < top_p, p, 0.0)
    expected = torch.zeros_like(kept).scatter(0, order, kept / kept.sum())
    counts = torch.zeros_like(expected)
    for sample in samples:
        counts[LETTERS.index(sample.text) + 1 if sample.text else END] += 1
    spread = (draws * expected * (1 - expected)).sqrt()
    assert ((counts - draws * expected).abs() <= 4 * spread + 1e-9).all()
    assert counts[expected == 0].sum() == 0
    assert (expected > 0).sum() > 3


def test_the_same_draws_again_and_others_by_another_seed(tokenizer: Any) -> None:
    model, asked = small_model("llama"), questions_of(PROMPTS)
    task = Asked(samples=3, temperature=1.0)
    first = generate(model, tokenizer, asked, task, 4)
    assert generate(model, tokenizer, asked, task, 4) == first
    assert generate(model, tokenizer, asked, replace(task, seed=1), 4) != first
    assert len({sample.text for sample in first[0]}) == 3
    assert [len(samples) for samples in first] == [3] * len(PROMPTS)


def test_nothing_of_the_process_or_the_model_moves(tokenizer: Any) -> None:
    model = small_model("gemma3")
    adapter = Adapter(model)
    adapter.set_active_layers([False, True, True])
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    settings, config = model.generation_config, model.config.to_dict()
    learns = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    generate(model, tokenizer, questions_of(PROMPTS), Asked(samples=2, temperature=1.0), 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is settings and model.config.to_dict() == config and model.training
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == learns
    assert all(p.grad is None for p in model.parameters())


class Scripted:
    """A tokenizer's decoder: every token is a piece of text."""

    eos_token_id = END

    def __init__(self, *pieces: str) -> None:
        self.pieces = ["<end>", *pieces]

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(self.pieces[n] for n in ids)


PIECES = Scripted("a", "Q", ":", "sto", "p", "pper", "Q: x", "\n", "é", "s", "t", "o")


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([1, 2, 3, 1], "a"),  # two tokens make "Q:"
        ([1, 7, 1], "a"),  # it begins a longer token
        ([4, 5, 1], ""),
        ([4, 6, 1], ""),  # "stopper" holds "stop"
        ([1, 10, 11, 12, 5, 1], "a"),  # a token a letter
        ([1, 2, 1, 3, 4, 1, 5], None),
        ([9, 8, 8, 1], "é"),
        ([1, 2, END], "aQ"),
    ],
)
def test_stop_strings_end_a_sample_however_they_fall_into_tokens(ids: list[int], text: str | None) -> None:
    stop = ("Q:", "stop", "\n\n")
    criterion: Any = StopStrings(PIECES, stop, prompt=3, samples=2)
    prompt = [2, 2, 2]  # Q, and a colon as the first new token is no stop string
    ended = []
    for length in range(1, len(ids) + 1):
        rows = torch.tensor([prompt + ids[:length], prompt + ([3] + [1] * len(ids))[:length]])
        ended.append(criterion(rows, None).tolist())
    assert not any(other for _, other in ended)
    first = next((n for n, (one, _) in enumerate(ended) if one), None)
    assert [one for one, _ in ended] == [first is not None and n >= first for n in range(len(ids))]
    for padding in ([], [END]):  # of a batch in which others go on
        sample = module._sample(PIECES, ids if first is None else ids[: first + 1] + padding, stop)
        assert sample == Sample(PIECES.decode(ids) if text is None else text, truncated=first is None)
    whole = PIECES.decode(ids)
    assert (first is None) == (not any(string in whole for string in stop) and END not in ids)


def test_stop_strings_and_ends_cut_real_samples(tokenizer: Any) -> None:
    """Stopping early changes no text before the stop string, and no other sample of the batch."""
    model = small_model("llama")
    plain = generate(model, tokenizer, questions_of(PROMPTS), Asked(), 4)
    stop = (plain[0][0].text[4:7], plain[2][0].text[9:10])
    stopped = generate(model, tokenizer, questions_of(PROMPTS), Asked(stop=stop), 4)
    for (whole,), (cut,) in zip(plain, stopped, strict=True):
        at = min((whole.text.find(s) for s in stop if s in whole.text), default=None)
        assert cut == (whole if at is None else Sample(whole.text[:at], truncated=False))
    assert stopped[0][0].text == plain[0][0].text[:4] and stopped != plain


@pytest.mark.parametrize(("allowed", "answered"), [(0, 0), (2, 2), (3, 4), (9, 6)])
def test_a_batch_that_the_time_cap_cuts_is_left_out_whole(
    allowed: int, answered: int, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two questions of three samples fill a batch and a half: what has all its samples counts, and is a prefix."""
    batches, real = [], module._batch

    def counted(*arguments: Any) -> Any:
        batches.append(1)
        *rest, until = arguments
        return real(*rest, until if len(batches) <= allowed else time.monotonic())

    monkeypatch.setattr(module, "_batch", counted)
    task = Asked(samples=3, temperature=1.0, seconds=600.0)
    found = generate(small_model("llama"), tokenizer, questions_of(PROMPTS), task, 4)
    assert [len(samples) for samples in found] == [3] * answered + [0] * (len(PROMPTS) - answered)


@pytest.mark.timeout(60)
def test_the_cap_is_kept(tokenizer: Any) -> None:
    """So many tokens would take several minutes."""
    with torch.no_grad():
        (model := small_model("llama")).get_output_embeddings().weight[END] = 0
    task = Asked(max_new_tokens=100_000, seconds=0.3)
    assert generate(model, tokenizer, questions_of(PROMPTS), task, 2) == [[] for _ in PROMPTS]


def test_a_broken_model_says_something(tokenizer: Any) -> None:
    model = small_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    for task in (Asked(), Asked(samples=2, temperature=0.5), Asked(samples=2, temperature=0.5, top_p=0.9)):
        assert all(len(samples) == task.samples for samples in generate(model, tokenizer, questions_of("ab"), task, 3))


def test_a_prompt_that_does_not_fit_is_named(tokenizer: Any) -> None:
    config = CONFIGS["gpt2"]()
    asked = questions_of(["a" * 43, "b"])
    check_prompts(config, tokenizer, asked, Asked())
    said = "task 'asked': the longest prompt has 45 tokens, max_new_tokens = 20; accepted: at most the model's 64"
    with pytest.raises(ValueError, match=said):
        check_prompts(config, tokenizer, questions_of(["a" * 44]), Asked())
