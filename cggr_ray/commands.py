"""What the commands do: read specifications, refuse mistakes, prepare data, hand over to Ray, report."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from cggr_ray.calibrated import check_calibration
from cggr_ray.codec import nearest, read_json, to_plain
from cggr_ray.data.dataset import AnySource, is_prepared, prepare
from cggr_ray.data.sources import DATA_PRESETS
from cggr_ray.data_checks import check_tokens
from cggr_ray.description import check_kind
from cggr_ray.device import pick_device
from cggr_ray.environment import fingerprint
from cggr_ray.files import aside_of, write_whole
from cggr_ray.lock import only_writer
from cggr_ray.mirror import Unmirrored, fetch_race, mirror_of
from cggr_ray.paths import arm_called, race_beside, recipe_beside
from cggr_ray.planning import check_present, show_plan
from cggr_ray.race import RaceSpec, Trial, load_race, plan_trials
from cggr_ray.recipe import Recipe, load_recipe, of_recipe
from cggr_ray.remote import is_address
from cggr_ray.schema import DATA_FOLDER, OVERLAP_FILE, RACE_FILE, RUN_FILE, RUNS_FOLDER, SUMMARY_FILE
from cggr_ray.telemetry.console import RaceConsole, terminal

EXECUTORS = ("train", "inprocess")


def race(
    name: str | None,
    out: Path | None,
    changes: Mapping[str, Any],
    values: Mapping[str, Any],
    executor: str,
    address: str | None,
    resume: Path | str | None,
    most: int | None,
    dry_run: bool,
) -> None:
    """Plans a race, or takes one up again, runs what is left of it and writes the report."""
    if most is not None and most < 1:
        raise ValueError(f"--trials {most}; accepted: 1 or more")
    if resume is not None:
        refuse_changes(name or changes or values)
        folder = resumed(resume, RACE_FILE, out)
        spec = read_spec(folder)
    else:
        spec = specify(name, changes, values)
        folder = out or new_folder(spec.name)
    trials = plan_trials(spec, folder)
    if dry_run:
        check_plan(spec, executor)
        show_plan(spec, trials)
        return
    check(spec, executor, address, folder)
    if resume is None:
        # What has begun goes on anywhere.
        check_calibration(spec, pick_device(spec.device) if address is None else None)
    mirror = mirror_of(spec, folder)
    mirror.check()
    begin(folder, spec, trials)
    console = terminal()
    with mirror:
        failed = run_left(with_kept_questions(trials, folder), folder, executor, address, most, console, mirror)
        finish(folder, failed, console)


def refuse_changes(changes: object) -> None:
    """Raises ValueError where settings are given to what goes on."""
    if changes:
        raise ValueError("--resume with other settings; accepted: --resume alone, a race keeps what it began with")


def resumed(resume: Path | str, file: str, out: Path | None) -> Path:
    """The folder to go on in, which has the record `file`: the given one, or where an address was fetched to.

    Raises:
        ValueError: `out` beside a folder, or nothing to go on with at the address.
    """
    if is_address(str(resume)):
        return fetch_race(str(resume), file, out)
    refuse_changes(out)
    return Path(resume)


def go_on(command: str, folder: Path) -> str:
    """What to type, to take up again what is in a folder."""
    return f"go on with: {shlex.join(['cggr-ray', command, '--resume', str(folder)])}"


def new_folder(name: str) -> Path:
    return Path("outputs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def run_left(
    trials: Sequence[Trial],
    folder: Path,
    executor: str,
    address: str | None,
    most: int | None,
    console: Console,
    mirror: Unmirrored,
) -> list[str]:
    """Prepares the data and runs the trials that have no summary, `most` at most; the ids of those that did not end.

    Raises:
        InUseError: another process runs trials of this folder; on one device, both would be timed wrongly.
    """
    with only_writer(folder):
        spec = trials[0].race
        mirror.fetch_runs()
        left = without_summary(trials)[:most]
        prepare_data(spec, folder, console, mirror)
        check_tokens(spec, [trial.recipe for trial in trials], folder / DATA_FOLDER)
        if spec.evaluation is not None and not (folder / OVERLAP_FILE).is_file():
            console.print("looking for the tasks' questions in the training documents", style="dim")
            write_whole(folder / OVERLAP_FILE, json.dumps(spec.evaluation.overlaps(spec.data.sources), indent=1))
        if address is None and default_race(spec.device) == "cpu":
            console.print("on the CPU: float32, eager, nothing is compiled", style="dim")
        if not left:
            return []
        from trainables.driver import run_trials

        with RaceConsole(spec.budget_seconds, [trial.trial_id for trial in left], console) as live:
            failed = run_trials(left, folder, executor, address, live.show)
        # Those of other machines have theirs in the mirror.
        mirror.fetch_runs()
        ended = {trial.trial_id for trial in trials} - {trial.trial_id for trial in without_summary(trials)}
        return [trial_id for trial_id in failed if trial_id not in ended]


def without_summary(trials: Sequence[Trial]) -> list[Trial]:
    """Those that have not ended."""
    return [trial for trial in trials if not (Path(trial.folder) / SUMMARY_FILE).is_file()]


def prepare_data(spec: RaceSpec, folder: Path, console: Console, mirror: Unmirrored) -> None:
    """Prepares the data of a race in its folder, or fetches them, and sees to it that its mirror has them."""
    mirror.fetch_data(spec.data)
    prepare(spec.data, folder / DATA_FOLDER, lambda text: console.print(text, style="dim"))
    mirror.send_data()


def check(spec: RaceSpec, executor: str, address: str | None, folder: Path) -> None:
    """Before anything starts: the executor, the data's files, whether the recipes fit the model and the micro-batches
    and, on a local machine, the device that is asked for, else whether the cluster answers. What `folder` keeps is not
    asked for: it may have been moved to a machine that has none of the files it was made from. Its runs go on where
    there is a device of their kind."""
    check_executor(executor, spec)
    if not is_prepared(spec.data, folder / DATA_FOLDER):
        spec.data.check()
    spec.check()
    if spec.evaluation is not None:
        spec.evaluation.kept_in(folder).check()
    if address is not None:
        from trainables.cluster import check_reached

        check_reached(address)
    else:
        device = pick_device(spec.device)
        for name in spec.recipes:
            spec.recipe(name).execution.check_device(device.type)
        for run in sorted(folder.glob(f"{RUNS_FOLDER}/*/{RUN_FILE}")):
            check_kind(run, device)


def check_plan(spec: RaceSpec, executor: str) -> None:
    """The same for `--dry-run`, but for what is not here yet: the plan names it."""
    check_executor(executor, spec)
    check_present(spec)


def check_executor(executor: str, spec: RaceSpec) -> None:
    if executor not in EXECUTORS:
        raise ValueError(f"executor {executor!r}; {nearest(executor, EXECUTORS)}")
    if executor == "inprocess" and spec.workers > 1:
        raise ValueError(
            f"executor 'inprocess' with workers = {spec.workers}; accepted: executor train, or workers = 1"
        )


def finish(folder: Path, failed: Sequence[str], console: Console) -> None:
    """Prints the table and the report's path; exit code 1 where a trial did not end."""
    from analysis import read_race, summary_table, write_report

    path = write_report(folder)
    console.print(summary_table(read_race(folder)), highlight=False, soft_wrap=True)
    console.print(f"\nreport: {path.resolve()}", soft_wrap=True)
    if failed:
        console.print(f"did not finish: {', '.join(failed)}; {go_on('race', folder)}", soft_wrap=True)
        sys.exit(1)


def specify(race: RaceSpec | str | None, changes: Mapping[str, Any], values: Mapping[str, Any]) -> RaceSpec:
    """A race, or that of a name or file, with the command line's changes; the default depends on the device."""
    named = default_race(str(changes.get("device", "auto"))) if race is None else race
    spec = load_race(named) if isinstance(named, str) else named
    plain = spec.to_plain() | {key: value for key, value in changes.items() if key != "data"}
    if "data" in changes:
        plain["data"]["sources"] = to_plain(data_preset(str(changes["data"])))
    plain["recipes"] = [recipe_beside(Path.cwd(), name) for name in plain["recipes"]]
    plain["arms"] = {arm: dict(v) for arm, v in spec.arms.items() if arm in plain["recipes"]}
    plain["batches"] = {arm: v for arm, v in plain["batches"].items() if arm in plain["recipes"]}
    plain["values"] = dict(spec.values)
    for key, value in values.items():
        arm, colon, dotted = key.rpartition(":")
        table = plain["values"]
        if colon:
            table = plain["arms"].setdefault(arm_called(Path.cwd(), arm, plain["recipes"]), {})
        table[dotted] = value
    race_beside(Path.cwd(), plain)
    changed = RaceSpec.from_plain(plain)
    if "wandb_project" in changes and changed.wandb == "off":
        raise ValueError(f"--wandb-project {changed.wandb_project!r} with wandb = 'off'; "
                         "accepted: with --wandb offline or online, or wandb in the race's file")  # fmt: skip
    for recipe in changed.recipes:
        load_recipe(recipe)
        with of_recipe(recipe):
            changed.recipe(recipe)
    return changed


def data_preset(name: str) -> tuple[AnySource, ...]:
    """Sources by a short name."""
    if name not in DATA_PRESETS:
        raise ValueError(f"data {name!r}; {nearest(name, DATA_PRESETS)}")
    return DATA_PRESETS[name]


def default_race(device: str) -> str:
    return "gpu" if device != "cpu" and torch.cuda.is_available() else "cpu"


def with_kept_questions(trials: Sequence[Trial], folder: Path) -> list[Trial]:
    """The trials of a race, asked the questions that its folder keeps."""
    evaluation = trials[0].race.evaluation
    kept = evaluation and evaluation.kept_in(folder)
    return [replace(trial, race=replace(trial.race, evaluation=kept)) for trial in trials]


def begin(folder: Path, spec: RaceSpec, trials: Sequence[Trial]) -> None:
    """Makes the folder the race's own, or checks that it is; it keeps the questions that are read from files.

    Raises:
        ValueError: it holds something else, or a recipe is another than the race began with.
    """
    recipes = {name: spec.recipe(name) for name in spec.recipes}
    names = [recipe.name for recipe in recipes.values()]
    record = {
        "name": spec.name,
        "recipes": names,
        "baseline": names[0],
        "budget_seconds": spec.budget_seconds,
        "seeds": list(spec.seeds),
        "spec": spec.to_plain(),
        "parts": {name: recipe.to_plain() for name, recipe in recipes.items()},
        "versions": fingerprint(),
        "command": shlex.join(["cggr-ray", *sys.argv[1:]]),
        "trials": [trial.trial_id for trial in trials],
    }
    claim(folder, RACE_FILE, record)
    if spec.evaluation is not None:
        spec.evaluation.keep(folder)


def check_recipes(folder: Path, parts: Mapping[str, Any], file: str) -> None:
    """Raises ValueError where what is in a folder began with another recipe: the file of one may have been edited."""
    known = read_json(folder / file).get("parts", {})
    for name, plain in parts.items():
        if name in known and not Recipe.from_plain(plain).is_that_of(known[name]):
            raise ValueError(f"recipe {name!r} is another than {str(folder)!r} began with; accepted: the recipe as "
                             f"parts of {file} have it, or a new {Path(file).stem}")  # fmt: skip


def claim(folder: Path, file: str, record: Mapping[str, Any]) -> None:
    """Writes the record of a race, a tuning or a sweep into a folder that becomes its own, unless it is that already.

    Raises:
        ValueError: the folder holds something else, or a recipe is another than it began with; nothing is overwritten.
    """
    what, text = Path(file).stem, json.dumps(record, indent=1)
    if (folder / file).is_file():
        check_recipes(folder, record["parts"], file)
        # Parsed, as a record of an older version may lack settings that have a default now.
        if read_spec(folder, file).to_plain() != json.loads(text)["spec"]:
            raise ValueError(f"{str(folder)!r} holds another {what}; accepted: a new folder, or --resume {folder}")
        return
    take(folder, file, text)


def take(folder: Path, file: str, text: str) -> None:
    """Makes a folder that is new or empty the own one of what this file, its first, is the record of.

    Raises:
        ValueError: the folder holds something else; nothing is overwritten.
    """
    if folder.exists() and set(folder.iterdir()) - {aside_of(folder / file)}:
        what = Path(file).stem
        raise ValueError(f"{str(folder)!r} is not empty and holds no {what}; accepted: a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / file, text)


def read_spec(folder: Path, file: str = RACE_FILE) -> RaceSpec:
    """The specification of the race, or of the tuning's race, in a folder."""
    if not (folder / file).is_file():
        raise ValueError(f"{str(folder)!r} holds no {Path(file).stem}; accepted: a folder with {file}")
    return RaceSpec.from_plain(read_json(folder / file, "spec")["spec"])


def reproduce(run: Path, out: Path | None) -> None:
    """Runs a trial again and prints what came of it; exit code 1 where it does not agree with the recorded one."""
    from cggr_ray import reproduce

    verdict = reproduce.reproduce(run, out or new_folder(f"reproduce-{run.resolve().name}"), typer.echo)
    for line in verdict.lines:
        typer.echo(line)
    if not verdict.agrees:
        sys.exit(1)


def study(name: str, values: Mapping[str, Any], out: Path | None, device: str) -> None:
    """Runs a study; prints what it finds as it goes, its table and its folder."""
    from cggr_ray.studies import run_study

    path = run_study(name, values, out or new_folder(name), pick_device(device), typer.echo)
    typer.echo(path.read_text())
    typer.echo(f"study: {path.parent}")
