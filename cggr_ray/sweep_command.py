"""cggr-ray sweep: searches a space, or takes a sweep up again, says what was best and writes it as a recipe."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cggr_ray.codec import read_json, to_plain
from cggr_ray.commands import (
    check,
    check_plan,
    check_recipes,
    claim,
    go_on,
    new_folder,
    prepare_data,
    refuse_changes,
    resumed,
    specify,
)
from cggr_ray.data_checks import check_tokens
from cggr_ray.environment import fingerprint
from cggr_ray.mirror import mirror_of
from cggr_ray.planning import absent
from cggr_ray.saying import counted
from cggr_ray.schema import DATA_FOLDER, SWEEP_FILE, VAL_LOSS
from cggr_ray.telemetry.console import RaceConsole, terminal

if TYPE_CHECKING:
    from trainables.history import History
    from trainables.settings import SweepSpec

# Draws that are tried on the recipe before anything starts.
TRIED = 20


def sweep(
    name: str | None,
    race_name: str | None,
    out: Path | None,
    changes: Mapping[str, Any],
    values: Mapping[str, Any],
    search: Mapping[str, Any],
    executor: str,
    address: str | None,
    growing: int | None,
    resume: Path | str | None,
    dry_run: bool,
) -> None:
    """Plans a sweep, or takes one up again, runs what is left of it and writes the best recipe."""
    # Its settings are read when Ray is first imported, which the schedulers do.
    import trainables  # noqa: F401

    if resume is not None:
        refuse_changes(name or race_name or changes or values or search)
        folder = resumed(resume, SWEEP_FILE, out)
        spec = read_sweep(folder)
        check_recipes(folder, parts_of(spec), SWEEP_FILE)
    else:
        spec = specify_sweep(name, race_name, changes, values, search)
        folder = out or new_folder(spec.race.name)
    if dry_run:
        check_plan(spec.race, executor)
    else:
        check(spec.race, executor, address, folder)
    check_sweep(spec, executor, folder)
    check_growing(growing, spec.race.device, address)
    if dry_run:
        show_sweep(spec)
        return
    mirror = mirror_of(spec.race, folder)
    mirror.check()
    if resume is None:
        begin_sweep(spec, folder)
    console = terminal()
    from trainables.history import History
    from trainables.sweep_driver import run_sweep

    with History(folder) as history, mirror:
        mirror.fetch_runs()
        prepare_data(spec.race, folder, console, mirror)
        check_tokens(spec.race, map(spec.race.recipe, spec.race.recipes), folder / DATA_FOLDER)
        with RaceConsole(spec.race.budget_seconds, console=console) as live:
            complete = run_sweep(spec, folder, history, executor, address, growing, live.show, mirror)
        finish_sweep(spec, history, folder, console, complete)


def specify_sweep(
    name: str | None,
    race_name: str | None,
    changes: Mapping[str, Any],
    values: Mapping[str, Any],
    search: Mapping[str, Any],
) -> SweepSpec:
    """The sweep of a space or a file, with the command line's changes."""
    from trainables.settings import Search, SweepSpec, load_parts

    if name is None:
        raise ValueError("no space; accepted: a search space, a sweep's .toml file, or --resume FOLDER")
    parts = load_parts(name)
    if race_name is not None and parts.race is not None:
        raise ValueError(f"--race {race_name!r} with a file that has a race; accepted: one of the two")
    refuse_searched(values, parts.domains)
    changes = {**changes, "recipes": [parts.recipe], "name": f"sweep-{Path(name).stem}", "evaluation": None}
    race = specify(parts.race or race_name, changes, values)
    settings = Search.from_plain({**parts.search, **search})
    plain = {"space": parts.space, "recipe": race.recipes[0], "domains": to_plain(parts.domains)}
    return SweepSpec.from_plain({**plain, "race": race.to_plain(), "search": settings.to_plain()})


def refuse_searched(values: Mapping[str, Any], domains: Iterable[str]) -> None:
    """Raises ValueError where a value is set that every draw sets again, with its part or by itself."""
    for key in values:
        dotted = key.rpartition(":")[2]
        for domain in domains:
            if dotted == domain or dotted.startswith(f"{domain}."):
                raise ValueError(f"--set {key} of a sweep that draws {domain}; accepted: keys that it does not draw, "
                                 "or a sweep's .toml file with domains of your own")  # fmt: skip


def read_sweep(folder: Path) -> SweepSpec:
    """The sweep of a folder."""
    from trainables.settings import SweepSpec

    if not (folder / SWEEP_FILE).is_file():
        raise ValueError(f"{str(folder)!r} holds no sweep; accepted: a folder with {SWEEP_FILE}")
    keys = ("space", "recipe", "domains", "search")
    record = read_json(folder / SWEEP_FILE, *keys, "spec")
    return SweepSpec.from_plain({key: record[key] for key in keys} | {"race": record["spec"]})


def begin_sweep(spec: SweepSpec, folder: Path) -> None:
    """Makes a new folder the sweep's own."""
    if (folder / SWEEP_FILE).is_file():
        raise ValueError(f"{str(folder)!r} holds a sweep; accepted: a new folder, or --resume {folder}")
    plain = spec.to_plain()
    record = {
        "name": spec.race.name,
        **{key: plain[key] for key in ("space", "recipe", "domains")},
        "spec": plain["race"],
        "search": plain["search"],
        "parts": parts_of(spec),
        "versions": fingerprint(),
        "command": shlex.join(["cggr-ray", *sys.argv[1:]]),
    }
    claim(folder, SWEEP_FILE, record)


def parts_of(spec: SweepSpec) -> dict[str, Any]:
    """The recipe that is searched around, as a record has it."""
    return {spec.recipe: spec.race.recipe(spec.recipe).to_plain()}


def check_sweep(spec: SweepSpec, executor: str, folder: Path) -> None:
    """Whether the scheduler fits the executor, and draws at random make trials of the race, of one worker each.

    Raises:
        ValueError: they do not; the draw is named.
    """
    from trainables.sweep import sweep_race, sweep_trial

    if spec.race.workers > 1:
        raise ValueError(f"workers = {spec.race.workers} in a sweep; accepted: workers = 1, and trials side by side")
    if spec.search.scheduler.parks and executor != "inprocess":
        raise ValueError(f"scheduler 'pbt' with executor {executor!r}; accepted: inprocess")
    if spec.search.scheduler.parks and spec.race.mirror is not None:
        raise ValueError(f"mirror {spec.race.mirror!r} with scheduler 'pbt', whose trials read each other's folders; "
                         "accepted: another scheduler, or a folder that all nodes have mounted")  # fmt: skip
    race, random = sweep_race(spec), np.random.default_rng(spec.search.seed)
    for _ in range(TRIED):
        values = {key: domain.sample(random) for key, domain in spec.domains.items()}
        try:
            sweep_trial(spec, race, values, "t", folder)
        except ValueError as error:
            raise ValueError(f"draw {json.dumps(values)}: {error}") from None


def check_growing(growing: int | None, device: str, address: str | None) -> None:
    """Whether there is a cluster that could grow, and for what."""
    if growing is None:
        return
    if growing < 1 or address is None or device != "cuda":
        raise ValueError(f"--growing {growing} with address {address!r}, device {device!r}; accepted: at least 1 trial "
                         "on the GPUs of a cluster, with --address and --device cuda")  # fmt: skip


def show_sweep(spec: SweepSpec) -> None:
    """The plan: how much there is to run, how it is searched, what, and what is not here yet."""
    console, search = terminal(), spec.search
    seconds = search.trials * spec.race.budget_seconds
    most = min(seconds, search.total_seconds or seconds)
    wall = f", {search.wall_seconds:g} s of the wall clock" if search.wall_seconds else ""
    said = f"{counted(search.trials, 'trial')} of {spec.recipe}, at most {most:g} train seconds{wall}"
    console.print(said, highlight=False, soft_wrap=True)
    for name in ("algorithm", "scheduler"):
        kind, *settings = to_plain(getattr(search, name)).items()
        said = ", ".join(f"{key} {value}" for key, value in settings)
        console.print(f"{name:12} {kind[1]}{said and f' ({said})'}", highlight=False, soft_wrap=True)
    for key, domain in spec.domains.items():
        console.print(f"  {key:36} {domain.in_words()}", highlight=False, soft_wrap=True)
    for what in absent(spec.race):
        console.print(f"not here: {what}", highlight=False, soft_wrap=True)


def finish_sweep(spec: SweepSpec, history: History, folder: Path, console: Console, complete: bool) -> None:
    """Prints how the trials ended and the best of them, and writes the best recipe; exit code 1 where the sweep is not
    complete or no trial finished."""
    from trainables.best import best_trials, write_best

    trials = list(history.trials.values())
    ends = [trial.status or "interrupted" for trial in trials]
    console.print(", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends)), highlight=False)
    best = best_trials(trials)
    table = Table("trial", "val/loss", "values", title="best trials")
    for trial in best:
        table.add_row(trial.trial_id, f"{(trial.end or {})[VAL_LOSS]:.4f}", json.dumps(trial.values))
    if best:
        console.print(table)
        recipe, race = write_best(spec, best[0], folder)
        console.print(f"best recipe: {recipe}", soft_wrap=True)
        again = shlex.join(["cggr-ray", "race", str(race), "--seeds", "1,2,3"])
        console.print(f"race it: {again}", soft_wrap=True, highlight=False)
    if not complete:
        console.print(go_on("sweep", folder), soft_wrap=True, highlight=False)
    if not complete or not best:
        sys.exit(1)
