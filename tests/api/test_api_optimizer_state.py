"""What MatrixOptimizer holds, saved, loaded and copied, with its model or alone, by torch, accelerate and Trainer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from small_loops import RULES, batch, model_of, train, weights
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from cggr_ray import AdamW, MatrixOptimizer, Muon

pytestmark = pytest.mark.usefixtures("small_tensors_in_8_bits")


def test_accelerate_prepares_saves_and_loads_it(tmp_path: Path) -> None:
    model = model_of()
    optimizer = MatrixOptimizer(model, *RULES["galore_8bit"]())
    accelerator = Accelerator(cpu=True)
    prepared, accelerated = accelerator.prepare(model, optimizer)
    train(prepared, accelerated, range(3))
    accelerator.save_state(str(tmp_path))
    whole = train(prepared, accelerated, range(3, 6))
    accelerator.load_state(str(tmp_path))
    assert train(prepared, accelerated, range(3, 6)) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("model_first", [True, False])
def test_what_is_saved_goes_on_to_the_bit(name: str, dtype: torch.dtype, model_first: bool) -> None:
    model = model_of(dtype=dtype)
    optimizer = MatrixOptimizer(model, *RULES[name]())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(model, optimizer, range(5), scheduler.step)
    file = BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lr": scheduler.state_dict()}, file)
    whole = train(model, optimizer, range(5, 9), scheduler.step)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    kept = {value.dtype for value in saved["optimizer"]["state"]["tensors"].values()}
    assert ({torch.int8, torch.uint8} & kept != set()) == name.endswith("8bit")
    again = model_of(seed=1, dtype=dtype)
    other = MatrixOptimizer(again, *RULES[name]())
    later = torch.optim.lr_scheduler.ExponentialLR(other, 0.9)
    train(again, other, range(2), later.step)
    loads = [lambda: again.load_state_dict(saved["model"]), lambda: other.load_state_dict(saved["optimizer"])]
    for load in loads if model_first else reversed(loads):
        load()
    later.load_state_dict(saved["lr"])
    assert train(again, other, range(5, 9), later.step) == whole
    assert all(torch.equal(value, weights(again)[key]) for key, value in weights(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_goes_on_with_the_model_that_is_copied_with_it(
    name: str, dtype: torch.dtype, copied: Callable[[Any], Any]
) -> None:
    model = model_of(dtype=dtype)
    optimizer = MatrixOptimizer(model, *RULES[name]())
    train(model, optimizer, range(5))
    other, again = copied((optimizer, model))
    before = weights(model)
    found = train(again, other, range(5, 9))
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    assert train(model, optimizer, range(5, 9)) == found
    assert all(torch.equal(value, weights(again)[key]) for key, value in weights(model).items())
    assert other.grad_norm == optimizer.grad_norm


def test_a_copy_alone_leaves_the_model_as_it_is() -> None:
    """As one of torch's own optimizers does: its parameters are copies too."""
    model = model_of()
    optimizer = MatrixOptimizer(model)
    other, before = copy.deepcopy(optimizer), weights(model)
    for p in all_of(other):
        p.grad = torch.ones_like(p)
    other.step()
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    assert not any(torch.equal(p, q) for p, q in zip(*map(all_of, (optimizer, other)), strict=True))


def all_of(optimizer: MatrixOptimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_weights_that_are_loaded_later_are_what_learns() -> None:
    """And not the masters of those that were there before."""
    model, loaded = model_of(dtype=torch.bfloat16), model_of(seed=1, dtype=torch.bfloat16)
    optimizer = MatrixOptimizer(model, Muon(lr=0.0), AdamW(lr=0.0))
    train(model, optimizer, range(2))
    model.load_state_dict(loaded.state_dict())
    train(model, optimizer, range(2))
    assert all(torch.equal(value, weights(loaded)[name]) for name, value in weights(model).items())


def test_the_trainer_saves_and_goes_on_with_it(tmp_path: Path) -> None:
    def run(folder: Path, resume: bool, steps: int) -> PreTrainedModel:
        model, data = model_of(dtype=torch.bfloat16), [{"input_ids": t, "labels": t} for t in batch(0).repeat(4, 1)]
        optimizer = MatrixOptimizer(model, *RULES["galore_8bit"]())
        linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)
        arguments = TrainingArguments(
            str(folder), per_device_train_batch_size=2, max_steps=steps, save_steps=2, report_to=[], use_cpu=True
        )
        Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, linear)).train(
            resume_from_checkpoint=resume
        )
        return model

    start, whole = weights(model_of(dtype=torch.bfloat16)), weights(run(tmp_path / "whole", False, 4))
    run(tmp_path / "parts", False, 2)
    resumed = weights(run(tmp_path / "parts", True, 4))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    assert sum(not torch.equal(value, whole[name]) for name, value in start.items()) == len(start)


def test_a_state_knows_the_model_whether_compiled_or_not() -> None:
    plain, compiled = model_of(), torch.compile(model_of(), backend="eager")
    assert isinstance(compiled, nn.Module)
    first, second = MatrixOptimizer(compiled), MatrixOptimizer(plain)
    train(compiled, first, range(3))
    plain.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in compiled.state_dict().items()})
    second.load_state_dict(first.state_dict())
    assert train(plain, second, range(3, 6)) == pytest.approx(train(compiled, first, range(3, 6)), rel=1e-6)
    named = [f"module._orig_mod.{name}" for name in second.state_dict()["param_groups"][0]["params"]]
    state = second.state_dict()
    state["param_groups"][0]["params"] = named
    first.load_state_dict(state)
