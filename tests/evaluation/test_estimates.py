from __future__ import annotations

import random
from itertools import combinations
from math import comb

import numpy as np
import pytest
from scipy import stats

from cggr_ray.evaluation.estimates import Overlap, mean_share, pass_at, share, wilson
from cggr_ray.evaluation.task import Question


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 30), (1, 30), (15, 30), (30, 30), (79, 1319)])
def test_wilson_is_scipys(successes: int, n: int) -> None:
    theirs = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_holds_the_true_share_in_95_of_100_samples() -> None:
    n, p = 50, 0.1
    covered = sum(
        comb(n, x) * p**x * (1 - p) ** (n - x) for x in range(n + 1) if wilson(x, n)[0] <= p <= wilson(x, n)[1]
    )
    assert 0.93 <= covered <= 0.98


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_subsets_of_k_samples(n: int) -> None:
    for correct in range(n + 1):
        right = [number < correct for number in range(n)]
        for k in range(1, n + 1):
            subsets = [any(chosen) for chosen in combinations(right, k)]
            assert pass_at(k, n, correct) == pytest.approx(sum(subsets) / len(subsets), abs=1e-15)


def test_pass_at_k_is_the_closed_form_and_unbiased() -> None:
    n, p = 20, 0.15
    for k in (1, 4, 16, 20):
        for correct in range(n + 1):
            product = 1.0  # 1 - prod (1 - k / i) for i from n - c + 1 to n
            for i in range(n - correct + 1, n + 1):
                product *= 1 - k / i
            assert pass_at(k, n, correct) == pytest.approx(1 - product, abs=1e-12)
        expected = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at(k, n, c) for c in range(n + 1))
        assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_wants_k_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} of pass@k; accepted: 1 to the 4"):
        pass_at(k, 4, 2)


def test_a_share_is_named_with_both_ends() -> None:
    found = share("strict", [True, False, False, False])
    assert found["strict"] == 0.25 and list(found) == ["strict", "strict_low", "strict_high"]
    assert 0 < found["strict_low"] < 0.25 < found["strict_high"] < 1
    assert share("strict", []) == {} == mean_share("avg", [])


@pytest.mark.parametrize(("a", "b"), [(0.05, 2.0), (0.1, 2.0), (0.1, 0.5), (0.5, 0.5), (2.0, 0.1)])
def test_the_interval_over_questions_holds_the_true_mean_in_95_of_100_evaluations(a: float, b: float) -> None:
    """30 questions of chances that differ, most of them next to 0, as hard problems have; 16 samples of each."""
    rng, evaluations, held = np.random.default_rng(0), 1000, 0
    for _ in range(evaluations):
        found = mean_share("avg", [float(right) / 16 for right in rng.binomial(16, rng.beta(a, b, 30))])
        held += found["avg_low"] <= a / (a + b) <= found["avg_high"]
    assert 0.93 <= held / evaluations <= 0.99


def test_the_ends_are_as_far_from_the_mean_as_student_s_t_allows_there() -> None:
    values = [0.0, 0.25, 1.0, 0.5, 0.25, 0.125]
    found, mean = mean_share("avg", values), sum(values) / 6
    assert found["avg"] == pytest.approx(mean)
    for end in (found["avg_low"], found["avg_high"]):
        error = stats.sem(values) * (end * (1 - end) / (mean * (1 - mean))) ** 0.5
        assert abs(end - mean) == pytest.approx(stats.t.ppf(0.975, 5) * error)


def test_one_right_sample_does_not_make_the_others_certain() -> None:
    found = mean_share("avg", [1 / 16] + [0.0] * 29)
    assert 0 < found["avg_low"] < found["avg"] and found["avg_high"] > 0.03


def test_samples_of_one_question_are_no_new_questions() -> None:
    """30 questions whose 16 samples agree are 30 observations: 480 would give a quarter of the width."""
    values = [1.0] * 6 + [0.0] * 24
    found = mean_share("avg", values)
    low, high = wilson(6 * 16, 30 * 16)
    assert found["avg_high"] - found["avg_low"] > 3 * (high - low)


def test_equal_means_are_not_certain() -> None:
    assert mean_share("avg", [0.0] * 30)["avg_high"] == pytest.approx(wilson(0, 30)[1])
    assert mean_share("avg", [1.0] * 30)["avg_low"] == pytest.approx(wilson(30, 30)[0])
    assert mean_share("avg", [0.5])["avg_low"] < 0.1


def question(key: str, text: str) -> Question:
    return Question(key, f"Q: with instructions around it: {text}\nA:", "1", text)


WORDS = [f"word{number}" for number in range(400)]


def shares(a: list[str], b: list[str], words: int) -> bool:
    runs = [[text[at : at + words] for at in range(len(text) - words + 1)] for text in (a, b)]
    return any(run in runs[1] for run in runs[0])


def test_overlap_is_found_from_13_words_on_and_wherever_it_stands() -> None:
    rng = random.Random(0)
    for number in range(60):
        text, length = rng.sample(WORDS, 30), (12, 13, 14, 30)[number % 4]
        start = rng.randint(0, 30 - length)
        document = [*rng.sample(WORDS, 20), *text[start : start + length], *rng.sample(WORDS, 20)]
        found = overlapping([question("a", " ".join(text))], ["nothing", " ".join(document)])
        assert (found == {"a"}) is shares(text, document, 13)
        assert found or length == 12


def test_overlap_of_questions_of_all_lengths_is_what_comparing_every_run_finds() -> None:
    rng = random.Random(1)
    for _ in range(200):
        texts = {str(n): rng.choices("abc", k=rng.randint(0, 7)) for n in range(6)}
        documents = [rng.choices("abc", k=rng.randint(0, 12)) for _ in range(2)]
        found = overlapping(
            [question(n, " ".join(text)) for n, text in texts.items()], list(map(" ".join, documents)), 5
        )
        assert found == {
            n for n, text in texts.items() if text for d in documents if shares(text, d, min(5, len(text)))
        }


def overlapping(questions: list[Question], documents: list[str], words: int = 13) -> set[str]:
    overlap = Overlap(questions, words)
    for document in documents:
        overlap.read(document)
    return overlap.found


def test_overlap_sees_through_case_and_punctuation_and_takes_short_questions_whole() -> None:
    questions = [
        question("short", "What is 2 + 2?"),
        question("absent", "What is 2 + 3?"),
        question("long", " ".join(WORDS[:20])),
        question("empty", ""),
    ]
    documents = ["Someone asked: WHAT -- is\n2 + 2, then left.", "; ".join(WORDS[4:19]).upper()]
    assert overlapping(questions, documents) == {"short", "long"}
    assert overlapping(questions, documents, words=16) == {"short"}
    assert overlapping(questions, documents[:1]) == {"short"}
    assert overlapping([], documents) == set() == overlapping(questions, [])
