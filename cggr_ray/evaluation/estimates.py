"""What samples say about a model, with how sure that is; and which questions a model may have seen before.

share = successes / n, with Wilson's interval (Wilson 1927)
pass@k of a question = 1 - C(n - c, k) / C(n, k), c of its n samples right: the chance that k of them, drawn without
putting back, hold a right one (arXiv:2107.03374, equation 1)
avg@n = mean over questions of c / n = m, with Wilson's interval of as many answers as vary alike, m (1 - m) / sem^2,
and Student's quantile: samples of one question are no new questions
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import comb, sqrt
from statistics import NormalDist, fmean, stdev

from scipy.special import stdtrit

from cggr_ray.evaluation.task import Question

LEVEL = 0.95
# As many samples of a question count as answers of their own, at most: few right ones do not show how questions differ.
ANSWERS = 4
WORD = re.compile(r"\w+")


def wilson(successes: float, n: float, z: float = NormalDist().inv_cdf((1 + LEVEL) / 2)) -> tuple[float, float]:
    """Both ends of the 95 % interval of the share successes / n, for n >= 1; `z` is a quantile of its error."""
    p = successes / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def share(name: str, successes: Sequence[bool]) -> dict[str, float]:
    """A share of independent trials and its interval, as measures; nothing of no trials."""
    if not successes:
        return {}
    low, high = wilson(sum(successes), len(successes))
    return {name: sum(successes) / len(successes), f"{name}_low": low, f"{name}_high": high}


def mean_share(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of one share a question and its interval over questions, as measures; nothing of no questions.

    A t interval is too narrow where few questions have a right sample: at a mean of 2.4 % one in five missed the truth.
    Equal values say no more than as many single answers would: then, and where all are 0 or 1, it is Wilson's of these.
    """
    if not values:
        return {}
    n, mean = len(values), fmean(values)
    if min(values) == max(values) or set(values) <= {0.0, 1.0}:
        low, high = wilson(mean * n, n)
    else:
        answers = min(mean * (1 - mean) * n / stdev(values) ** 2, ANSWERS * n)
        low, high = wilson(mean * answers, answers, float(stdtrit(n - 1, (1 + LEVEL) / 2)))
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def pass_at(k: int, n: int, correct: int) -> float:
    """The unbiased pass@k of a question with `correct` of n samples right.

    Raises:
        ValueError: k is not within 1 to n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} of pass@k; accepted: 1 to the {n} samples of a question")
    return 1 - comb(n - correct, k) / comb(n, k)


class Overlap:
    """Which questions share `words` words in a row with a document that was read; of a shorter question, all of it.

    Words are runs of letters and digits, in lower case, so punctuation and layout hide nothing.
    """

    def __init__(self, questions: Iterable[Question], words: int) -> None:
        self.found: set[str] = set()
        grams: list[tuple[tuple[str, ...], str]] = []
        for question in questions:
            own = _words(question.text or question.prompt)
            grams += ((gram, question.key) for gram in _grams(own, min(words, len(own))))
        # By their first words, as many as the shortest has: a document is walked through once.
        self._shortest = min((len(gram) for gram, _ in grams), default=0)
        self._starts: dict[tuple[str, ...], list[tuple[tuple[str, ...], str]]] = {}
        for gram, key in grams:
            self._starts.setdefault(gram[: self._shortest], []).append((gram, key))

    def read(self, document: str) -> None:
        words = _words(document)
        for at, start in enumerate(_grams(words, self._shortest)):
            for gram, key in self._starts.get(start, ()):
                if tuple(words[at : at + len(gram)]) == gram:
                    self.found.add(key)


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _grams(words: Sequence[str], length: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[first:] for first in range(length)), strict=False)
