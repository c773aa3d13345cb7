"""cggr-ray: race, evaluate, tune, calibrate, sweep, report, reproduce, recipe, bench, study, doctor.

Each command imports what it needs, when it runs.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from cggr_ray import arguments, options
from cggr_ray.copying import fetch_results
from cggr_ray.files import FORBIDDEN, FULL
from cggr_ray.lock import InUseError
from cggr_ray.recipe_command import recipe_app
from cggr_ray.remote import RemoteError, is_address, open_remote
from cggr_ray.stopping import StoppedError

app = typer.Typer(
    name="cggr-ray",
    help="Race ways to train a language model against each other: same seconds, same data order, controls, error bars.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(recipe_app, name="recipe")


@app.command()
def race(
    spec: options.RaceName = None,
    out: options.Out = None,
    recipes: Annotated[str | None, typer.Option(help="Comma-separated recipes, the baseline first.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated seeds.")] = None,
    budget: options.Budget = None,
    data: Annotated[str | None, typer.Option(help="problems or numinamath, instead of the race's sources.")] = None,
    sets: options.Sets = [],  # noqa: B006 - typer reads the default
    device: options.Device = None,
    executor: options.Executor = "train",
    workers: options.Workers = None,
    address: options.Address = None,
    wandb: options.Wandb = None,
    wandb_project: Annotated[str | None, typer.Option(help="W&B project.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard event files too.")] = False,
    save_model: Annotated[bool, typer.Option("--save-model", help="Keep each trial's final model.")] = False,
    mirror: options.Mirror = None,
    resume: Annotated[str | None, typer.Option(help="Go on with the race in this folder, or at its mirror.")] = None,
    trials: Annotated[int | None, typer.Option(help="Stop after so many trials; --resume goes on later.")] = None,
    dry_run: options.DryRun = False,
) -> None:
    """Race recipes against each other, and report.

    Example: cggr-ray race races/gsm8k.toml --seeds 0,1,2 --budget 600
    """
    from cggr_ray import commands

    changes = arguments.given(
        recipes=arguments.words("--recipes", recipes),
        seeds=arguments.integers("--seeds", seeds),
        budget_seconds=budget,
        data=data,
        device=device,
        workers=workers,
        wandb=wandb,
        wandb_project=wandb_project,
        tensorboard=tensorboard or None,
        save_model=save_model or None,
        mirror=mirror,
    )
    commands.race(spec, out, changes, arguments.assignments(sets), executor, address, resume, trials, dry_run)


@app.command()
def tune(
    spec: Annotated[str | None, typer.Argument(help="A race file (.toml) with a [tuning].")] = None,
    out: options.Out = None,
    recipes: options.Recipes = None,
    executor: options.Executor = "train",
    address: options.Address = None,
    mirror: options.Mirror = None,
    resume: Annotated[str | None, typer.Option(help="Go on with the tuning in this folder, or at its mirror.")] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="With --resume: one more entry for tuning.values, as in the file.")
    ] = None,
    dry_run: options.DryRun = False,
) -> None:
    """Try the same values with every recipe of a race, and write the race with each recipe's best: tuned.toml.

    Example: cggr-ray tune mine.toml --out outputs/tuning, then cggr-ray race outputs/tuning/tuned.toml; where the best
    is the largest value tried: cggr-ray tune --resume outputs/tuning --also '{"optimizer.lr_scale" = 3.0}'
    """
    from cggr_ray import tune_command

    changes = arguments.given(recipes=arguments.words("--recipes", recipes), mirror=mirror)
    tune_command.tune(spec, out, changes, executor, address, resume, also or [], dry_run)


@app.command()
def calibrate(
    spec: options.RaceName = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; outputs/RACE-calibration by default.", callback=options.writable)
    ] = None,
    recipes: options.Recipes = None,
    device: options.Device = None,
    memory_mib: options.MemoryMib = None,
    head_room: Annotated[float, typer.Option(help="Part of the memory that stays free.")] = 0.05,
    verify_steps: Annotated[int, typer.Option(help="Steps with what was found.")] = 10,
    starts: Annotated[int, typer.Option(help="Fresh starts of these steps.")] = 1,
    scale_batch: options.ScaleBatch = False,
    again: Annotated[bool, typer.Option("--again", help="Try what is known, too.")] = False,
) -> None:
    """Find every arm's largest micro-batch by running into the limit, and write the race with it: calibrated.toml.

    Example: cggr-ray calibrate mine.toml, then cggr-ray race outputs/mine-calibration/calibrated.toml
    """
    from cggr_ray import calibrate_command
    from cggr_ray.calibration import Settings

    changes = arguments.given(recipes=arguments.words("--recipes", recipes), device=device)
    settings = Settings(head_room, memory_mib, verify_steps, starts, scale_batch)
    calibrate_command.calibrate(spec, out, changes, settings, again)


@app.command()
def sweep(
    space: options.Space = None,
    spec: Annotated[str | None, typer.Option("--race", help="Race file that gives model, data and budget.")] = None,
    out: options.Out = None,
    trials: Annotated[int | None, typer.Option(help="Configurations to draw; 16 by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None,
    algorithm: options.Algorithm = None,
    scheduler: options.Scheduler = None,
    budget: options.Budget = None,
    total_seconds: options.TotalSeconds = None,
    wall_seconds: Annotated[float | None, typer.Option(help="The same in wall-clock seconds of the sweep.")] = None,
    gpus_per_trial: options.GpusPerTrial = None,
    sets: options.Sets = [],  # noqa: B006 - typer reads the default
    device: options.Device = None,
    executor: options.Executor = "inprocess",
    address: options.Address = None,
    growing: options.Growing = None,
    mirror: options.Mirror = None,
    resume: Annotated[str | None, typer.Option(help="Go on with the sweep in this folder, or at its mirror.")] = None,
    dry_run: options.DryRun = False,
) -> None:
    """Search the hyperparameters of a recipe family, and write the best recipe.

    Example: cggr-ray sweep cggr --race races/gsm8k.toml --trials 32 --budget 120
    """
    from cggr_ray import sweep_command

    changes = arguments.given(budget_seconds=budget, device=device, mirror=mirror)
    search = arguments.given(
        trials=trials,
        seed=seed,
        algorithm=algorithm,
        scheduler=scheduler,
        total_seconds=total_seconds,
        wall_seconds=wall_seconds,
        gpus_per_trial=gpus_per_trial,
    )
    values = arguments.assignments(sets)
    sweep_command.sweep(space, spec, out, changes, values, search, executor, address, growing, resume, dry_run)


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="The folder of a race or a sweep, or its mirror.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write; <folder>/report by default.", callback=options.writable)
    ] = None,
) -> None:
    """Write benchmark_results.md, report.html and tables of a race or a sweep. Needs no GPU, torch or Ray.

    Example: cggr-ray report outputs/gsm8k
    """
    from analysis import report_summary, write_report

    with TemporaryDirectory() as fetched:
        if is_address(folder):
            fetch_results(open_remote(folder), Path(fetched))
            out = out or Path("outputs") / f"{folder.rstrip('/').rpartition('/')[2]}-report"
        results = Path(fetched if is_address(folder) else folder)
        path = write_report(results, out)
        typer.echo(report_summary(results))
    typer.echo(f"\nreport: {path}")


@app.command()
def reproduce(
    run: Annotated[Path, typer.Argument(help="A run's folder: <race>/runs/<trial>.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the replay; a new one below outputs/ by default.", callback=options.writable),
    ] = None,
) -> None:
    """Run a trial again from its folder alone, and say whether both agree; exit code 1 where they do not.

    Example: cggr-ray reproduce outputs/gsm8k/runs/baseline-s0
    """
    from cggr_ray import commands

    commands.reproduce(run, out)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A run's folder, <race>/runs/<trial>, or a race's.")],
    tasks: options.Tasks = None,
    rows: Annotated[int | None, typer.Option(help="Samples that are generated at once.")] = None,
    device: options.DeviceHere = "auto",
) -> None:
    """Answer tasks with the models that a race kept at its milestones. The report then has the new values.

    Example: cggr-ray evaluate outputs/gsm8k --tasks more.toml
    """
    from cggr_ray.evaluate_command import evaluate

    evaluate(folder, tasks, rows, device)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="step, memory, head-stats, logit-stats, loop, optimizer or workers.")],
    shapes: Annotated[str | None, typer.Option(help="Comma-separated, e.g. smollm-135m/32x1024.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the CSV.", callback=options.writable)] = Path("results/bench"),
    repeats: Annotated[int, typer.Option(help="Timed repetitions of each provider, interleaved.")] = 30,
    device: options.DeviceHere = "auto",
) -> None:
    """Measure, and append typed rows to results/bench/NAME.csv; refuses where the tests of what it measures fail.

    Example: cggr-ray bench step --shapes smollm-135m/32x1024,llama-1.5b/4x2048
    """
    from cggr_ray.benchmarks import run_bench

    run_bench(name, arguments.words("--shapes", shapes), out, repeats, device)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="low-rank, structured-mlp or attention-backends.")],
    model: options.Model = None,
    data: Annotated[str | None, typer.Option(help="The race's data folder.")] = None,
    out: options.Out = None,
    fractions: options.Fractions = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated methods of the study.")] = None,
    kinds: Annotated[str | None, typer.Option(help="low-rank: of q,k,v,o,gate,up,down,all.")] = None,
    block: Annotated[int | None, typer.Option(help="structured-mlp: channels that are dropped together.")] = None,
    steps: Annotated[int | None, typer.Option(help="low-rank: steps of loss_aware.")] = None,
    calibration_rows: Annotated[int | None, typer.Option(help="Rows of training data to calibrate on.")] = None,
    heldout_rows: Annotated[int | None, typer.Option(help="Rows of held-out data for loss and errors.")] = None,
    micro_rows: Annotated[int | None, typer.Option(help="Rows a forward.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Rows of the timed products.")] = None,
    shapes: options.AttentionShapes = None,
    masks: Annotated[str | None, typer.Option(help="attention-backends: of causal,documents,window.")] = None,
    backends: Annotated[str | None, typer.Option(help="attention-backends: comma-separated.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Timed rounds, interleaved.")] = None,
    device: options.DeviceHere = "auto",
) -> None:
    """Measure what could make a step cheaper, and write NAME.json, NAME.png and NAME.md. Not every option fits a study.

    Example: cggr-ray study low-rank --model outputs/gsm8k/runs/baseline-s0/model --data outputs/gsm8k/data
    """
    from cggr_ray import commands

    values = arguments.given(
        model=model,
        data=data,
        fractions=arguments.numbers("--fractions", fractions),
        methods=arguments.words("--methods", methods),
        kinds=arguments.words("--kinds", kinds),
        block=block,
        steps=steps,
        calibration_rows=calibration_rows,
        heldout_rows=heldout_rows,
        micro_rows=micro_rows,
        tokens=tokens,
        shapes=arguments.words("--shapes", shapes),
        masks=arguments.words("--masks", masks),
        backends=arguments.words("--backends", backends),
        rounds=rounds,
    )
    commands.study(name, values, out, device)


@app.command()
def doctor() -> None:
    """What is installed, what the device is, and what would go wrong.

    Example: cggr-ray doctor
    """
    from cggr_ray import doctor_command

    doctor_command.doctor()


def main() -> None:
    """The console script: a user's mistake, or a folder in use, is one line and exit code 2; a full disk, a path that
    this user may not read or write, or a mirror that does not answer, one line and 1; SIGTERM is 143, Ctrl-C 130."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # As an exception, so that what has processes of its own ends them.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    try:
        app()
    except (ValueError, InUseError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (*FULL, *FORBIDDEN):
            raise
        behind = "what was saved before is whole" if error.errno in FULL else "accepted: a path that this user may use"
        typer.echo(f"error: {error}; {behind}", err=True)
        sys.exit(1)
    except RemoteError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except StoppedError as stopped:
        typer.echo(stopped, err=True)
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()
