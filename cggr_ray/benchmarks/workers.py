"""`bench workers`: tokens per second of a trial of N workers, one a GPU, against one worker with as many rows as each.

    scaling efficiency = tokens/s of N workers / (N x tokens/s of one)

Every worker trains the rows of the shape, so that N workers have N times the global batch. Each process holds both
trials; worker 0 trains the one alone while the others wait, then all train the other, in turn. On a CPU there are two
workers, which shows that the benchmark works and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cggr_ray.benchmarks.loop import STEPS_A_CALL, per_step, train
from cggr_ray.benchmarks.rows import BenchRow, Shape, bench_row
from cggr_ray.benchmarks.timing import interleaved
from cggr_ray.benchmarks.workload import prepared_data, prepared_run
from cggr_ray.device import pick_device
from cggr_ray.loop import Run
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import check_layers
from cggr_ray.recipe import load_recipe
from cggr_ray.workers import Group, Workers

SHAPES = ("llama-1.5b/4x2048",)
RECIPES = ("baseline", "cggr_tuned")
HERE, ROWS_FILE = "127.0.0.1", "rows.json"


def bench_workers(shape: Shape, device: str, rounds: int, folder: Path) -> Iterator[BenchRow]:
    """Rows of one recipe, then of the other, with processes of its own.

    Raises:
        ValueError: a model with too few layers for them, or there is one GPU alone.
    """
    for recipe in RECIPES:
        check_layers(load_recipe(recipe), ModelSpec(preset=shape.model))
    on_gpu = pick_device(device).type == "cuda"
    size = torch.cuda.device_count() if on_gpu else 2
    if size < 2:
        raise ValueError("1 GPU; accepted: at least 2, or device cpu")
    # Once, before all processes look for it.
    prepared_data(shape, folder)
    for recipe in RECIPES:
        store = dist.TCPStore(HERE, 0, is_master=True, wait_for_workers=False)
        mp.spawn(measure, (size, store.port, recipe, shape, on_gpu, rounds, folder), nprocs=size)
        yield from (BenchRow(**row) for row in json.loads((folder / ROWS_FILE).read_text()))


def measure(
    rank: int, size: int, port: int, recipe: str, shape: Shape, on_gpu: bool, rounds: int, folder: Path
) -> None:
    """One worker of both trials of a recipe. Worker 0 writes the rows."""
    # All of them are on this machine, whatever its name resolves to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    store = dist.TCPStore(HERE, port, is_master=False)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size)
    group = Group(device)
    rows = rows_of(recipe, shape, device, rounds, folder, group)
    if group.is_first:
        (folder / ROWS_FILE).write_text(json.dumps([asdict(row) for row in rows]))
    group.first(0.0)
    dist.destroy_process_group()


def rows_of(
    recipe: str, shape: Shape, device: torch.device, rounds: int, folder: Path, group: Workers
) -> list[BenchRow]:
    """Of one recipe: tokens per second of one worker, those of all, and the scaling efficiency of all."""
    with ExitStack() as loaders:
        alone = prepared_run(shape, device.type, folder, recipe) if group.is_first else None
        several = prepared_run(shape, device.type, folder, recipe, group)
        for run in filter(None, (alone, several)):
            loaders.enter_context(run.loader)
        providers = {"one": partial(train_first, alone, group), "all": partial(train, several)}
        times = interleaved(providers, rounds, device)
    tokens = STEPS_A_CALL * shape.rows * shape.positions * 1e3
    one, all_of_them = tokens / times["one"].p50, group.size * tokens / times["all"].p50
    found = (
        ("1_worker", times["one"], one, "tokens_per_s"),
        (f"{group.size}_workers", times["all"], all_of_them, "tokens_per_s"),
        (f"{group.size}_workers", times["all"], all_of_them / (group.size * one), "scaling_efficiency"),
    )
    dtype = several.learner.adapter.head_VD.dtype
    return [
        bench_row("workers", shape, f"{recipe}/{who}", dtype, device, per_step(time), value, unit)
        for who, time, value, unit in found
    ]


def train_first(alone: Run | None, group: Workers) -> None:
    """Worker 0 trains alone, and the others wait."""
    if alone is not None:
        train(alone)
    group.first(0.0)
