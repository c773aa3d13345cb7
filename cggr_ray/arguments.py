"""What options of the command line say: lists with commas, key=value, tables of TOML. Standard library only."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def words(option: str, text: str | None) -> list[str] | None:
    """`a,b` of an option as a list."""
    return _listed(option, text, _name, "names")


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError
    return text.strip()


def integers(option: str, text: str | None) -> list[int] | None:
    """`0,1,2` as integers."""
    return _listed(option, text, int, "whole numbers")


def numbers(option: str, text: str | None) -> list[float] | None:
    """`0.25,0.5` as numbers."""
    return _listed(option, text, float, "numbers")


def _listed(option: str, text: str | None, kind: Callable[[str], T], words: str) -> list[T] | None:
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}; accepted: {words} with commas between") from None


def assignments(sets: Sequence[str]) -> dict[str, Any]:
    """`key=value` strings; the value as in TOML, or a bare word."""
    values: dict[str, Any] = {}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r}; accepted: key=value")
        if key in values:
            raise ValueError(f"--set {text!r} after another value of {key!r}; accepted: a key once")
        try:
            values[key] = toml_value(value)
        except tomllib.TOMLDecodeError:
            values[key] = value
    return values


def tables(option: str, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Inline tables of TOML, one an option."""
    found = []
    for text in texts:
        try:
            found.append(toml_value(text))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{option} {text!r}: {error}; accepted: {{'recipe.key' = value}}") from None
        if not isinstance(found[-1], dict):
            raise ValueError(f"{option} {text!r}; accepted: {{'recipe.key' = value}}")
    return found


def toml_value(text: str) -> Any:
    """Raises tomllib.TOMLDecodeError where a text is no value of TOML."""
    return tomllib.loads(f"value = {text}")["value"]
