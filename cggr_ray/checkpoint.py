"""Checkpoints: safetensors and JSON, written aside, flushed to disk, renamed; the last two are kept.

checkpoints/step_00000123/model.safetensors      weights by parameter name
                          objective.safetensors  what the objective owns beside the model, if it does
                          optimizer.safetensors  masters and states by stack
                          router.safetensors     what the router has learned, where it learns
                          state.json             everything else: step, ledgers, loader, parts
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cggr_ray.learner import Learner

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

FOLDER = "checkpoints"
KEPT = 2


def save(run_folder: Path, step: int, learner: Learner, state: dict[str, Any]) -> Path:
    """Writes a checkpoint that is whole or absent, and removes all but the last two."""
    final = run_folder / FOLDER / f"step_{step:08d}"
    with whole(final) as aside:
        save_file(_copied(learner.adapter.named_parameters()), aside / "model.safetensors")
        save_file(_copied(learner.objective.named_parameters()), aside / "objective.safetensors")
        optimizer = {k: v.contiguous() for k, v in learner.optimizer.state_dict().items()}
        save_file(optimizer, aside / "optimizer.safetensors")
        save_file({k: v.contiguous() for k, v in learner.router.tensors().items()}, aside / "router.safetensors")
        (aside / "state.json").write_text(json.dumps({"step": step, "learner": learner.state_dict(), **state}))
    for old in _all(run_folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def save_model(
    final: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, notes: dict[str, dict[str, Any]]
) -> None:
    """Writes a Hugging Face folder that is whole or absent, in place of one that is there; `notes` are JSON beside."""
    from transformers import GenerationConfig

    with whole(final) as aside:
        if getattr(model.generation_config, "_from_model_config", False):
            # Nobody has written one: the end of a text by a family's default is some other token of this tokenizer.
            model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, use_cache=True)
        model.save_pretrained(aside, safe_serialization=True)
        tokenizer.save_pretrained(aside)
        for name, note in notes.items():
            (aside / name).write_text(json.dumps(note))


@contextmanager
def whole(final: Path) -> Iterator[Path]:
    """A folder to write into. When the body has ended well it is flushed to disk and takes the place of `final`."""
    aside = final.with_name(f".{final.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    for file in aside.iterdir():
        _flush(file)
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    _flush(final.parent)


def latest(run_folder: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    found = _all(run_folder)
    return found[-1] if found else None


def load(folder: Path, learner: Learner) -> dict[str, Any]:
    """Restores weights, optimizer and parts in place; returns the rest of the state."""
    device = learner.adapter.device
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    _restore(folder / "model.safetensors", learner.adapter.named_parameters(), device)
    _restore(folder / "objective.safetensors", learner.objective.named_parameters(), device)
    learner.optimizer.load_state_dict(load_file(folder / "optimizer.safetensors", device=str(device)))
    routing = load_file(folder / "router.safetensors", device=str(device))
    for name, tensor in learner.router.tensors().items():
        tensor.copy_(routing[name])
    learner.load_state_dict(state["learner"])
    return state


def remove_all(run_folder: Path) -> None:
    shutil.rmtree(run_folder / FOLDER, ignore_errors=True)


def _copied(named: list[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    # Parameters are views of stacks; safetensors refuses tensors that share storage, so each is copied, to where there
    # is room.
    return {name: p.detach().to("cpu", copy=True) for name, p in named}


@torch.no_grad()
def _restore(file: Path, named: list[tuple[str, nn.Parameter]], device: torch.device) -> None:
    weights = load_file(file, device=str(device))
    different = {(name, p.shape) for name, p in named} ^ {(name, w.shape) for name, w in weights.items()}
    if different:
        raise ValueError(f"{file} holds another {file.stem}: {sorted({name for name, _ in different})[:3]}")
    for name, parameter in named:
        parameter.copy_(weights[name])


def _all(run_folder: Path) -> list[Path]:
    return sorted((run_folder / FOLDER).glob("step_*"))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
