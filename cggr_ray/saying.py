"""How work that takes a while says what it is at: a line of text at a time; numbers in words. Standard library only."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]


def counted(number: int, noun: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def silent(text: str) -> None:
    """The `Say` of work that nobody listens to."""
