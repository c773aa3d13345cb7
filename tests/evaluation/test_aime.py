from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from cggr_ray.codec import from_plain, to_plain
from cggr_ray.evaluation.aime import Aime, integer
from cggr_ray.evaluation.task import Question, Sample, Verdict

SHARED = Path(__file__).parents[3] / "shared" / "data" / "aime24" / "test.jsonl"
GOLD = Question("0", "", "073")


def judged(text: str, truncated: bool = False) -> Verdict:
    return Aime(path="none").judge(GOLD, Sample(text, truncated))


@pytest.mark.parametrize(
    "text",
    [
        r"so \boxed{73}",
        r"\boxed{073}.",
        r"\boxed{12} is wrong, \boxed{73}",
        r"\boxed{m+n = 73}",
        r"\boxed{73\text{ minutes}}",
        r"\boxed{73^\circ}",
        r"\boxed{\boxed{73}}",
        r"<think>\boxed{5}</think> \boxed{73}",
        r"\boxed{\dfrac{146}{2}}",
        r"$\boxed{73}$ as asked: within \boxed{}",
    ],
)
def test_right_answers(text: str) -> None:
    assert judged(text) == Verdict("73", True, True)


@pytest.mark.parametrize("text", [r"\boxed{73} or rather \boxed{37}", r"\boxed{730}", r"\boxed{0}"])
def test_wrong_answers(text: str) -> None:
    verdict = judged(text)
    assert verdict.extracted and not verdict.correct and not verdict.second


@pytest.mark.parametrize(
    "text",
    [
        *("73", "The answer is 73.", r"\boxed{73", r"\boxed{}", "", r"\boxed{1000}", r"\boxed{-73}", r"\boxed{73.5}"),
        *(r"\boxed{73\%}", r"\boxed{x}", r"\boxed{73, 74}", r"<think>\boxed{73}", r"\boxed{73 or 37}"),
    ],
)
def test_what_is_no_valid_solution(text: str) -> None:
    assert judged(text) == Verdict(None, False, False)


def test_a_sample_that_was_cut_off_has_no_answer() -> None:
    assert judged(r"\boxed{73} but wait", truncated=True) == Verdict("73", True, True)
    assert judged(r"so it is \boxed{73", truncated=True) == Verdict(None, False, False)


@pytest.mark.parametrize(("text", "found"), [("007", "7"), ("999", "999"), ("0", "0"), ("1000", None), ("1/2", None)])
def test_integers(text: str, found: str | None) -> None:
    assert integer(text) == found


def verdicts(right: int, n: int) -> list[Verdict]:
    return [Verdict("1", number < right, number < right) for number in range(n)]


def test_measures_are_means_over_problems() -> None:
    task = Aime(path="none", samples=4, pass_at=(2, 4))
    counts = [0, 1, 3, 4]
    given = [verdicts(c, 4) for c in counts]
    samples = [[Sample("", False)] * 3 + [Sample("", True)] for _ in counts]
    found = task.measures(given, samples)
    assert found["avg_at_n"] == sum(counts) / 16
    for k in (2, 4):
        by_hand = [[any(chosen) for chosen in combinations([v.correct for v in one], k)] for one in given]
        assert found[f"pass_at_{k}"] == pytest.approx(sum(sum(one) / len(one) for one in by_hand) / 4)
        assert found[f"pass_at_{k}_low"] <= found[f"pass_at_{k}"] <= found[f"pass_at_{k}_high"]
    assert found["avg_at_n_low"] < found["avg_at_n"] < found["avg_at_n_high"]
    assert (found["n"], found["valid"], found["truncated"]) == (4, 16, 0.25)


def test_a_time_cap_can_leave_samples_and_problems_out() -> None:
    task = Aime(path="none", samples=4, pass_at=(2, 4))
    given = [verdicts(1, 4), verdicts(1, 2), []]
    found = task.measures(given, [[Sample("", False)] * len(one) for one in given])
    assert found["n"] == 2 and found["avg_at_n"] == (1 / 4 + 1 / 2) / 2
    assert found["pass_at_2"] == (1 / 2 + 1) / 2 and "pass_at_4" not in found
    assert set(task.measures([], [])) == {"n", "valid", "disagreements"}


def test_questions_and_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "aime.jsonl"
    path.write_text("".join(json.dumps({"problem": f"Find {n}.", "answer": f"{n:03}"}) + "\n" for n in range(40)))
    task = Aime(path=str(path))
    questions = task.load()
    assert len(questions) == 30 and len({question.key for question in questions}) == 30
    question = questions[0]
    assert question.prompt.startswith(f"{question.text}\n") and "\\boxed{}" in question.prompt
    assert question.text == f"Find {int(question.answer)}." and from_plain(Aime, to_plain(task)) == task
    path.write_text(path.read_text() + json.dumps({"problem": "Find 40.", "answer": 40}) + "\n")
    assert {question.text: question.answer for question in Aime(path=str(path), questions=99).load()}[
        "Find 40."
    ] == "40"
    for answer, said in ((1000, "answer 0 is '1000'"), (True, "column 'answer' is bool"), (None, "missing or null")):
        path.write_text(json.dumps({"problem": "Find 1000.", "answer": answer}))
        with pytest.raises(ValueError, match=said):
            task.check()
    path.write_text(json.dumps({"problem": "Find x.", "answer": "x"}))
    with pytest.raises(ValueError, match="answer 0 is 'x'; accepted: an integer from 0 to 999"):
        task.check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"pass_at": (32,)}, "pass_at = 32"), ({"pass_at": (0,)}, "pass_at = 0"), ({"temperature": 0.0}, "samples = 16")],
)
def test_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Aime(**settings)


@pytest.mark.skipif(not SHARED.is_file(), reason="AIME 2024 is not here")
def test_the_published_problems() -> None:
    task = Aime(path=str(SHARED))
    questions = task.load()
    assert len(questions) == 30
    for question in questions:
        verdict = task.judge(question, Sample(f"Thus \\boxed{{{int(question.answer)}}}.", False))
        assert verdict == Verdict(str(int(question.answer)), True, True)
