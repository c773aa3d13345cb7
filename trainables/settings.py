"""What a sweep is: a space around a recipe, the race whose model, data and budget its trials share, and the search.

A file holds `space` (a shipped one by name) or `recipe` and `domains`, a table `search`, and `race`: a table as in a
race's file, or the name of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cggr_ray.codec import Plain, from_plain, nearest, read_toml, to_plain
from cggr_ray.race import RaceSpec, load_race, race_of
from cggr_ray.seeds import check_seed
from search_spaces import SPACES
from search_spaces.domains import Domain, Domains
from trainables.algorithms import Grid, Random, Tpe, TpeMemory
from trainables.population import Population
from trainables.schedulers import Asha, HyperBand, Unstopped

KEYS = ("space", "recipe", "domains", "search", "race")


@dataclass(frozen=True)
class Search(Plain):
    """How a space is searched.

    `total_seconds`: train seconds of all trials together; `wall_seconds`: of the sweep, its interruptions left out.
    Once one is used up no trial begins, and those that run are cut at their next report. `gpus_per_trial` below 1 lets
    trials share a GPU: their speeds, and so their losses after so many seconds, are not comparable with others.
    """

    trials: int = 16
    seed: int = 0
    algorithm: Random | Grid | Tpe | TpeMemory = field(default_factory=Random)
    scheduler: Unstopped | Asha | HyperBand | Population = field(default_factory=Asha)
    total_seconds: float | None = None
    wall_seconds: float | None = None
    gpus_per_trial: float = 1.0

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"trials = {self.trials}; accepted: at least 1")
        check_seed("seed", self.seed)
        for name in ("total_seconds", "wall_seconds"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name} = {seconds}; accepted: a positive number of seconds")
        if not 0 < self.gpus_per_trial <= 1:
            raise ValueError(f"gpus_per_trial = {self.gpus_per_trial}; accepted: a part of a GPU in (0, 1]")


@dataclass(frozen=True)
class SweepSpec(Plain):
    """All that is known of a sweep before it begins. `space` is a name for people; `domains` is what is searched."""

    space: str
    recipe: str
    domains: dict[str, Domain]
    race: RaceSpec
    search: Search

    def __post_init__(self) -> None:
        if not self.domains:
            raise ValueError("domains = {}; accepted: at least one dotted recipe key with a domain")


@dataclass(frozen=True)
class Parts:
    """What a file says of a sweep, before the command line has its say. `race` is None where it says nothing."""

    space: str
    recipe: str
    domains: Domains
    search: dict[str, Any]
    race: RaceSpec | None


def load_parts(name: str) -> Parts:
    """A shipped space by name, or a sweep from a TOML file.

    Raises:
        ValueError: no such space or file, or a file that does not parse; with what is accepted.
    """
    if not name.endswith(".toml"):
        return Parts(name, *_shipped(name), {}, None)
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{name!r} does not exist; accepted: a sweep's .toml file, or {', '.join(sorted(SPACES))}")
    try:
        return _parts(read_toml(path), path)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _parts(table: dict[str, Any], path: Path) -> Parts:
    for key in table:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}; {nearest(key, KEYS)}")
    if ("space" in table) == ("domains" in table):
        raise ValueError(f"keys {', '.join(table)}; accepted: space, or domains, and not both")
    if "space" in table:
        recipe, domains = _shipped(str(table["space"]))
        recipe = str(table.get("recipe", recipe))
    else:
        recipe = str(table.get("recipe", "baseline"))
        domains = from_plain(dict[str, Domain], table["domains"], "domains")
    if recipe.endswith(".toml"):
        recipe = str((path.parent / recipe).resolve())
    race = table.get("race")
    if isinstance(race, str):
        race = load_race(str(path.parent / race) if race.endswith(".toml") else race)
    elif race is not None:
        race = race_of(race, path.parent, path.stem)
    search = from_plain(Search, table.get("search", {}), "search")
    return Parts(str(table.get("space", path.stem)), recipe, domains, to_plain(search), race)


def _shipped(name: str) -> tuple[str, Domains]:
    if name not in SPACES:
        raise ValueError(f"search space {name!r}; {nearest(name, SPACES)}")
    return SPACES[name].recipe, SPACES[name].domains()
