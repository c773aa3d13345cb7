from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cggr_ray.codec import from_plain, to_plain
from cggr_ray.data.sources import Jsonl, Problems
from cggr_ray.evaluation.gsm8k import Gsm8k, exact_match, examples, flexible, strict
from cggr_ray.evaluation.task import Question, Sample, Verdict

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl"


@pytest.fixture(scope="module")
def harness() -> dict[str, Any]:
    """Texts with the verdicts of lm-evaluation-harness, made by running its own task on them."""
    found: dict[str, Any] = json.loads((ROOT / "tests" / "fixtures" / "gsm8k_filters.json").read_text())
    return found


def write(path: Path, *rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count: int) -> list[dict[str, str]]:
    return [{"question": f"What is {n} + 1?", "answer": f"It is {n} + 1.\n#### {n + 1}"} for n in range(count)]


def test_both_filters_agree_with_the_harness_on_every_text(harness: dict[str, Any]) -> None:
    assert len(harness["rows"]) >= 300
    for row in harness["rows"]:
        first, last = strict(row["text"]), flexible(row["text"])
        assert (first or "[invalid]", last or "[invalid]") == (row["strict"], row["flexible"]), row
        assert exact_match(row["gold"], first) is row["strict_match"], row
        assert exact_match(row["gold"], last) is row["flexible_match"], row


def test_a_verdict_carries_both_filters_and_math_verifys_word(harness: dict[str, Any]) -> None:
    task = Gsm8k(path="none")
    for row in harness["rows"][::8]:
        verdict = task.judge(Question("0", "", row["gold"]), Sample(row["text"], False))
        assert verdict.marks == {"strict": row["strict_match"], "flexible": row["flexible_match"]}
        assert verdict.correct or not row["flexible_match"], row
    verdict = task.judge(Question("0", "", "18"), Sample("That makes $18.00", False))
    assert verdict == Verdict("$18.00", True, True, {"strict": False, "flexible": False})
    assert task.judge(Question("0", "", "18"), Sample("I think...", False)).extracted is None


def test_the_prompt_is_the_harnesss(harness: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", {"question": harness["question"], "answer": "2 + 3 = 5\n#### 5"})
    task = Gsm8k(path=path)
    (question,) = task.load()
    assert question.prompt == harness["prompt"] and question.answer == "5" and question.text == harness["question"]
    assert list(task.stop) == harness["stop"] and task.temperature == 0
    assert examples().count("The answer is ") == 8


def test_the_order_is_drawn_by_the_seed_and_a_few_are_the_first_of_all(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", *rows(50))
    everything = Gsm8k(path=path).load()
    keys = [question.key for question in everything]
    assert sorted(keys, key=int) == [str(n) for n in range(50)] and keys != sorted(keys, key=int)
    assert all(question.answer == str(int(question.key) + 1) for question in everything)
    assert Gsm8k(path=path, questions=7).load() == everything[:7]
    assert [question.key for question in Gsm8k(path=path, seed=1).load()] != keys


def test_it_is_a_table_of_a_race_file() -> None:
    task = Gsm8k(path="test.jsonl", questions=100)
    assert to_plain(task)["kind"] == "gsm8k" and from_plain(Gsm8k, to_plain(task)) == task


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"questions": 0}, "questions = 0 of task 'gsm8k'; accepted: at least 1"),
        ({"samples": 2, "temperature": 1.0}, "samples = 2 of task 'gsm8k'; accepted: 1"),
        ({"samples": 2}, "samples = 2 of task 'gsm8k' at temperature 0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"seconds": float("inf")}, "seconds = inf"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"stop": ("",)}, "stop = "),
    ],
)
def test_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gsm8k(**settings)


def test_a_file_is_refused_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'' does not exist"):
        Gsm8k().check()
    with pytest.raises(ValueError, match="no question"):
        Gsm8k(path=write(tmp_path / "empty.jsonl")).check()
    with pytest.raises(ValueError, match="no column 'answer'"):
        Gsm8k(path=write(tmp_path / "columns.jsonl", {"question": "Why?"})).check()
    with pytest.raises(ValueError, match=r"answer 0 ends 'It is 5\.'"):
        Gsm8k(path=write(tmp_path / "hashes.jsonl", {"question": "Why?", "answer": "It is 5."})).check()


def test_a_file_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", *rows(2))
    Gsm8k(path=path).apart_from([Problems(), Jsonl(path=str(tmp_path / "train.jsonl"))])
    with pytest.raises(ValueError, match="also that of source 'mine'"):
        Gsm8k(path=path).apart_from([Jsonl(name="mine", path=str(tmp_path / "x" / ".." / "test.jsonl"))])


def test_measures_count_what_was_answered() -> None:
    task = Gsm8k(path="none")
    question = Question("0", "", "18")
    texts = ["The answer is 18. ", "The answer is 18", "so 18.00", "no idea"]
    samples = [[Sample(text, text == "no idea")] for text in texts] + [[]]
    verdicts = [[task.judge(question, sample) for sample in one] for one in samples]
    found = task.measures(verdicts, samples)
    # Behind a last digit the strict pattern wants one more character: of "18" at the end it reads the 1.
    assert (found["strict"], found["flexible"], found["verified"]) == (0.25, 0.5, 0.75)
    assert (found["n"], found["valid"], found["truncated"], found["disagreements"]) == (4, 3, 0.25, 0)
    assert all(found[f"{m}_low"] < found[m] < found[f"{m}_high"] for m in ("strict", "flexible", "verified"))
    assert task.measures([], []) == {"n": 0, "valid": 0, "disagreements": 0}


@pytest.mark.skipif(not SHARED.is_file(), reason="GSM8K is not here")
def test_the_published_solutions_score_in_full_by_the_flexible_filter() -> None:
    task = Gsm8k(path=str(SHARED))
    questions = task.load()
    solutions = {str(n): json.loads(line)["answer"] for n, line in enumerate(SHARED.read_text().splitlines())}
    assert len(questions) == len(solutions) == 1319
    assert all(exact_match(q.answer, flexible(solutions[q.key])) for q in questions)
    assert not any(exact_match(q.answer, strict(solutions[q.key])) for q in questions)
