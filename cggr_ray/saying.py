"""How work that takes a while says what it is at: a line of text at a time. Standard library only."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]


def silent(text: str) -> None:
    """The `Say` of work that nobody listens to."""
