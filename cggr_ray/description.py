"""run.json: what runs, from which `reproduce` makes the trial again. Written before the first step."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch

from cggr_ray import hub
from cggr_ray.batches import rows_of_worker
from cggr_ray.codec import read_json
from cggr_ray.environment import fingerprint
from cggr_ray.models.adapter import Adapter
from cggr_ray.race import Trial
from cggr_ray.telemetry.gpu import device_info
from cggr_ray.telemetry.tracker import Row


def description(trial: Trial, adapter: Adapter, rows_per_step: int) -> Row:
    spec, named = trial.race, adapter.named_parameters()
    dtype = str(adapter.head_VD.dtype).removeprefix("torch.")
    parameters = sum(p.numel() for _, p in named)
    return {
        "trial_id": trial.trial_id,
        "recipe": trial.recipe.name,
        "seed": trial.seed,
        "data_seed": spec.data.seed,
        "race": spec.name,
        "values": trial.values,
        "parts": trial.recipe.to_plain(),
        "spec": spec.to_plain(),
        "model": {
            "name": spec.model.name,
            "commit": hub.commit(spec.model.hub) if spec.model.hub else None,
            "layers": len(adapter.layers),
            "parameters": parameters,
            "dtype": dtype,
        },
        "device": device_info(adapter.device),
        "gpus_per_trial": trial.gpus_per_trial,
        "process": {"host": platform.node(), "pid": os.getpid()},
        "execution": adapter.execution_note,
        "versions": fingerprint(),
        "row_tokens": spec.data.row_tokens,
        "global_rows": rows_per_step,
        "micro_rows": min(spec.micro_rows, rows_of_worker(rows_per_step, spec.workers)),
    }


def check_kind(file: Path, device: torch.device) -> None:
    """Refuses what began on a GPU where there is a CPU, and the other way round.

    Raises:
        ValueError: run.json, if there is one, names another kind of device: dtypes are others there, and no second of
            the one compares with a second of the other.
    """
    if file.is_file() and (began := read_json(file, "device")["device"])["type"] != device.type:
        raise ValueError(f"{str(file.parent)!r} began on {began['name']!r} ({began['type']}), and the device is "
                         f"{device.type!r} here; accepted: {began['type']}")  # fmt: skip


def with_earlier(run: Row, file: Path) -> Row:
    """What goes on from a checkpoint, and as `earlier` the other devices, hosts and versions it ran with, from its
    run.json."""
    before = json.loads(file.read_text()) if file.is_file() else {}
    here = _where(run)
    earlier = [*before.get("earlier", ()), *([_where(before)] if "process" in before else ())]
    elsewhere = [where for number, where in enumerate(earlier) if where != here and where not in earlier[:number]]
    return run | ({"earlier": elsewhere} if elsewhere else {})


def _where(run: Row) -> Row:
    return {"device": run["device"]["name"], "host": run["process"]["host"], "versions": run["versions"]}
