"""What a reference model loses at every training position: the second term of the score `excess` (arXiv 2404.07965).

    l_ref(t) = -log p_ref(y_t | the piece of t's document up to t)      pieces as training packs them

Computed once for a data set and a reference model, then read. In the folder of the prepared data:

    reference-<fingerprint>.npy    float16 by position id; NaN where nothing is predicted: the last token of a document

float16 rounds a loss by less than one part in two thousand, and halves what the table takes of the device's memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cggr_ray.codec import to_plain
from cggr_ray.data.dataset import PreparedData
from cggr_ray.data.loader import micro_batches
from cggr_ray.data.packing import BLOCK_ROWS, PackedRow, Piece, RowShape, best_fit, cut, fill_row
from cggr_ray.kernels.selected_ce.op import position_nll
from cggr_ray.models.adapter import Adapter
from cggr_ray.models.presets import ModelSpec, check_folder
from cggr_ray.saying import Say, silent

# How often progress is said.
TIMES_SAID = 10


def check_reference(folder: str, data: PreparedData) -> None:
    """Whether a reference model can score the rows of a data set, from its folder's JSON alone.

    Raises:
        ValueError: no such model, one of another family, or one that does not read the data's tokens or has fewer
            positions than its rows.
    """
    check_folder(Path(folder))
    config, needed = ModelSpec(folder=folder).config_to_run(), len(data.tokenizer)
    if config.vocab_size < needed and config.vocab_size < data.rows_needed():
        raise ValueError(f"reference {folder!r} has a vocabulary of {config.vocab_size}; "
                         f"accepted: at least the {needed} tokens of the data's tokenizer")  # fmt: skip
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and longest < data.spec.row_tokens:
        raise ValueError(f"reference {folder!r} has {longest} positions; "
                         f"accepted: at least row_tokens = {data.spec.row_tokens}")  # fmt: skip
    other = _first_difference(Path(folder) / "tokenizer.json", data)
    if other is not None:
        raise ValueError(f"reference {folder!r} has another id for the token {other!r} in its tokenizer.json; "
                         "accepted: a model with the data's tokenizer")  # fmt: skip


def _first_difference(file: Path, data: PreparedData) -> str | None:
    """A token of the data that has another id, or none, in a model's own tokenizer, where its folder holds one."""
    from transformers import PreTrainedTokenizerFast

    if not file.is_file():
        return None
    own, added = PreTrainedTokenizerFast(tokenizer_file=str(file)).get_vocab(), data.tokenizer.get_added_vocab()
    mine = data.tokenizer.get_vocab().items()
    return next((token for token, number in mine if token not in added and own.get(token) != number), None)


def reference_nll(
    folder: str,
    data: PreparedData,
    where: Path,
    micro_rows: int,
    device: torch.device,
    dtype: torch.dtype,
    say: Say = silent,
) -> Tensor:
    """float16 on `device`, by position id; one entry more, NaN, for padding. Read from `where`, or computed and kept.

    Trials side by side may compute it at the same time: each writes a file of its own and renames it.

    Raises:
        ValueError: what `check_reference` refuses, or a loss that is not finite.
    """
    check_reference(folder, data)
    path = where / f"reference-{fingerprint(folder, data, dtype)}.npy"
    if not path.is_file():
        say(f"scoring {data.num_positions:,} positions with the reference model {folder}")
        model = ModelSpec(folder=folder).build(None, 0, device, dtype)
        computed = compute(Adapter(model.requires_grad_(False)), data, micro_rows, say)
        _write(path, computed[:-1].cpu().numpy())
        return computed
    say(f"reading {path.name}: what the reference model {folder} loses")
    values = np.load(path, allow_pickle=False)
    if values.shape != (data.num_positions,) or values.dtype != np.float16:
        raise ValueError(f"{path} holds {values.dtype} {values.shape}; accepted: what this run wrote, delete the file")
    return torch.from_numpy(np.append(values, np.float16(np.nan))).to(device)


def fingerprint(folder: str, data: PreparedData, dtype: torch.dtype) -> str:
    """Of everything that the losses depend on: the model's files, the data's specification, in whatever order they are
    read, and where documents lie."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(f for f in Path(folder).iterdir() if f.name.endswith((".safetensors", ".json"))):
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "blake2b").digest())
    digest.update(json.dumps([to_plain(replace(data.spec, seed=0)), str(dtype)], sort_keys=True).encode())
    for store in data.train:
        digest.update(hashlib.blake2b(store.offsets.tobytes()).digest())
    return digest.hexdigest()


@torch.no_grad()
def compute(adapter: Adapter, data: PreparedData, micro_rows: int, say: Say = silent) -> Tensor:
    """The table of a model, from one full forward of every row."""
    device, shape = adapter.device, data.order().shape
    count, predicted = data.num_positions, sum(int((store.lengths - 1).sum()) for store in data.train)
    table = torch.full((count + 1,), torch.nan, dtype=torch.float16, device=device)
    rows, done, said = all_rows(data, shape), 0, 0
    while group := list(islice(rows, micro_rows)):
        done += sum(row.real for row in group)
        group += [fill_row([], data.train, shape)] * (micro_rows - len(group))
        micro = micro_batches(group, micro_rows, shape, device)[0]
        stream = adapter.forward(micro)
        nll = position_nll(stream.hidden_RD, stream.head_VD, micro.labels_BT.flatten())
        ids = micro.position_ids_BT.flatten()
        table.index_copy_(0, torch.where(ids < 0, count, ids), nll.half())
        if done * TIMES_SAID // predicted > said:
            said = done * TIMES_SAID // predicted
            say(f"reference model: {done / predicted:.0%} of the positions")
    table[count] = torch.nan
    finite = int(table.isfinite().sum())
    if finite != predicted:
        raise ValueError(f"the reference model's loss is not finite at {predicted - finite} of {predicted} positions; "
                         "accepted: a trained model, in a precision that it can run in")  # fmt: skip
    return table


def all_rows(data: PreparedData, shape: RowShape) -> Iterator[PackedRow]:
    """Rows that hold every training document once, prompts labelled too, in their stored order but for best fit."""
    pieces: list[Piece] = []
    room = BLOCK_ROWS * shape.positions
    for number, store in enumerate(data.train):
        for document in range(store.documents):
            pieces += (new := cut(store, number, document, shape.positions, mask_prompt=False))
            room -= sum(piece.positions for piece in new)
            if room <= 0:
                yield from _packed(pieces, data, shape)
                pieces, room = [], BLOCK_ROWS * shape.positions
    yield from _packed(pieces, data, shape)


def _packed(pieces: list[Piece], data: PreparedData, shape: RowShape) -> Iterator[PackedRow]:
    for chosen in best_fit([piece.positions for piece in pieces], shape.positions, shape.most_documents):
        yield fill_row([pieces[i] for i in chosen], data.train, shape)


def _write(path: Path, values: np.ndarray) -> None:
    """Whole or absent: written aside under a name of its own, flushed to disk, renamed."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with aside.open("wb") as file:
            np.save(file, values, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
