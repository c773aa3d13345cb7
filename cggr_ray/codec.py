"""Frozen dataclasses to plain mappings and back, strictly: TOML and JSON hold exactly what the dataclasses declare.

A union of dataclasses is a table with a `kind` key, the snake-case name of the class. An unknown key is an error that
names the nearest known one; so is a value of the wrong type, a missing required key, and an unknown kind.
TOML has no null: an optional part or number that is not there is the word `none`. JSON has no infinity: it is the word
`inf`, which TOML has as a number.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Self

NONE = "none"
INFINITE = ("inf", "-inf")


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a file, which may begin with a mark of the byte order, as some editors write it.

    Raises:
        ValueError: it is not TOML, or not UTF-8.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{error}; accepted: TOML in UTF-8") from None


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The object of a file, which has these keys.

    Raises:
        ValueError: it is not JSON, holds anything else, or lacks a key; with the file.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); accepted: one object") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a {type(value).__name__}; accepted: one object")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{path}: no {missing[0]!r}; accepted: an object with {', '.join(keys)}")
    return value


def kind_of(cls: type) -> str:
    """`SelectedTokens` -> `selected_tokens`, `AdamW` -> `adamw`, `GaLore` -> `galore`: the `kind` of a class."""
    fixed = getattr(cls, "KIND", None)
    return fixed or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()


def nearest(word: str, known: Iterable[str]) -> str:
    """The tail of an error message: what was probably meant, then all that is accepted."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}accepted: {', '.join(choices) or 'nothing'}"


def to_plain(value: Any) -> Any:
    """A dataclass (with its nested ones) as JSON-able data; None fields are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        tag = {"kind": kind_of(type(value))} if getattr(value, "IS_PART", False) else {}
        return tag | {name: v for name, v in fields.items() if v is not None}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def to_toml(plain: Any) -> Any:
    """Plain data as TOML can hold it: with the word that stands for nothing."""
    if isinstance(plain, list):
        return [to_toml(item) for item in plain]
    if isinstance(plain, Mapping):
        return {key: to_toml(item) for key, item in plain.items()}
    return NONE if plain is None else plain


def from_plain(annotation: Any, value: Any, where: str = "") -> Any:
    """The inverse of `to_plain` for a type annotation.

    Raises:
        ValueError: one line that names the place, the offending value and what is accepted.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _from_union(args, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where} = {value!r}; {nearest(str(value), map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} = {value!r}; accepted: a list")
        return tuple(from_plain(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} = {value!r}; accepted: a table")
        return {str(key): from_plain(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(annotation):
        return _from_table(typing.cast(type, annotation), value, where)
    return _scalar(annotation, value, where)


def with_values(instance: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a dataclass with dotted keys replaced: `{"tokens.keep": 0.5}`.

    A key that names a whole part takes a table with its `kind`, or the bare kind for a part with defaults.
    """
    plain = to_plain(instance)
    for key, value in values.items():
        *parents, last = key.split(".")
        table, current = plain, instance
        for depth, name in enumerate(parents):
            if not isinstance(table.get(name), dict):
                where = ".".join(parents[: depth + 1])
                if name not in table and name in _parts(current):
                    rest = key.removeprefix(f"{where}.")
                    raise ValueError(
                        f"{key!r} where {where!r} is none; accepted: the whole part, {where}={{{rest}=...}}"
                    )
                raise ValueError(f"{where!r} is not a table; {nearest(name, table)}")
            table, current = table[name], getattr(current, name, None)
        known = {f.name for f in dataclasses.fields(current)} if dataclasses.is_dataclass(current) else set(table)
        if last not in known:
            raise ValueError(f"unknown key {key!r}; {nearest(last, known)}")
        table[last] = value
        if isinstance(value, Mapping) or dataclasses.is_dataclass(getattr(current, last, None)):
            # A whole part: the keys after it are its own.
            instance = from_plain(type(instance), plain)
            plain = to_plain(instance)
    return from_plain(type(instance), plain)


def outside(values: Mapping[str, Any], parts: Iterable[str]) -> dict[str, Any]:
    """Of dotted keys with values, those that are not inside one of these parts, which are replaced whole."""
    whole = tuple(f"{part}." for part in parts)
    return {key: value for key, value in values.items() if not key.startswith(whole)}


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _parts(instance: Any) -> set[str]:
    """Names of the fields that hold one of several dataclasses, or none."""
    cls: Any = type(instance)
    hints = _hints(cls) if hasattr(cls, "__dataclass_fields__") else {}
    return {name for name, hint in hints.items() if any(map(dataclasses.is_dataclass, typing.get_args(hint)))}


def _from_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    optional = type(None) in choices
    if optional and (value is None or (value == NONE and str not in choices)):
        return None
    tables = {kind_of(c): c for c in choices if isinstance(c, type) and dataclasses.is_dataclass(c)}
    if not tables:
        scalars = [c for c in choices if c is not type(None)]
        errors = []
        for choice in scalars:
            try:
                return from_plain(choice, value, where)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError(errors[0])
    only = next(iter(tables.values())) if len(tables) == 1 else None
    if only is not None and not getattr(only, "IS_PART", False):
        return _from_table(only, value, where, optional)
    accepted = [*tables, NONE] if optional else list(tables)
    table = {"kind": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} = {value!r}; accepted: a table with kind = one of {', '.join(sorted(accepted))}")
    kind = table.get("kind", next(iter(tables)) if len(tables) == 1 else None)
    if not isinstance(kind, str) or kind not in tables:
        raise ValueError(f"{where}.kind = {kind!r}; {nearest(str(kind), accepted)}")
    return _from_table(tables[kind], table, where)


def _from_table(cls: type, value: Any, where: str, optional: bool = False) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where or cls.__name__} = {value!r}; accepted: a table{' or none' if optional else ''}")
    table = {key: item for key, item in value.items() if key != "kind" or not getattr(cls, "IS_PART", False)}
    if "kind" in value and getattr(cls, "IS_PART", False) and value["kind"] != kind_of(cls):
        raise ValueError(f"{where}.kind = {value['kind']!r}; accepted: {kind_of(cls)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in table:
        if key not in fields:
            raise ValueError(f"unknown key {prefix + key!r}; {nearest(key, fields)}")
    for name, f in fields.items():
        if name not in table and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"missing key {prefix + name!r} of {kind_of(cls)}")
    hints = _hints(cls)
    return cls(**{key: from_plain(hints[key], item, prefix + key) for key, item in table.items()})


def _scalar(annotation: Any, value: Any, where: str) -> Any:
    if annotation is Any:
        return value
    if annotation is float and (value in INFINITE or (isinstance(value, int) and not isinstance(value, bool))):
        return float(value)
    if not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
        raise ValueError(f"{where} = {value!r}; accepted: {annotation.__name__}")
    return value


class Plain:
    """A dataclass that is written to and read from TOML and JSON."""

    def to_plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Strict: an unknown key, kind or type is a ValueError that names the nearest known one."""
        instance: Self = from_plain(cls, plain)
        return instance
