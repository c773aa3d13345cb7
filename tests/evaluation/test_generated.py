from __future__ import annotations

from typing import Any

import pytest

from cggr_ray.codec import from_plain, to_plain
from cggr_ray.data.problems import problem
from cggr_ray.data.sources import Jsonl, Problems
from cggr_ray.evaluation.estimates import Overlap
from cggr_ray.evaluation.generated import Generated
from cggr_ray.evaluation.task import Sample


def test_training_solutions_score_in_full_and_those_of_other_problems_hardly() -> None:
    task = Generated(questions=60)
    questions = task.load()
    solutions = [problem(task.seed, int(question.key)).solution for question in questions]
    right = [[task.judge(q, Sample(text, False))] for q, text in zip(questions, solutions, strict=True)]
    other = [[task.judge(q, Sample(text, False))] for q, text in zip(questions, solutions[::-1], strict=True)]
    samples = [[Sample("", False)]] * 60
    found = task.measures(right, samples)
    assert found["accuracy"] == 1 == pytest.approx(found["accuracy_high"]) and 0.9 < found["accuracy_low"] < 1
    assert (found["n"], found["valid"], found["truncated"], found["disagreements"]) == (60, 60, 0, 0)
    assert task.measures(other, samples)["accuracy"] < 0.2


def test_questions_read_as_the_training_documents_do() -> None:
    task = Generated(questions=5, levels=(1, 2))
    documents = Problems(seed=task.seed, count=5, levels=(1, 2)).documents()
    for question, document in zip(task.load(), documents, strict=True):
        assert question.prompt == f"{document.prompt}\n" and document.completion.endswith(f"#### {question.answer}")
    assert Generated(questions=3, levels=(1, 2)).load() == task.load()[:3]


def test_the_streams_share_no_question() -> None:
    same, other = (Overlap(task.load(), 1000) for task in (Generated(questions=300, seed=0), Generated(questions=300)))
    for document in Problems(count=1000).documents():
        same.read(document.prompt)
        other.read(document.prompt)
    assert len(same.found) == 300 and len(other.found) <= 2


@pytest.mark.parametrize(
    ("text", "extracted"),
    [
        ("3 * 4 = 12\n#### 12", "12"),
        ("#### 12\nAnd another question?\n#### 13", "12"),
        ("So it is \\boxed{12}.", "12"),
        ("12", None),
        ("####", None),
        ("", None),
    ],
)
def test_the_first_answer_line_counts(text: str, extracted: str | None) -> None:
    task = Generated(questions=1)
    assert task.judge(task.load()[0], Sample(text, False)).extracted == extracted


def test_a_sample_that_was_cut_off_has_no_answer() -> None:
    task = Generated(questions=1)
    (question,) = task.load()
    text = f"#### {question.answer}"
    assert task.judge(question, Sample(text, False)).correct
    assert not task.judge(question, Sample(text, True)).correct


def test_a_stream_that_is_trained_on_is_refused() -> None:
    task = Generated(seed=5)
    task.apart_from([Problems(seed=0), Jsonl(path="x.jsonl")])
    with pytest.raises(ValueError, match="seed = 5 of task 'generated' is also that of source 'mine'"):
        task.apart_from([Problems(name="mine", seed=5)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": (1, 9)}, r"levels = \[1, 9\]"),
        ({"levels": ()}, r"levels = \[\]"),
        ({"samples": 2, "temperature": 1.0}, "samples = 2"),
        ({"seed": -1}, "seed = -1 of task 'generated'; accepted: from 0"),
        # The stream of seed 0.
        ({"seed": 2**64}, r"seed = \d+ of task 'generated'; accepted: from 0"),
    ],
)
def test_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generated(**settings)


def test_it_is_a_table_of_a_race_file() -> None:
    task = Generated(questions=10, levels=(1,))
    assert to_plain(task)["kind"] == "generated" and from_plain(Generated, to_plain(task)) == task
