"""Memory that truly runs out on a GPU: a run goes on in smaller micro-batches, with CUDA graphs and without, and a
calibration finds where it ends."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import prepared, rows_of

from cggr_ray.data.dataset import DataSpec
from cggr_ray.data.sources import Problems
from cggr_ray.fits import ask, total_mib
from cggr_ray.learner import Pass
from cggr_ray.loop import Run, run_race
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import RaceSpec, Trial, plan_trials
from cggr_ray.telemetry.gpu import MIB

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SPEC = RaceSpec(
    recipes=("baseline",),
    global_rows=32,
    micro_rows=32,
    budget_seconds=8.0,
    step_seconds=1.0,
    milestones=(),
    model=ModelSpec(preset="tiny"),
    data=DataSpec(sources=(Problems(count=600),), row_tokens=512, val_documents=8),
    values={"optimizer.schedule.warmup_tokens": 1000},
    device="cuda",
)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(SPEC.data, tmp_path_factory)


@pytest.fixture(autouse=True)
def all_memory() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()  # the pools of a run's graphs, which its objects hold in circles
    torch.cuda.empty_cache()


def trial_of(folder: Path, data_folder: Path, **changes: Any) -> Trial:
    return plan_trials(replace(SPEC, **changes), folder)[0].placed(folder, data_folder)


class Capped:
    """A pass that needs so much more memory a row, once it is armed."""

    def __init__(self, mib_a_row: int) -> None:
        self.mib_a_row, self.armed, self.call = mib_a_row, False, Pass.__call__

    def __get__(self, instance: Any, owner: type) -> Any:
        def run(micro: Any, *arguments: Any, **keywords: Any) -> Any:
            held = torch.empty(self.mib_a_row * len(micro.tokens_BT) * MIB if self.armed else 0, dtype=torch.uint8,
                               device="cuda")  # fmt: skip
            result = self.call(instance, micro, *arguments, **keywords)
            del held
            return result

        return run


@pytest.mark.parametrize("recipe", ["baseline", "random_tokens"])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_run_goes_on_when_memory_has_run_out(
    recipe: str, graphs: bool, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"recipes": (recipe,), "values": SPEC.values | {"execution.cuda_graphs": graphs}}
    capped = Capped(mib_a_row=64)
    monkeypatch.setattr(Pass, "__call__", capped)
    run = Run(trial_of(tmp_path, data_folder, **changes), lambda row: None)
    run.prepare()
    with run.loader:
        used = 0.0
        for step in range(6):
            if step == 3:
                # Graphs of the old shape replay what they have: new ones have to be made, as if the shape were new.
                run.learner.release()
                capped.armed = True
                # Room for the passes of sixteen rows, not of 32.
                allowed = torch.cuda.memory_reserved() / MIB + 1800
                torch.cuda.set_per_process_memory_fraction(allowed / total_mib(run.device))
            used = run.advance(used)
        run._land(all_steps=True)
        run.recorder.flush()
    counts = run.counts
    assert counts.step == 6 and counts.out_of_memory >= 1 and counts.micro_rows <= 16
    events = rows_of(tmp_path, "out_of_memory")
    assert [event["step"] for event in events] == [4] * counts.out_of_memory and "memory" in events[0]["message"]
    norms = [row["train/grad_norm"] for row in rows_of(tmp_path, "step")]
    assert len(norms) == 6 and all(norm and norm > 0 for norm in norms)


def test_a_run_that_is_capped_from_the_start_ends_with_what_fits(data_folder: Path, tmp_path: Path) -> None:
    whole = run_race(trial_of(tmp_path / "whole", data_folder))
    torch.cuda.empty_cache()
    limit = 0.75 * whole["peak_memory_mib"]
    torch.cuda.set_per_process_memory_fraction(limit / total_mib(torch.device("cuda")))
    capped = run_race(trial_of(tmp_path / "capped", data_folder))
    assert capped["status"] == "finished" and capped["steps"] == whole["steps"] and capped["order"] == whole["order"]
    assert capped["micro_rows"] < 32 and capped["out_of_memory"] >= 1 and capped["peak_memory_mib"] <= limit
    assert capped["val/loss"] == pytest.approx(whole["val/loss"], rel=0.02)


def test_tries_in_processes_of_their_own_find_the_limit(data_folder: Path, tmp_path: Path) -> None:
    small = trial_of(tmp_path / "small", data_folder, micro_rows=4, budget_seconds=2.0)
    large = trial_of(tmp_path / "large", data_folder, micro_rows=32, budget_seconds=2.0)
    free = ask(large, total_mib(torch.device("cuda")) * 0.5, True, True)
    assert free.fits and 0 < free.batch_mib <= free.peak_mib
    limit = 0.6 * free.peak_mib
    few, many = ask(small, limit, True, True), ask(large, limit, True, True)
    assert few.fits and few.peak_mib <= limit and not many.fits and "memory" in many.message
    assert few.batch_mib < free.batch_mib
