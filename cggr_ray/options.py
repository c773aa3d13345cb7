"""Options of the command line that several commands have, and those whose help takes a line of its own."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer


def writable(folder: Path | None) -> Path | None:
    """A folder for results, as it was given.

    Raises:
        ValueError: it is an address, a file, or below one, or nothing can be written there.
    """
    if folder is not None:
        # Of two slashes a path keeps one.
        if re.match(r"[a-z][a-z0-9+.-]+:/", str(folder), re.IGNORECASE):
            raise ValueError(f"folder {str(folder)!r} is an address; accepted: a path, where a bucket may be mounted, "
                             "or a path and --mirror ADDRESS")  # fmt: skip
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"folder {str(folder)!r} cannot be written, for {str(there)!r}; accepted: a new folder")
    return folder


RaceName = Annotated[str | None, typer.Argument(help="A race file (.toml) or a shipped race; by device if left out.")]
RecipeName = Annotated[str, typer.Argument(help="A recipe's name, or the path of a .toml file.")]
Space = Annotated[
    str | None, typer.Argument(help="A search space (baseline, cggr, e3, suffix), or a sweep's .toml file.")
]

Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the results; a new one below outputs/ by default.", callback=writable),
]
Mirror = Annotated[
    str | None,
    typer.Option(help="Address (s3://bucket/folder) of a copy from which any machine goes on; see README, A cluster."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and take nothing.")]
Recipes = Annotated[str | None, typer.Option(help="Comma-separated recipes, the baseline first; all by default.")]
Sets = Annotated[
    list[str],
    typer.Option(
        "--set",
        help="KEY=VALUE for every arm, or RECIPE:KEY=VALUE for one; repeatable. E.g. optimizer.matrix.lr=0.002.",
    ),
]
Budget = Annotated[float | None, typer.Option(help="Train seconds of every trial.")]
Wandb = Annotated[str | None, typer.Option(help="off, offline or online.")]

Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
DeviceHere = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Executor = Annotated[str, typer.Option(help="train: a Ray Train worker a trial; inprocess: the trial's own process.")]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster (auto, host:port); a local one by default.")]
Workers = Annotated[
    int | None, typer.Option(help="GPUs, or processes on a CPU, that train a trial together; 1 by default.")
]
GpusPerTrial = Annotated[
    float | None, typer.Option(help="Below 1, trials share a GPU: speeds are not comparable then.")
]
Growing = Annotated[
    int | None,
    typer.Option(help="Trials side by side on a cluster that starts GPU machines, of 8 cores a GPU, for them."),
]
MemoryMib = Annotated[float | None, typer.Option(help="MiB that there are; on a CPU, of data of a process.")]
ScaleBatch = Annotated[
    bool, typer.Option("--scale-batch", help="Let an arm's step grow to its micro-batch; see batch_lr_rule.")
]

Algorithm = Annotated[
    str | None, typer.Option(help="random (the default), grid, tpe, or tpe_memory: loss and peak memory.")
]
Scheduler = Annotated[
    str | None, typer.Option(help="asha (the default), hyperband, pbt or none, all on train seconds.")
]
TotalSeconds = Annotated[
    float | None, typer.Option(help="Train seconds of all trials; then none begins, and those that run are cut.")
]

Tasks = Annotated[Path | None, typer.Option(help="A .toml file with an [evaluation]; the race's own by default.")]
Model = Annotated[
    str | None, typer.Option(help="Folder of a trained model: runs/TRIAL/model of a race with --save-model.")
]
Fractions = Annotated[
    str | None, typer.Option(help="Comma-separated, in (0, 1]: of the full rank, or of the channels kept.")
]
AttentionShapes = Annotated[
    str | None, typer.Option(help="attention-backends: ROWSxPOSITIONSxHEADSxKV_HEADSxHEAD_DIM, comma-separated.")
]
