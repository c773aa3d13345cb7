r"""AIME: thirty problems whose answers are integers from 0 to 999, each sampled several times, without examples.

The answer of a sample is its last \boxed{...}, also where it did not come to its end; it is a valid solution if that is
such an integer (073 is 73). One greedy answer each would be a measure in steps of 1/30.

avg_at_n     mean over problems of the share of right samples, its interval over problems
pass_at_<k>  mean over problems of the unbiased pass@k
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cggr_ray.evaluation.answers import judged, last_boxed, number, without_thinking
from cggr_ray.evaluation.estimates import mean_share, pass_at
from cggr_ray.evaluation.task import FileTask, Question, Sample, Verdict, counted

INSTRUCTION = (
    "The answer is an integer from 0 to 999. Reason step by step, and put the final answer within \\boxed{}.\n"
)


@dataclass(frozen=True)
class Aime(FileTask):
    """`path`: a JSONL file with columns problem and answer. `pass_at`: the k of pass@k, at most `samples`.

    A problem of which the time cap left a sample out is left out whole.
    """

    name: str = "aime"
    questions: int = 30
    samples: int = 16
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 2048
    seconds: float = 600.0
    pass_at: tuple[int, ...] = (4, 8, 16)

    def __post_init__(self) -> None:
        super().__post_init__()
        for k in self.pass_at:
            if not 1 <= k <= self.samples:
                raise ValueError(f"pass_at = {k} of task {self.name!r}; accepted: 1 to samples = {self.samples}")

    def load(self) -> list[Question]:
        questions = []
        for number_, (text, answer) in enumerate(self.rows("problem", "answer")):
            if integer(answer) is None:
                raise ValueError(f"{self.path}: answer {number_} is {answer!r}; accepted: an integer from 0 to 999")
            questions.append(Question(str(number_), f"{text}\n{INSTRUCTION}", answer, text))
        return self.drawn(questions)

    def judge(self, question: Question, sample: Sample) -> Verdict:
        content = last_boxed(without_thinking(sample.text))
        given = content and integer(content)
        return replace(judged(question.answer, content), extracted=given) if given else Verdict(None, False, False)

    def measures(self, verdicts: Sequence[Sequence[Verdict]], samples: Sequence[Sequence[Sample]]) -> dict[str, float]:
        counts = [(len(one), sum(verdict.correct for verdict in one)) for one in verdicts if one]
        found = counted(verdicts, samples) | mean_share("avg_at_n", [correct / n for n, correct in counts])
        for k in self.pass_at:
            if all(n >= k for n, _ in counts):
                found |= mean_share(f"pass_at_{k}", [pass_at(k, n, correct) for n, correct in counts])
        return found


def integer(answer: str) -> str | None:
    """The integer from 0 to 999 that an answer is, without leading zeros, or None."""
    given = number(answer)
    if given is None or given.percent or given.value.denominator != 1 or not 0 <= given.value <= 999:
        return None
    return str(given.value)
