"""Task: questions that a model answers in its own words at a milestone, and how the answers are judged.

A task is a part of a race file. It draws its questions, says how each is sampled, judges one sample at a time and adds
the verdicts up; it never sees the model. Under a time cap a run answers the first questions of a random order, so what
was answered is a random draw of them all.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from cggr_ray.data.sources import Columns, Document, Jsonl, Source, document
from cggr_ray.seeds import check_seed


@dataclass(frozen=True)
class Question:
    """`key` is stable within the task, `prompt` is the text as the model reads it, `answer` the right one.

    `text` is the question alone, without examples and instructions: what is looked for in training documents.
    """

    key: str
    prompt: str
    answer: str
    text: str = ""


@dataclass(frozen=True)
class Sample:
    """One continuation, cut before the first stop string; `truncated` if neither that nor an end came in time."""

    text: str
    truncated: bool


@dataclass(frozen=True)
class Verdict:
    """On one sample: what was compared, whether math-verify and our own check call it equal to the right answer.

    `marks` are the task's own rules by name, where it has some (the two filters of GSM8K).
    """

    extracted: str | None
    correct: bool
    second: bool
    marks: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What all tasks share. At most `questions` are drawn by `seed`; `seconds` caps one evaluation.

    `temperature` 0 is greedy, and then one sample says all. `stop` are strings that end an answer. `chat` asks in the
    turns of the tokenizer's chat template, whose end of a turn ends an answer too.
    """

    IS_PART: ClassVar[bool] = True
    # As many words of a question in a row in a training document mean that it may have been seen.
    OVERLAP_WORDS: ClassVar[int] = 13

    name: str
    questions: int = 1000
    seed: int = 0
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seconds: float = 60.0
    stop: tuple[str, ...] = ()
    chat: bool = False

    def __post_init__(self) -> None:
        where = f"of task {self.name!r}"
        for key, least in (("questions", 1), ("samples", 1), ("max_new_tokens", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} = {getattr(self, key)} {where}; accepted: at least {least}")
        check_seed("seed", self.seed, f"task {self.name!r}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} {where}; accepted: 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} {where}; accepted: a share in (0, 1]")
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds = {self.seconds} {where}; accepted: a positive number")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples = {self.samples} {where} at temperature 0; accepted: 1, or a temperature")
        if "" in self.stop:
            raise ValueError(f"stop = {list(self.stop)} {where}; accepted: strings of at least one character")

    def check(self) -> None:
        """Whether the questions can be had, before a run starts.

        Raises:
            ValueError: what is missing or malformed.
        """
        self.load()

    def apart_from(self, sources: Sequence[Source]) -> None:
        """Raises ValueError if the questions are what one of the training sources gives."""
        raise NotImplementedError

    def load(self) -> list[Question]:
        """The questions in the order that `seed` draws, at most `questions` of them."""
        raise NotImplementedError

    def judge(self, question: Question, sample: Sample) -> Verdict:
        raise NotImplementedError

    def measures(self, verdicts: Sequence[Sequence[Verdict]], samples: Sequence[Sequence[Sample]]) -> dict[str, float]:
        """What `counted` says and the task's own measures; names without a prefix, one inner list a question.

        A share comes with `_low` and `_high`, its 95 % interval; without a question answered it is left out.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FileTask(Task):
    """A task whose questions are lines of a local JSONL file, plain or .xz, relative to the race file."""

    path: str = ""

    def apart_from(self, sources: Sequence[Source]) -> None:
        for source in sources:
            trained = getattr(source, "path", None)
            if trained and Path(trained).resolve() == Path(self.path).resolve():
                raise ValueError(f"path = {self.path!r} of task {self.name!r} is also that of source {source.name!r}; "
                                 "accepted: a file that is not trained on")  # fmt: skip

    def rows(self, question: str, answer: str) -> list[Document]:
        """All lines, as (question, answer), from the two named columns; an answer may be an integer, too.

        Raises:
            ValueError: no such file or column, a line that is not JSON, or no line at all.
        """
        rows, columns = [], Columns(question, answer)
        for where, row in Jsonl(self.name, path=self.path).rows():
            if type(row.get(answer)) is int:
                row[answer] = str(row[answer])
            rows.append(document(row, columns.resolve(list(row), where), where))
        if not rows:
            raise ValueError(f"{self.path}: no question; accepted: one JSON object a line")
        return rows

    def drawn(self, questions: Sequence[Question]) -> list[Question]:
        """At most `questions` of them in the order that `seed` draws, which does not depend on how many are asked."""
        order = list(questions)
        random.Random(self.seed).shuffle(order)
        return order[: self.questions]


def counted(verdicts: Sequence[Sequence[Verdict]], samples: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Of every task: n (questions), valid (samples with an answer in them), disagreements (samples that math-verify and
    the second check judge differently) and truncated, a share of the samples that is left out where there are none."""
    flat = [sample for one in samples for sample in one]
    given = [verdict for one in verdicts for verdict in one]
    counts = {
        "n": float(sum(bool(one) for one in verdicts)),
        "valid": float(sum(verdict.extracted is not None for verdict in given)),
        "disagreements": float(sum(verdict.correct != verdict.second for verdict in given)),
    }
    return counts | ({"truncated": sum(sample.truncated for sample in flat) / len(flat)} if flat else {})
