r"""GSM8K with eight worked examples, scored as the task `gsm8k_cot` (version 3) of lm-evaluation-harness scores it.

strict     the number after the first "The answer is", by a pattern that wants one more character behind it
flexible   the last number of the text
verified   flexible's number by math-verify, so 18.00 is 18

Strict and flexible compare text with the part of the answer after "####", without commas, dollar signs, one final
period and case. The examples are those of arXiv:2201.11903; the problems are arXiv:2110.14168.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cggr_ray.evaluation.answers import judged
from cggr_ray.evaluation.estimates import share
from cggr_ray.evaluation.task import FileTask, Question, Sample, Verdict, counted

EXAMPLES = Path(__file__).with_name("gsm8k_cot.json")
STRICT = re.compile(r"The answer is (\-?[0-9\.\,]+).")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
# Taken out of both sides before they are compared, in this order.
IGNORED = tuple(re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"))


@dataclass(frozen=True)
class Gsm8k(FileTask):
    """`path`: a JSONL file with columns question and answer, a solution that ends with "#### <answer>"."""

    name: str = "gsm8k"
    questions: int = 1319
    stop: tuple[str, ...] = ("Q:", "</s>", "<|im_end|>")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples != 1:
            raise ValueError(f"samples = {self.samples} of task {self.name!r}; accepted: 1")

    def load(self) -> list[Question]:
        before = examples()
        questions = []
        for number, (text, solution) in enumerate(self.rows("question", "answer")):
            if "####" not in solution:
                raise ValueError(f'{self.path}: answer {number} ends {solution[-40:]!r}; accepted: "#### <answer>"')
            answer = solution.rpartition("####")[2].strip()
            questions.append(Question(str(number), f"{before}Q: {text}\nA:", answer, text))
        return self.drawn(questions)

    def judge(self, question: Question, sample: Sample) -> Verdict:
        first, last = strict(sample.text), flexible(sample.text)
        verdict = judged(question.answer, last if last and re.search("[0-9]", last) else None)
        marks = {"strict": exact_match(question.answer, first), "flexible": exact_match(question.answer, last)}
        return Verdict(verdict.extracted, verdict.correct, verdict.second, marks)

    def measures(self, verdicts: Sequence[Sequence[Verdict]], samples: Sequence[Sequence[Sample]]) -> dict[str, float]:
        given = [verdict for one in verdicts for verdict in one]
        return (
            counted(verdicts, samples)
            | share("strict", [verdict.marks["strict"] for verdict in given])
            | share("flexible", [verdict.marks["flexible"] for verdict in given])
            | share("verified", [verdict.correct for verdict in given])
        )


def examples() -> str:
    """The eight worked examples as they stand before every question."""
    rows = json.loads(EXAMPLES.read_text(encoding="utf-8"))["examples"]
    return "".join(f"Q: {row['question']}\nA: {row['answer']}\n\n" for row in rows)


def strict(text: str) -> str | None:
    found = STRICT.search(text)
    return found and found[1].strip()


def flexible(text: str) -> str | None:
    """The last match; it need not hold a digit."""
    found = None
    for match in FLEXIBLE.finditer(text):
        found = match[0].strip()
    return found


def exact_match(gold: str, answer: str | None) -> bool:
    return answer is not None and _compared(gold) == _compared(answer)


def _compared(text: str) -> str:
    for pattern in IGNORED:
        text = pattern.sub("", text)
    return text.lower()
