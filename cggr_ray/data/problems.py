"""Generated word problems with worked solutions and exact answers: the embedded default dataset.

Problem number `index` of stream `seed` is a pure function of the two, so the set has no end, no file and no order that
must be kept: a loader may jump to any index, and two streams with different seeds (training, held out) share nothing
but the templates. Every solution ends with the line "#### <answer>", spelled by `render_answer`:

    render_answer(x) = an integer, else a decimal of at most two places, else a fraction in lowest terms

A problem of level L takes at least L steps, and every step shows one computation of the form `expression = value`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count as count_from
from itertools import islice

from cggr_ray.data.problem_templates import TEMPLATES, Draw, Template, render_answer

__all__ = ["LEVELS", "TEMPLATES", "Problem", "problem", "problems", "render_answer"]

LEVELS = (1, 2, 3, 4, 5)
BY_LEVEL: dict[int, tuple[Template, ...]] = {
    level: tuple(template for template in TEMPLATES if level in template.levels) for level in LEVELS
}
SEED_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Problem:
    question: str
    solution: str
    answer: Fraction
    level: int
    template: str


def problem(seed: int, index: int, levels: Sequence[int] = LEVELS) -> Problem:
    """Problem `index` of stream `seed`, with its level drawn evenly from `levels`.

    The generator is seeded with (seed mod 2^64) * 2^64 + index: different pairs give different integers, and the
    Mersenne Twister's array initialisation mixes neighbours. Nothing depends on the hash seed of the process.
    """
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}")
    if not levels or any(level not in BY_LEVEL for level in levels):
        raise ValueError(f"levels must be some of {LEVELS}, got {tuple(levels)}")
    rng = Draw(((int(seed) & SEED_MASK) << 64) | int(index))
    level = rng.pick(levels)
    return generate(rng, rng.pick(BY_LEVEL[level]), level)


def generate(rng: Draw, template: Template, level: int) -> Problem:
    question, steps, answer = template.build(rng, level)
    exact = Fraction(answer)
    steps.append(f"#### {render_answer(exact)}")
    return Problem(question, "\n".join(steps), exact, level, template.name)


def problems(seed: int, count: int | None, levels: Sequence[int] = LEVELS, start: int = 0) -> Iterator[Problem]:
    """`count` problems from index `start` on; without end if `count` is None."""
    return (problem(seed, index, levels) for index in islice(count_from(start), count))
