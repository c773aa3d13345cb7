"""Batched generation: what a causal LM says to many prompts, by Hugging Face's `generate` with a cache.

    x_t ~ softmax(z_t / temperature) over the smallest set of tokens that holds top_p of it;   temperature 0: argmax z_t

Prompts begin as training documents do, with their first token, and are padded on the left. A sample ends at the next
end-of-text, at a stop string, or after `max_new_tokens`. Batches are taken in the order of the questions and one
that the time cap cuts is left out whole: what is answered is then a prefix, chosen neither by the length of a prompt
nor by that of an answer. Shapes: B samples of a batch, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from cggr_ray.data.chat import Turns
from cggr_ray.data.store import encode
from cggr_ray.data.tokenizer import first_token
from cggr_ray.evaluation.task import Question, Sample, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# No logit of a working model is as large; one of a broken model may be infinite, or no number.
LARGEST_LOGIT = 1e6
# Not cuDNN's: it plans for every length of the cache, some 60 ms a token that the process has not had before.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], task: Task, rows: int
) -> list[list[Sample]]:
    """`task.samples` samples of every question, in the order of the questions; none of those that came too late.

    `rows` samples are generated at once. Draws depend on the task's seed, the questions and `rows`; the model, its
    settings and the random state of the process are afterwards what they were.
    """
    until = time.monotonic() + task.seconds
    prompts, task = prompt_tokens(tokenizer, questions, task), stopping(tokenizer, task)
    order = [number for number in range(len(questions)) for _ in range(task.samples)]
    found: list[list[Sample]] = [[] for _ in questions]
    with published(model), own_draws(model.device):
        for first in range(0, len(order), rows):
            chosen = order[first : first + rows]
            seed(model.device, task.seed, first)
            samples = _batch(model, tokenizer, [prompts[number] for number in chosen], task, until)
            if samples is None:
                break
            for number, sample in zip(chosen, samples, strict=True):
                found[number].append(sample)
    return [samples if len(samples) == task.samples else [] for samples in found]


def fill(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], task: Task, rows: int
) -> None:
    """Generates the largest batch that a task can ask for, to its last token, or for the task's seconds."""
    prompts, most = prompt_tokens(tokenizer, questions, task), min(rows, len(questions) * task.samples)
    endless = replace(task, stop=())
    with published(model), own_draws(model.device):
        _batch(
            *(model, tokenizer, [max(prompts, key=len)] * most, endless, time.monotonic() + task.seconds),
            least_new=task.max_new_tokens,
        )


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], task: Task) -> list[list[int]]:
    """The tokens of every prompt, as a training document with this prompt begins."""
    asked = [question.prompt for question in questions]
    if task.chat:
        asked = list(map(Turns(tokenizer).prompt, asked))
    return [[first_token(tokenizer), *ids] for ids in encode(tokenizer, asked)]


def stopping(tokenizer: PreTrainedTokenizerBase, task: Task) -> Task:
    """The task with all that ends an answer."""
    return replace(task, stop=(*task.stop, Turns(tokenizer).end)) if task.chat else task


def check_prompts(config: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], task: Task) -> None:
    """Whether a model of this configuration has the positions that a task may need, and reads its prompts.

    Raises:
        ValueError: the longest prompt and `max_new_tokens` are more, or a prompt has a token without a row in the
            embedding; the task and the lengths are named.
    """
    text_config, prompts = config.get_text_config(), prompt_tokens(tokenizer, questions, task)
    largest = max((max(prompt) for prompt in prompts), default=0)
    if largest >= text_config.vocab_size:
        raise ValueError(f"task {task.name!r}: a prompt has the token {tokenizer.convert_ids_to_tokens(largest)!r}; "
                         f"accepted: the {text_config.vocab_size} tokens that the model has")  # fmt: skip
    most = getattr(text_config, "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if most is not None and longest + task.max_new_tokens > most:
        raise ValueError(f"task {task.name!r}: the longest prompt has {longest} tokens, max_new_tokens = "
                         f"{task.max_new_tokens}; accepted: at most the model's {most} positions together")  # fmt: skip


@contextmanager
def published(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model runs as Hugging Face publishes it: its attention over a cache, no settings of its own.

    Training runs the same layers with an attention that knows documents and no cache.
    """
    config = model.config.get_text_config()
    before = config._attn_implementation, model.training, model.generation_config
    config._attn_implementation, model.generation_config = "sdpa", GenerationConfig()
    model.eval()
    try:
        with sdpa_kernel(ATTENTION):
            yield
    finally:
        config._attn_implementation, _, model.generation_config = before
        model.train(before[1])


@contextmanager
def own_draws(device: torch.device) -> Iterator[None]:
    """Inside, drawing at random moves nobody else's draws."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def seed(device: torch.device, *numbers: int) -> None:
    """Seeds the draws on a device by some numbers."""
    one = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(one)
    else:
        torch.default_generator.manual_seed(one)


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    task: Task,
    until: float,
    least_new: int = 0,
) -> list[Sample] | None:
    """One sample of every prompt, or None where time was up before all had ended. None ends before `least_new` tokens,
    but at a stop string."""
    width, end = max(map(len, prompts)), tokenizer.eos_token_id
    tokens = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    deadline = Deadline(until)
    criteria = [StopStrings(tokenizer, task.stop, width, len(prompts))] if task.stop else []
    generator: Any = model
    out: Tensor = generator.generate(
        tokens,
        attention_mask=mask,
        generation_config=_settings(task, end, least_new),
        logits_processor=LogitsProcessorList([Sayable(len(tokenizer))]),
        stopping_criteria=StoppingCriteriaList([*criteria, deadline]),
    )
    return None if deadline.cut else [_sample(tokenizer, ids, task.stop) for ids in out[:, width:].tolist()]


def _settings(task: Task, end: int, least_new: int) -> GenerationConfig:
    drawing: dict[str, Any] = {"do_sample": False}
    if task.temperature > 0:
        drawing = {"do_sample": True, "temperature": task.temperature, "top_p": task.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=task.max_new_tokens,
        min_new_tokens=least_new,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=end,
        **drawing,
    )


def _sample(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: Sequence[str]) -> Sample:
    """The text before the first end-of-text and the first stop string."""
    end = tokenizer.eos_token_id
    text = decoded(tokenizer, ids[: ids.index(end)] if end in ids else ids)
    at = [place for place in map(text.find, stop) if place >= 0]
    return Sample(text[: min(at)] if at else text, truncated=not at and end not in ids)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of some tokens; special ones show, since a stop string may be one."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class Sayable(LogitsProcessor):
    """Only tokens that the tokenizer has, of finite logits: an embedding may have more rows, a model may be broken."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.nan_to_num(0.0).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        scores[:, self._tokens :] = -torch.inf
        return scores


class Deadline(StoppingCriteria):
    """Ends every sample when time is up; `cut` says that it did."""

    def __init__(self, until: float) -> None:
        self._until, self.cut = until, False

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.cut = time.monotonic() >= self._until
        return torch.full((len(input_ids),), self.cut, device=input_ids.device)


class StopStrings(StoppingCriteria):
    """Ends a sample whose new text holds a stop string, however it falls into tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], prompt: int, samples: int) -> None:
        self._tokenizer, self._strings, self._prompt = tokenizer, strings, prompt
        # A token is a byte at least, and a tokenizer may drop a space before the first one that it decodes.
        self._tail = max(len(string.encode()) for string in strings) + 1
        self._stopped = [False] * samples

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        new = input_ids[:, max(self._prompt, input_ids.shape[1] - self._tail) :].tolist()
        for number, ids in enumerate(new):
            self._stopped[number] = self._stopped[number] or self._ends(ids)
        return torch.tensor(self._stopped, device=input_ids.device)

    def _ends(self, ids: list[int]) -> bool:
        if ids[-1] == self._tokenizer.eos_token_id:
            return True
        text = decoded(self._tokenizer, ids)
        return any(string in text for string in self._strings)
