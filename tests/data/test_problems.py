"""Every generated problem must be right, checked by means that share nothing with the templates.

Three oracles: each `expression = value` of a solution is parsed and evaluated with Fractions; the answers of many
templates are found again from the question text by search or simulation; the text is held to a few rules of grammar.
"""

import ast
import operator
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from fractions import Fraction
from itertools import combinations, count, islice, permutations, product

import pytest

from cggr_ray.data.problem_templates import Draw, Template
from cggr_ray.data.problem_templates.words import PLURALS
from cggr_ray.data.problems import LEVELS, TEMPLATES, Problem, generate, problem, problems, render_answer

CASES = [(template, level) for template in TEMPLATES for level in template.levels]
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
STATEMENT = re.compile(r"([0-9(][0-9.()+*/ -]*) = (\d+(?:\.\d+)?(?:/\d+)?)")


def value(expression: str) -> Fraction:
    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        assert isinstance(node, ast.Constant), expression
        return Fraction(str(node.value))

    return walk(ast.parse(expression, mode="eval").body)


def sample(template: Template, level: int, size: int) -> Iterator[Problem]:
    return (generate(Draw(1000 * seed + level), template, level) for seed in range(size))


def ints(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def found(pattern: str, text: str) -> list[str]:
    match = re.search(pattern, text)
    assert match, (pattern, text)
    return list(match.groups())


@pytest.mark.parametrize(("template", "level"), CASES, ids=lambda case: getattr(case, "name", case))
def test_every_step_is_right(template: Template, level: int) -> None:
    for item in sample(template, level, 40):
        *steps, last = item.solution.split("\n")
        assert level <= len(steps) <= 8, item
        values = []
        for step in steps:
            statements = STATEMENT.findall(step)
            assert statements and len(statements) == step.count("="), step
            assert all(value(left) == Fraction(right) for left, right in statements), step
            values.append(Fraction(statements[-1][1]))
        assert values[-1] == item.answer, item
        assert min(values) >= 0, item
        assert last == f"#### {render_answer(item.answer)}"
        assert Fraction(last[5:]) == item.answer


@pytest.mark.parametrize(("template", "level"), CASES, ids=lambda case: getattr(case, "name", case))
def test_text_is_well_formed(template: Template, level: int) -> None:
    wrong = re.compile(
        r"  |\.\.| [.,]|[{}]|\bNone\b|-\d|\ba [aeio]|\ban (?!umbrella)[^aeioh]"
        r"|(?<![\d.,/$-])\b1 (?:" + "|".join(set(PLURALS.values()) - {"sheep"}) + r")\b"
    )
    for item in sample(template, level, 40):
        *steps, _ = item.solution.split("\n")
        assert item.question.endswith("?") and "#" not in item.question
        assert all(step.endswith(".") and step[0] == step[0].upper() for step in steps), steps
        match = wrong.search(item.question) or wrong.search("\n".join(steps))
        assert not match, (match, item)
        assert 8 <= len(item.question.split()) <= 95, item.question


def test_access_is_random_and_pure() -> None:
    stream = list(problems(7, 300))
    assert [problem(7, index) for index in reversed(range(300))] == stream[::-1]
    assert list(problems(7, 50, start=200)) == stream[200:250]
    assert list(islice(problems(7, None, start=10**15), 2)) == [problem(7, 10**15), problem(7, 10**15 + 1)]
    assert problem(-1, 0) != problem(1, 0)
    assert {item.level for item in problems(3, 60, levels=(2, 4))} == {2, 4}


def test_hash_seed_is_irrelevant() -> None:
    code = (
        "import hashlib; from cggr_ray.data.problems import problems;"
        "print(hashlib.sha256(repr(list(problems(5, 400))).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_every_template_is_reached_at_every_level() -> None:
    reached = {(item.template, item.level) for item in problems(0, 8000)}
    assert reached == {(template.name, level) for template, level in CASES}
    assert len({template.name for template in TEMPLATES}) == len(TEMPLATES) >= 24
    assert all(sum(level in template.levels for template in TEMPLATES) >= 12 for level in LEVELS)


def test_questions_rarely_repeat() -> None:
    questions = [item.question for item in problems(11, 20000)]
    assert len(set(questions)) > 0.99 * len(questions)


def test_streams_differ() -> None:
    first, second = ({item.question for item in problems(seed, 3000)} for seed in (1, 2))
    assert len(first & second) < 10


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("12", "12"),
        ("3/4", "0.75"),
        ("25/2", "12.5"),
        ("1/20", "0.05"),
        ("2/3", "2/3"),
        ("1/8", "1/8"),
        ("-1/2", "-0.5"),
    ],
)
def test_render_answer(number: str, text: str) -> None:
    assert render_answer(Fraction(number)) == text


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        problem(0, -1)
    for levels in ((), (0,), (1, 6)):
        with pytest.raises(ValueError, match="levels"):
            problem(0, 0, levels)


def shopping(question: str, level: int) -> int:
    cost = sum(int(n) * int(each) for n, each in re.findall(r"(\d+) [a-z]+ at \$(\d+) each", question))
    amounts = ints(question.rpartition(" each")[2])
    if level == 2:
        return cost
    return amounts[-1] - cost + (amounts[0] if level == 5 else 0)


def ticket_sales(question: str, level: int) -> int:
    dear, cheap = sorted(map(int, re.findall(r"\$(\d+)", question)))[1::-1]
    income = max(map(int, re.findall(r"\$(\d+)", question)))
    total = int(found(r"(?:The|of|from) (\d+) (?:tickets|people)", question)[0])
    (adults,) = [n for n in range(total + 1) if n * dear + (total - n) * cheap == income]
    return (adults, total - adults, abs(adults * dear - (total - adults) * cheap))[level - 3]


def ages(question: str, level: int) -> int:
    numbers = ints(question.replace("twice", "2 times"))
    if level <= 2:
        factor = 2 if "twice" in question else int(found(r"(\d) times", question)[0])
        age, years = int(found(r"(?:is|turned) (\d+)(?: years old, and| this)", question)[0]), numbers[-1]
        return age * factor + years if level == 1 else age * (factor + 1) + 2 * years
    total, factor, *more, years = numbers
    (age,) = [n for n in range(total) if n + factor * n + sum(n + gap for gap in more) == total]
    return age + years


def remainders(question: str, level: int) -> int:
    if "Sorted" in question:
        a, b, rest = map(int, found(r"Sorted by (\d+) or sorted by (\d+).* remainder of (\d+)", question))
    else:
        a, rest, b = map(int, found(r"groups of (\d+), (\d+) (?:is|are) left over. In groups of (\d+)", question))
    bound = int(found(r"(?:more than|above) (\d+)", question)[0])
    smallest = next(n for n in count(bound + 1) if n % a == n % b == rest)
    return smallest % int(found(r"left over in groups of (\d+)\?", question)[0]) if level == 4 else smallest


def cycles(question: str, level: int) -> int:
    periods = [int(minutes) for minutes in re.findall(r"every (\d+) minutes", question)]
    word = found(r"for the (\w+) time, noon", question)[0] if level == 4 else "1th"
    wanted = {"second": 2, "third": 3}.get(word) or int(word[:-2])
    meetings = (minute for minute in count(1) if not any(minute % period for period in periods))
    return next(islice(meetings, wanted - 1, None))


def digits(question: str, level: int) -> int:
    numbers = ints(question)
    total, gap = numbers[:2]
    (number,) = [n for n in range(10, 100) if n // 10 + n % 10 == total and n // 10 - n % 10 == gap]
    if level < 4:
        return number * (numbers[2] if level == 3 else 1)
    return (number - int(f"{number:02d}"[::-1])) * numbers[2] + numbers[3]


def calendar(question: str, level: int) -> int:
    ends = re.findall(
        r"(January|February|March|April|May|June|July|August|September|October|November|December) (\d+)", question
    )
    names = [date(2023, month, 1).strftime("%B") for month in range(1, 13)]
    first, last = (date(2023, names.index(month) + 1, int(day)) for month, day in ends)
    days = (last - first).days + 1
    if level == 5:
        days -= int(found(r"misses (\d+) of", question)[0])
    return days * (1 if level == 2 else int(found(r"(?:reads|learns|solves|draws|runs) (\d+)", question)[0]))


def committees(question: str, level: int) -> int:
    people = range(ints(question)[0] - (level == 4))
    return len(list(combinations(people, 2 if level <= 2 else 3)))


def codes(question: str, level: int) -> int:
    size, length = (
        int(found(pattern, question)[0])
        for pattern in (r"(\d+) (?:digits|letters|symbols|colored|runes)", r"(\d+) places")
    )
    every = product(range(size), repeat=length) if "again" in question else permutations(range(size), length)
    left = sum(1 for _ in every) - (int(found(r"tried (\d+)", question)[0]) if "tried" in question else 0)
    return left * (1 if level == 1 else int(found(r"takes (\d+) seconds", question)[0]))


def pattern(question: str, level: int) -> int:
    total, *counts = ints(question)
    *colors, wanted = re.findall(r"\d ([a-z]+) [a-z]+(?=[,. ])|How many ([a-z]+)", question.split(": ")[1])
    names = [color for color, _ in colors]
    row = [name for name, n in zip(names, counts, strict=True) for _ in range(n)]
    return [row[place % len(row)] for place in range(total)].count(wanted[1])


def probability(question: str, level: int) -> Fraction:
    bag = [color for n, color in re.findall(r"(\d+) ([a-z]+) [a-z]+", question) for _ in range(int(n))]
    asked = question.rpartition("probability that ")[2]
    if level <= 2:
        wanted = asked.rstrip("?").split()[-1]
        return Fraction(sum((color == wanted) == (level == 1) for color in bag), len(bag))
    pairs = list(combinations(bag, 2))
    if level == 3:
        good = [pair for pair in pairs if set(pair) == {asked[:-1].split()[-1]}]
    elif level == 4:
        good = [pair for pair in pairs if set(pair) == set(found(r"one is (\w+) and the other is (\w+)", asked))]
    else:
        good = [pair for pair in pairs if pair[0] == pair[1]]
    return Fraction(len(good), len(pairs))


def garden_path(question: str, level: int) -> int:
    if "path of" in question:
        path, long, wide = map(int, found(r"path of (\d+) meters? in width.* of (\d+) by (\d+) meters", question))
    else:
        long, wide, path = map(int, found(r"is (\d+) meters long and (\d+) meters wide.* path (\d+) meter", question))
    squares = sum(
        not (0 <= x < long and 0 <= y < wide) for x in range(-path, long + path) for y in range(-path, wide + path)
    )
    if level == 3:
        return squares
    stones = squares * int(found(r"takes (\d+) stones", question)[0])
    return stones - (int(found(r"(\d+) stones are already", question)[0]) if level == 5 else 0)


def heads_and_legs(question: str, level: int) -> int:
    count_all, total = (
        int(found(r"There are (\d+) of them", question)[0]),
        int(found(r"(\d+) (?:leg|wheel)s", question)[0]),
    )
    (fours,) = [n for n in range(count_all + 1) if 4 * n + 2 * (count_all - n) == total]
    return fours if level == 3 else count_all - fours


def compound_interest(question: str, level: int) -> Fraction:
    principal, rate = (Fraction(found(mark, question)[0]) for mark in (r"\$(\d+)", r"(\d+)%"))
    end = principal * (1 + rate / 100) ** int(found(r"(?:after|in) (\d) years", question)[0])
    return end if level == 2 else end - principal


RECOUNTS: tuple[Callable[[str, int], int | Fraction], ...] = (
    shopping,
    ticket_sales,
    ages,
    remainders,
    cycles,
    digits,
    calendar,
    committees,
    codes,
    pattern,
    probability,
    garden_path,
    heads_and_legs,
    compound_interest,
)


@pytest.mark.parametrize("recount", RECOUNTS, ids=lambda recount: recount.__name__)
def test_answer_is_found_again_from_the_question(recount: Callable[[str, int], int | Fraction]) -> None:
    (template,) = [template for template in TEMPLATES if template.name == recount.__name__]
    for level in template.levels:
        for item in sample(template, level, 25):
            assert recount(item.question, level) == item.answer, item
