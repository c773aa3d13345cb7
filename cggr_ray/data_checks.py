"""Whether prepared data fit what reads them: models, reference models, tasks, and what recipes keep of activations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from cggr_ray.data.dataset import open_data
from cggr_ray.evaluation.reference import check_reference
from cggr_ray.race import RaceSpec
from cggr_ray.recipe import Recipe


def check_tokens(spec: RaceSpec, recipes: Iterable[Recipe], data_folder: Path) -> None:
    """Whether the model, and the reference models that recipes name, read the tokens of the prepared data, and have the
    positions that an evaluation asks for; and whether what recipes keep of activations holds all positions."""
    recipes = list(recipes)
    check_caches(spec, recipes, data_folder)
    references = {recipe.reference for recipe in recipes if recipe.reference is not None}
    if not references and spec.evaluation is None and spec.model.pretrained is None and spec.model.vocab_size is None:
        return
    data = open_data(spec.data, data_folder)
    vocabulary = spec.model.vocabulary(len(data.tokenizer), data.rows_needed)
    for reference in sorted(references):
        check_reference(reference, data)
    if spec.evaluation is not None:
        spec.evaluation.asked(data.tokenizer, spec.model.config(vocabulary))


def check_caches(spec: RaceSpec, recipes: Sequence[Recipe], data_folder: Path) -> None:
    """Whether what recipes keep of activations holds all positions; where the device is not known here, in the smaller
    of the dtypes that it may come to."""
    devices = [torch.device(name) for name in (("cpu", "cuda") if spec.device == "auto" else (spec.device,))]
    for recipe in recipes:
        if (cache := recipe.execution.activation_cache) is not None:
            width = spec.model.config().get_text_config().hidden_size
            row = width * min(recipe.execution.dtype(device).itemsize for device in devices)
            cache.shares(open_data(spec.data, data_folder).num_positions, row)
