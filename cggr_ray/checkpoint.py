"""Checkpoints: safetensors and JSON, written aside, flushed to disk, renamed; the last two are kept.

A torn or corrupted one is found before anything of it is loaded: the manifest has every file's size and hash.

checkpoints/step_00000123/model.safetensors      weights by parameter name
                          objective.safetensors  what the objective owns beside the model, if it does
                          optimizer.safetensors  masters and states by stack
                          router.safetensors     what the router has learned, where it learns
                          state.json             everything else: step, ledgers, loader, parts
                          manifest.json          bytes and sha256 of all of these
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cggr_ray.files import allow_as, flush
from cggr_ray.learner import Learner
from cggr_ray.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

FOLDER, MANIFEST, STATE = "checkpoints", "manifest.json", "state.json"
OBJECTIVE = "objective.safetensors"
KEPT = 2
# Of what state.json holds: another one with every change of it.
FORMAT = 2

log = logging.getLogger(__name__)


def save(run_folder: Path, step: int, learner: Learner, state: dict[str, Any]) -> Path:
    """Writes a checkpoint that is whole or absent, and removes all but the last two, and what a killed process left.

    Raises:
        OSError: it cannot be written, where the disk is full for example; the others stay as they are.
    """
    final = place(run_folder, step)
    with whole(final) as aside:
        save_file(_copied(learner.adapter.named_parameters()), aside / "model.safetensors")
        save_file(_copied(learner.objective.named_parameters()), aside / OBJECTIVE)
        optimizer = {k: v.contiguous() for k, v in learner.optimizer.state_dict().items()}
        save_file(optimizer, aside / "optimizer.safetensors")
        save_file({k: v.contiguous() for k, v in learner.router.tensors().items()}, aside / "router.safetensors")
        (aside / STATE).write_text(
            json.dumps({"format": FORMAT, "step": step, "learner": learner.state_dict(), **state})
        )
        seal(aside)
    for other in set((run_folder / FOLDER).iterdir()) - set(all_of(run_folder)[-KEPT:]):
        shutil.rmtree(other)
    return final


def place(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run_folder / FOLDER / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The inverse of `place`."""
    return int(folder.name.removeprefix("step_"))


def seal(folder: Path) -> None:
    """Writes the manifest of what is in a checkpoint's folder."""
    (folder / MANIFEST).write_text(json.dumps(_fingerprints(folder), indent=1))


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


def save_heads(final: Path, named: list[tuple[str, nn.Parameter]]) -> None:
    """Writes what an objective owns beside the model, under the names that it has in a checkpoint."""
    with whole(final) as aside:
        save_file(_copied(named), aside / OBJECTIVE)


@contextmanager
def whole(final: Path) -> Iterator[Path]:
    """A folder to write into. When the body has ended well it is flushed to disk and takes the place of `final`, all of
    it with the permissions that the umask gives; else nothing is left of it.

    Raises:
        OSError: what was written in the body or here cannot be.
    """
    aside, before = (final.with_name(f".{final.name}.{word}") for word in ("partial", "before"))
    shutil.rmtree(aside, ignore_errors=True)
    _settle(final, before)
    aside.mkdir(parents=True)
    try:
        with _said_by_the_system(aside):
            yield aside
        for path in (*aside.rglob("*"), aside):
            if path.is_file():
                allow_as(aside, path)
            flush(path)
        if final.exists():
            final.rename(before)
        aside.rename(final)
        flush(final.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        _settle(final, before)


def _settle(final: Path, before: Path) -> None:
    """What stood in the place of a folder is that folder until there is another."""
    if before.exists() and not final.exists():
        before.rename(final)
    shutil.rmtree(before, ignore_errors=True)


def newest(run_folder: Path) -> tuple[Path | None, str]:
    """The newest checkpoint that is as it was written, or None; and what is wrong with newer ones, in words, if so.

    Raises:
        OSError: one cannot be read, which says nothing about what it holds.
    """
    refused: list[str] = []
    found: Path | None = None
    for folder in reversed(all_of(run_folder)):
        if (damage := find_damage(folder)) is None:
            found = folder
            break
        refused.append(f"{folder.name}: {damage}")
    if not refused:
        return found, ""
    said = f"damaged checkpoints: {'; '.join(refused)}; {f'goes on from {found.name}' if found else 'begins again'}"
    log.warning("%s: %s", run_folder.name, said)
    return found, said


def newest_of_first(run_folder: Path, workers: Workers) -> tuple[Path | None, str]:
    """What `newest` finds in worker 0, from where all go on; the words are for worker 0 alone.

    Raises:
        RuntimeError: this worker does not see what worker 0 found.
    """
    found, damage = newest(run_folder) if workers.is_first else (None, "")
    step = int(workers.first(step_of(found) if found else -1))
    found = place(run_folder, step) if step >= 0 else None
    if found is not None and not found.is_dir():
        raise RuntimeError(f"worker {workers.rank} sees no {found}; accepted: a folder that all workers share")
    return found, damage


def remove_newer(run_folder: Path, found: Path | None) -> None:
    """Removes the checkpoints that `newest` refused, so that they are not among the last two."""
    for folder in all_of(run_folder):
        if found is None or folder > found:
            shutil.rmtree(folder)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where every file is as it was written."""
    try:
        written = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError:
        written = None
    if not isinstance(written, dict):
        return f"{MANIFEST} is not a JSON object"
    found = _fingerprints(folder)
    for name, fingerprint in written.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != fingerprint:
            return f"{name} is not what was written: {found[name]} and not {fingerprint}"
    return None


def load(folder: Path, learner: Learner) -> dict[str, Any]:
    """Restores weights, optimizer and parts in place, tensor by tensor; returns the rest of the state.

    Raises:
        ValueError: another version of this project wrote it, or it holds another model.
    """
    state = read_state(folder)
    _restore(folder / "model.safetensors", learner.adapter.named_parameters())
    _restore(folder / OBJECTIVE, learner.objective.named_parameters())
    learner.optimizer.load_state_dict(_Stored(folder / "optimizer.safetensors"))
    routing = _Stored(folder / "router.safetensors")
    for name, tensor in learner.router.tensors().items():
        tensor.copy_(routing[name])
    learner.load_state_dict(state["learner"])
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json of a checkpoint holds.

    Raises:
        ValueError: another version of this project wrote it.
    """
    return parse_state((folder / STATE).read_bytes(), folder)


def parse_state(content: bytes, where: Path | str) -> dict[str, Any]:
    """The same from the content of a state.json."""
    state: dict[str, Any] = json.loads(content)
    if state.get("format") != FORMAT:
        raise ValueError(f"{where}: format = {state.get('format')}; accepted: {FORMAT}, this version's; the version "
                         "that began the run can go on, or remove its folder to begin again")  # fmt: skip
    return state


def remove_all(run_folder: Path) -> None:
    shutil.rmtree(run_folder / FOLDER, ignore_errors=True)


def _copied(named: list[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    # Parameters are views of stacks; safetensors refuses tensors that share storage, so each is copied, to where there
    # is room.
    return {name: p.detach().to("cpu", copy=True) for name, p in named}


class _Stored(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for: beside a model on a GPU there is no room for a second."""

    def __init__(self, file: Path) -> None:
        self._file = safe_open(file, "pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@torch.no_grad()
def _restore(file: Path, named: list[tuple[str, nn.Parameter]]) -> None:
    weights = _Stored(file)
    different = {(name, p.shape) for name, p in named} ^ {(name, w.shape) for name, w in weights.items()}
    if different:
        raise ValueError(f"{file} holds another {file.stem}: {sorted({name for name, _ in different})[:3]}")
    for name, parameter in named:
        parameter.copy_(weights[name])


def _fingerprints(folder: Path) -> dict[str, str]:
    """By the name of every file but the manifest, its size and its hash; files side by side, as hashing is slow."""
    files = [file for file in folder.iterdir() if file.name != MANIFEST]
    with ThreadPoolExecutor() as pool:
        return dict(zip((file.name for file in files), pool.map(fingerprint, files), strict=True))


def fingerprint(path: Path) -> str:
    """Size and hash of a file, as a manifest has them."""
    with path.open("rb") as file:
        return f"{path.stat().st_size} bytes, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


@contextmanager
def _said_by_the_system(folder: Path) -> Iterator[None]:
    """Gives what safetensors says of a write that failed the type and the number that the system has for it."""
    try:
        yield
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), str(error), str(folder)) from error
        raise


def all_of(run_folder: Path) -> list[Path]:
    """A run's checkpoints, the oldest first, whole or not; none where the run removes the folder of all meanwhile."""
    try:
        return sorted((run_folder / FOLDER).glob("step_*"))
    except FileNotFoundError:
        return []
