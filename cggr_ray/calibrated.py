"""Whether a race is still what its micro-batches were calibrated for: the machine, and all that takes memory.

A calibrated race keeps the device and a fingerprint of every arm. Learning rates and their schedules are in none, so
that arms can be tuned afterwards; nor are seconds, seeds and paths of questions.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from cggr_ray.codec import to_plain
from cggr_ray.race import RaceSpec
from cggr_ray.telemetry.gpu import device_info

# Of a recipe and of a task: what does not decide how much memory is needed.
FREE_OF_A_RECIPE = ("name", "description", "lr", "lr_scale", "schedule", "weight_decay")
FREE_OF_A_TASK = ("path", "seconds", "seed", "temperature", "top_p", "stop")
# Of a device: the threads of a CPU are another process's to choose.
OF_THE_DEVICE = ("type", "name", "memory_mib")
CALIBRATE = "accepted: what was calibrated, `cggr-ray calibrate` again, or a race without [calibration]"


def device_of(info: dict[str, Any]) -> dict[str, Any]:
    """What of `device_info` names a machine's memory."""
    return {key: info[key] for key in OF_THE_DEVICE if key in info}


def fingerprint(spec: RaceSpec, name: str) -> str:
    """Of all that the memory of an arm depends on, its batch included."""
    data, asked = spec.data, spec.evaluation
    whole = {
        "recipe": _without(spec.recipe(name).to_plain(), FREE_OF_A_RECIPE),
        "rows": spec.rows_of(name),
        "workers": spec.workers,
        "model": to_plain(spec.model),
        "data": [data.row_tokens, data.mask_prompts, data.tokenizer, data.vocab_size, data.chat],
        "evaluation": asked and [asked.rows, [_without(to_plain(task), FREE_OF_A_TASK) for task in asked.tasks]],
    }
    return hashlib.blake2b(json.dumps(whole, sort_keys=True).encode(), digest_size=8).hexdigest()


def check_calibration(spec: RaceSpec, device: torch.device | None) -> None:
    """Whether what was calibrated is what would run; nothing where nothing was.

    Args:
        device: None where the race runs on other machines, or on none.
    Raises:
        ValueError: another machine, or an arm of another recipe, batch, model, data or evaluation, which is named.
    """
    if spec.calibration is None:
        return
    for name in (name for name in spec.recipes if name in spec.calibration.arms):
        if fingerprint(spec, name) != spec.calibration.arms[name]:
            raise ValueError(f"arm {name!r}: its recipe or batch, or the race's model, data, workers or evaluation is "
                             f"another than its micro-batch was calibrated with; {CALIBRATE}")  # fmt: skip
    here = spec.calibration.device if device is None else device_of(device_info(device))
    if here != spec.calibration.device:
        raise ValueError(f"micro-batches were calibrated on {_named(spec.calibration.device)}, this machine has "
                         f"{_named(here)}; {CALIBRATE}")  # fmt: skip


def _named(device: dict[str, Any]) -> str:
    memory = f" of {device['memory_mib']:,.0f} MiB" if "memory_mib" in device else ""
    return f"{device['name']!r}{memory}"


def _without(value: Any, keys: tuple[str, ...]) -> Any:
    """A plain value without these keys, at any depth."""
    if isinstance(value, dict):
        return {key: _without(inner, keys) for key, inner in value.items() if key not in keys}
    return [_without(inner, keys) for inner in value] if isinstance(value, list) else value
