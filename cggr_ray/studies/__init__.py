"""Studies by name: what could make a step cheaper, measured on trained weights and on this device.

A study is a module with a dataclass of settings, checked before anything heavy, and a function from settings to a
result, which says what it has found as it goes. `run_study` writes the result into a folder: NAME.json, NAME.png,
NAME.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cggr_ray.codec import from_plain, nearest

if TYPE_CHECKING:
    import torch

    from cggr_ray.saying import Say
    from cggr_ray.studies.result import Result

    Study = Callable[[Any, torch.device, Say], Result]

NAMES = ("low-rank", "structured-mlp", "attention-backends")


def run_study(name: str, values: Mapping[str, Any], folder: Path, device: torch.device, say: Say) -> Path:
    """Runs a study with settings in the place of its defaults; the path of its Markdown table. `say` hears of each part
    as soon as it is measured.

    Raises:
        ValueError: unknown study, a setting it does not have or does not accept, or a folder that is not empty.
    """
    if name not in NAMES:
        raise ValueError(f"study {name!r}; {nearest(name, NAMES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {str(folder)!r} is not an empty folder; accepted: a new or empty folder")
    settings_type, study = _study(name)
    if missing := [option for option in required(settings_type) if option not in values]:
        options = " and ".join(f"--{option}" for option in required(settings_type))
        raise ValueError(f"study {name!r} without --{missing[0]}; accepted: with {options}")
    settings = from_plain(settings_type, values)
    start = time.perf_counter()
    result = study(settings, device, say)
    return result.write(folder, settings, device, time.perf_counter() - start)


def required(settings: type) -> list[str]:
    """What has no default, and is an option of the same name."""
    return [f.name for f in fields(settings) if f.default is MISSING and f.default_factory is MISSING]


def _study(name: str) -> tuple[type, Study]:
    from cggr_ray.studies import attention_backends, low_rank, structured_mlp

    table: dict[str, tuple[type, Study]] = {
        "low-rank": (low_rank.Settings, low_rank.study),
        "structured-mlp": (structured_mlp.Settings, structured_mlp.study),
        "attention-backends": (attention_backends.Settings, attention_backends.study),
    }
    return table[name]
