"""What a tuning tried, and where an arm's values lie in it: for the tuning, its plan and the report. Standard library.

An entry is a table of dotted recipe keys and values; all entries have the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Values = Mapping[str, Any]


def untuned(names: Sequence[str], arms: Mapping[str, Values], tried: Sequence[Values]) -> list[str]:
    """The recipes whose arm has none of the entries among its values."""
    return [name for name in names if not any(entry.items() <= arms.get(name, {}).items() for entry in tried)]


def at_the_edge(values: Values, tried: Sequence[Values]) -> dict[str, str]:
    """The keys whose value is the `smallest` or `largest` number tried, where several were."""
    found = {}
    for key, value in ((key, values[key]) for key in tried[0] if key in values):
        numbers = {entry[key] for entry in tried if _is_number(entry[key])}
        if _is_number(value) and len(numbers) > 1 and value in (min(numbers), max(numbers)):
            found[key] = "smallest" if value == min(numbers) else "largest"
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
