"""Paths in a race or recipe file are relative to the file: made absolute before it is parsed.

What is of the wrong type is left as it is, for the codec to refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Tokenizers that are words, not paths.
WORDS = ("shipped", "train", "model")


def beside(folder: Path, table: Any, key: str) -> None:
    """Makes a path of `table` relative to `folder`."""
    if isinstance(table, dict) and isinstance(table.get(key), str) and table[key]:
        table[key] = str((folder / table[key]).resolve())


def recipe_beside(folder: Path, name: Any) -> Any:
    """A recipe's name; of a file, its path."""
    return str((folder / name).resolve()) if isinstance(name, str) and name.endswith(".toml") else name


def own_name(recipe: str) -> str:
    """The name of a shipped recipe, which is itself, or of a recipe's file without folder and ending."""
    return Path(recipe).stem if recipe.endswith(".toml") else recipe


def arm_name(recipe: str, recipes: Iterable[str]) -> str:
    """What a recipe of a race is called: its own name where no other has it, else as it stands there."""
    alone = [own_name(other) for other in recipes].count(own_name(recipe)) == 1
    return own_name(recipe) if alone else recipe


def arm_called(folder: Path, name: str, recipes: Sequence[str]) -> str:
    """Which of a race's recipes is meant by its name or path, or by its file's name alone; what is none, as a path.

    Raises:
        ValueError: files of several recipes have this name.
    """
    called = sorted({recipe for recipe in recipes if own_name(recipe) == name})
    if name in recipes or not called:
        return str(recipe_beside(folder, name))
    if len(called) > 1:
        raise ValueError(f"{name!r} is the name of {', '.join(called)}; accepted: the path of one")
    return called[0]


def references_beside(folder: Path, values: Any) -> None:
    """The reference models among a recipe's dotted values."""
    beside(folder, values, "tokens.reference")
    if isinstance(values, dict):
        beside(folder, values.get("tokens"), "reference")


def tasks_beside(folder: Path, evaluation: Any) -> None:
    """The files of an evaluation's tasks."""
    for task in _list(evaluation, "tasks"):
        beside(folder, task, "path")


def race_beside(folder: Path, race: dict[str, Any]) -> None:
    """Everything that a race file names: recipes, model, data, tokenizer, questions, reference models.

    Raises:
        ValueError: two tables of one arm, or a name of several.
    """
    race |= {key: [recipe_beside(folder, name) for name in race[key]] for key in ("recipes",) if _list(race, key)}
    recipes = [recipe for recipe in _list(race, "recipes") if isinstance(recipe, str)]
    for key in ("arms", "batches"):
        if isinstance(race.get(key), dict):
            race[key] = _by_arm(folder, key, race[key], recipes)
    beside(folder, race.get("model"), "folder")
    _if_there(folder, race.get("data"), "tokenizer")
    for source in _list(race.get("data"), "sources"):
        beside(folder, source, "path")
        _if_there(folder, source, "dataset")
    tasks_beside(folder, race.get("evaluation"))
    for values in recipe_values(race):
        references_beside(folder, values)


def recipe_values(race: dict[str, Any]) -> list[Any]:
    """The tables of dotted recipe keys in a race: everybody's, the arms' and those to be tried."""
    arms = race.get("arms")
    own = arms.values() if isinstance(arms, dict) else ()
    return [race.get("values"), *own, *_list(race.get("tuning"), "values")]


def _by_arm(folder: Path, key: str, tables: dict[str, Any], recipes: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, table in tables.items():
        arm = arm_called(folder, name, recipes)
        if arm in found:
            raise ValueError(f"{key}.{name} beside another table of {arm!r}; accepted: one table an arm")
        found[arm] = table
    return found


def _if_there(folder: Path, table: Any, key: str) -> None:
    """A path of what lies beside; else the name is one on the hub."""
    name = table.get(key) if isinstance(table, dict) else None
    if isinstance(name, str) and name not in WORDS and (folder / name).exists():
        table[key] = str((folder / name).resolve())


def _list(table: Any, key: str) -> list[Any]:
    found = table.get(key) if isinstance(table, dict) else None
    return found if isinstance(found, list) else []
