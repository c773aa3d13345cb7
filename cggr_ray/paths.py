"""Paths in a race or recipe file are relative to the file: made absolute before it is parsed.

What is of the wrong type is left as it is, for the codec to refuse.
"""

from __future__ import annotations

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


def arm_name(recipe: str) -> str:
    """What a recipe of a race is called: its name, or its file's without folder and ending."""
    return Path(recipe).stem if recipe.endswith(".toml") else recipe


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
    """Everything that a race file names: recipes, model, data, tokenizer, questions, reference models."""
    race |= {key: [recipe_beside(folder, name) for name in race[key]] for key in ("recipes",) if _list(race, key)}
    # An arm may be called by its file, as in `recipes`, or by its name, as in tables and reports.
    called = {arm_name(recipe): recipe for recipe in _list(race, "recipes") if isinstance(recipe, str)}
    for key in ("arms", "batches"):
        if isinstance(race.get(key), dict):
            race[key] = {called.get(name) or recipe_beside(folder, name): value for name, value in race[key].items()}
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


def _if_there(folder: Path, table: Any, key: str) -> None:
    """A path of what lies beside; else the name is one on the hub."""
    name = table.get(key) if isinstance(table, dict) else None
    if isinstance(name, str) and name not in WORDS and (folder / name).exists():
        table[key] = str((folder / name).resolve())


def _list(table: Any, key: str) -> list[Any]:
    found = table.get(key) if isinstance(table, dict) else None
    return found if isinstance(found, list) else []
