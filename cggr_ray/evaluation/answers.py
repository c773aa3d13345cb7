r"""The answer in what a model wrote, and whether it is the right one: by math-verify, and by a second check of ours.

The answer of a text is, in this order: the last \boxed{...} with matching braces, what follows the first "####", what
stands after the last "answer is" or "answer:". What was thought between <think> and </think> is no answer, and neither
is anything longer than `LONGEST`.

The second check shares nothing with math-verify. It reads a number exactly (an integer, decimal, fraction, mixed number
or power of ten, with thousands separators, currency, a unit, a percent sign or "x =" around it) and compares fractions:

    equal(a, b) = a == b; rounded to six places where one is written with that many; 50% equals 50 and 0.5

What is no number is compared as text without spaces. All of it takes time linear in the text.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from cggr_ray.evaluation.grader import LONGEST, grader
from cggr_ray.evaluation.task import Verdict

# A number written with so many decimal places is taken for a rounded one.
ROUNDED_PLACES = 6

BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s{0,9}\{)|\\.|[{}]", re.DOTALL)
HASHES = re.compile(r"####(.*)")
STATED = re.compile(r"\banswer(?:\s{1,9}is\b|\s{0,9}[:=])[\s:*]{0,9}", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n|$")
# A number that a stated answer begins with, where it is one: not the 5 of "5x" or of "5 + 3 = 8".
LEADING = re.compile(r"-?\\?\$?-?[0-9][0-9,.]*(?:/[0-9]+)?\\?%?(?=\s+[A-Za-z(]|[,;:!?*)]|\s*$)")

TEXT = r"\\(?:text|textbf|mathrm|mathbf|mbox|textrm|rm|bf)\s?\{([^{}]*)\}"
REPLACED = (
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"[\s~\u00a0\u2009\u202f]+"), " "),
    (re.compile(r"\\(?:left|right|[!,;:()\[\]])|\\?\$|[€£°]|\^\{?\\circ\}?|(?<!\\)\*\*"), ""),
    (re.compile(r"\\[ ]|\\quad\b"), " "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\frac ?(?:\{ ?([+-]?[0-9.,]+) ?\}|([0-9])) ?(?:\{ ?([+-]?[0-9.,]+) ?\}|([0-9]))"), r" \1\2/\3\4"),
    (re.compile(r" ?(?:\\times|\\cdot|\*|×) ?10 ?\^ ?(?:\{ ?([+-]?[0-9]{1,2}) ?\}|([0-9]))"), r"e\1\2"),
    (re.compile(r"(?<![0-9.,])10 ?\^ ?(?:\{ ?([+-]?[0-9]{1,2}) ?\}|([0-9]))"), r"1e\1\2"),
)

INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
DECIMAL = rf"(?:{INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
NUMBER = re.compile(
    rf"(?P<sign>[+-]?) ?(?:(?P<whole>[0-9]+) +(?=[0-9]+ ?/))?(?P<over>{DECIMAL})"
    rf"(?: ?/ ?(?P<under>[+-]?{DECIMAL})|[eE](?P<power>[+-]?[0-9]{{1,2}}))?"
)
UNIT = re.compile(r"[A-Za-z]{2,20}(?: [A-Za-z]{2,20}){0,3}(?: ?\^\{?[23]\}?)?\.?")
NO_UNIT = re.compile(
    r"\b(?:or|and|pi|sqrt|hundred|thousand|million|billion|dozen|half|quarter|percent)\b", re.IGNORECASE
)
PERCENT = re.compile(r" ?(?:%|percent|pct)", re.IGNORECASE)
WRAPPED = re.compile(r"^\(([^(),]*)\)$")
# Left of the last "=", where what follows is not all that the answer says.
LIST_OR_INEQUALITY = re.compile(r"[,;]|[<>!] ?$")


class Number(NamedTuple):
    """A number as written: its value, its decimal places, and whether it is a percentage."""

    value: Fraction
    places: int
    percent: bool


def final_answer(text: str) -> str | None:
    """The answer that a text comes to, in any of the three forms, or None."""
    text = without_thinking(text)
    hashes = HASHES.search(text)
    for found in (last_boxed(text), hashes and hashes[1], stated(text)):
        if found and found.strip():
            return found.strip() if len(found.strip()) <= LONGEST else None
    return None


def without_thinking(text: str) -> str:
    """What follows the last </think>; nothing, if a <think> was never closed."""
    after = text.rpartition("</think>")[2]
    return after.partition("<think>")[0]


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} that is closed and not empty; of boxes in one another, the innermost."""
    opened: list[tuple[int, bool]] = []
    found: tuple[int, str] | None = None
    for brace in BRACES.finditer(text):
        if brace["box"] or brace[0] == "{":
            opened.append((brace.end(), bool(brace["box"])))
        elif brace[0] == "}" and opened:
            start, box = opened.pop()
            if box and (found is None or start > found[0]) and (content := text[start : brace.start()].strip()):
                found = (start, content)
    return found and found[1]


def stated(text: str) -> str | None:
    """What follows the last "answer is" or "answer:" up to the end of its sentence; a number alone, if it is one."""
    start = None
    for marker in STATED.finditer(text):
        start = marker.end()
    if start is None:
        return None
    end = SENTENCE_END.search(text, start)
    rest = text[start : end.start()] if end else text[start:]
    leading = LEADING.match(rest)
    return (leading[0] if leading else rest).strip(" *.,;:") or None


def number(text: str) -> Number | None:
    """The number that an answer is, or None if it is none, or not that alone."""
    if len(text) > LONGEST:
        return None
    left, equals, text = _simple(re.sub(TEXT, r" \1 ", text)).rpartition("=")
    text = WRAPPED.sub(r"\1", text.strip(" {}"))
    match = NUMBER.match(text)
    if match is None or (equals and LIST_OR_INEQUALITY.search(left)):
        return None
    rest, percent = text[match.end() :].strip(), False
    if sign := PERCENT.match(rest):
        rest, percent = rest[sign.end() :], True
    if rest and (not UNIT.fullmatch(rest.lstrip()) or NO_UNIT.search(rest)):
        return None
    value = _value(match)
    return None if value is None else Number(value, _places(match["over"]) if not match["under"] else 0, percent)


def same(gold: str, answer: str) -> bool:
    """The second check: whether two answers are equal as numbers, or, if neither is one, as text without spaces."""
    right, given = number(gold), number(answer)
    if right is None or given is None:
        return right is given and _squeezed(gold) == _squeezed(answer) != ""
    places = max(right.places, given.places)
    if right.percent == given.percent:
        return _close(right.value, given.value, places)
    share, other = (right.value, given.value) if right.percent else (given.value, right.value)
    return _close(share, other, places) or _close(share / 100, other, places)


def judged(gold: str, answer: str | None) -> Verdict:
    """Both checks of an answer; none is wrong."""
    if answer is None:
        return Verdict(None, False, False)
    return Verdict(answer, grader().equal(gold, answer), same(gold, answer))


def _simple(text: str) -> str:
    for pattern, by in REPLACED:
        text = pattern.sub(by, text)
    return text.strip(" *").rstrip(" .,;:")


def _squeezed(text: str) -> str:
    """At most `LONGEST` characters, in lower case, without spaces and the markup of text."""
    return re.sub(r"\s", "", _simple(re.sub(TEXT, r"\1", text[:LONGEST]))).lower()


def _value(match: re.Match[str]) -> Fraction | None:
    over, under = _exact(match["over"]), _exact(match["under"] or "1")
    if under == 0:
        return None
    value = over / under * Fraction(10) ** int(match["power"] or 0) + int(match["whole"] or 0)
    return -value if match["sign"] == "-" else value


def _exact(decimal: str) -> Fraction:
    return Fraction(re.sub("[ ,]", "", decimal))


def _places(decimal: str) -> int:
    return len(decimal.partition(".")[2])


def _close(a: Fraction, b: Fraction, places: int) -> bool:
    return a == b or (places >= ROUNDED_PLACES and round(a, ROUNDED_PLACES) == round(b, ROUNDED_PLACES))
