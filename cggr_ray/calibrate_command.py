"""cggr-ray calibrate: finds every arm's largest micro-batch, says what it is and writes the calibrated race."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cggr_ray.calibration import Calibration, Settings, notes, write_calibrated
from cggr_ray.commands import check, specify, take
from cggr_ray.data.dataset import prepare
from cggr_ray.data_checks import check_tokens
from cggr_ray.device import pick_device
from cggr_ray.fits import ask
from cggr_ray.schema import CALIBRATED_FILE, CALIBRATION_FILE, DATA_FOLDER
from cggr_ray.telemetry.console import terminal


def calibrate(name: str | None, out: Path | None, changes: Mapping[str, Any], settings: Settings, again: bool) -> None:
    """Calibrates the arms of a race; exit code 1 where of one no micro-batch fits, and then no race is written."""
    spec = replace(specify(name, changes, {}), calibration=None)
    if spec.workers > 1:
        raise ValueError(f"workers = {spec.workers}; accepted: workers = 1, for one process after the other is tried")
    device = pick_device(spec.device)
    settings.limit_mib(device)
    folder, console = out or Path("outputs") / f"{spec.name}-calibration", terminal()
    check(spec, "train", None, folder)
    if not (folder / CALIBRATION_FILE).is_file():
        take(folder, CALIBRATION_FILE, json.dumps({"name": spec.name, "arms": {}}))
    prepare(spec.data, folder / DATA_FOLDER, lambda text: console.print(text, style="dim"))
    check_tokens(spec, map(spec.recipe, spec.recipes), folder / DATA_FOLDER)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    calibration = Calibration(spec, settings, device, folder / CALIBRATION_FILE, folder / DATA_FOLDER, ask, say)
    arms = {recipe: calibration.arm(recipe, again) for recipe in spec.recipes}
    for line in (lines := notes(settings, arms)):
        say(line)
    if any(arm["micro_rows"] is None for arm in arms.values()):
        fewer = "row_tokens or evaluation.rows" if spec.evaluation else "row_tokens"
        say(f"no {CALIBRATED_FILE} is written; accepted: more memory, a smaller model, or fewer {fewer}")
        sys.exit(1)
    write_calibrated(spec, lines, arms, folder / CALIBRATED_FILE)
    say(f"calibrated race: {(folder / CALIBRATED_FILE).resolve()}")
