"""Accuracy on generated maths problems, of a stream that nothing was trained on: it moves even for a tiny model.

Prompt and answer are spelled as in training: the question, a new line, steps, "#### <answer>". A sample that did not
come to its end has no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cggr_ray.data.problems import LEVELS, problems, render_answer
from cggr_ray.data.sources import Problems, Source
from cggr_ray.evaluation.answers import final_answer, judged
from cggr_ray.evaluation.estimates import share
from cggr_ray.evaluation.task import Question, Sample, Task, Verdict, counted


@dataclass(frozen=True)
class Generated(Task):
    """The first `questions` problems of stream `seed`, which no training source may have."""

    # A whole question: they share their templates with what is trained on.
    OVERLAP_WORDS: ClassVar[int] = 1000

    name: str = "generated"
    questions: int = 200
    seed: int = 1_000_003
    levels: tuple[int, ...] = LEVELS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples != 1:
            raise ValueError(f"samples = {self.samples} of task {self.name!r}; accepted: 1")
        if not self.levels or not set(self.levels) <= set(LEVELS):
            raise ValueError(f"levels = {list(self.levels)} of task {self.name!r}; accepted: some of {list(LEVELS)}")

    def apart_from(self, sources: Sequence[Source]) -> None:
        for source in sources:
            if isinstance(source, Problems) and source.seed == self.seed:
                raise ValueError(f"seed = {self.seed} of task {self.name!r} is also that of source {source.name!r}; "
                                 "accepted: a stream that is not trained on")  # fmt: skip

    def load(self) -> list[Question]:
        return [
            Question(str(number), f"{problem.question}\n", render_answer(problem.answer), problem.question)
            for number, problem in enumerate(problems(self.seed, self.questions, self.levels))
        ]

    def judge(self, question: Question, sample: Sample) -> Verdict:
        return judged(question.answer, None if sample.truncated else final_answer(sample.text))

    def measures(self, verdicts: Sequence[Sequence[Verdict]], samples: Sequence[Sequence[Sample]]) -> dict[str, float]:
        given = [verdict.correct for one in verdicts for verdict in one]
        return counted(verdicts, samples) | share("accuracy", given)
