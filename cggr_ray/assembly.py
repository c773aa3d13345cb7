"""From a trial to its learner: scores of the reference model, the model, what is kept of layers at rest, the parts."""

from __future__ import annotations

from pathlib import Path

import torch

from cggr_ray.data.dataset import PreparedData
from cggr_ray.evaluation.reference import reference_nll
from cggr_ray.learner import Learner
from cggr_ray.models.adapter import Adapter
from cggr_ray.models.prefix_cache import PrefixCache
from cggr_ray.race import Trial
from cggr_ray.saying import Say
from cggr_ray.workers import Workers

# Beside the run's own files, while it runs: what a cache of activations does not hold on the device.
ACTIVATIONS_FILE = "activations.bin"


def build_learner(trial: Trial, data: PreparedData, device: torch.device, workers: Workers, say: Say) -> Learner:
    """The learner of a trial before its first step. ACTIVATIONS_FILE in the trial's folder is left to the caller.

    Raises:
        ValueError: the model, or the reference model, does not read the data's tokens; a cache with a tied head.
    """
    recipe, spec = trial.recipe, trial.race
    vocabulary = spec.model.vocabulary(len(data.tokenizer), data.rows_needed)
    dtype = recipe.execution.dtype(device)
    reference = None
    if recipe.reference is not None:
        where = Path(trial.data_folder)
        reference = reference_nll(recipe.reference, data, where, spec.micro_rows, device, dtype, say)
    model = spec.model.build(vocabulary, trial.seed, device, dtype)
    adapter = Adapter(model, recipe.execution.gradient_checkpointing)
    say(adapter.execution_note)
    adapter.cache = _cache(trial, adapter, data.num_positions, device, dtype)
    return Learner(recipe, adapter, trial.seed, data.num_positions, reference, workers)


def _cache(
    trial: Trial, adapter: Adapter, num_positions: int, device: torch.device, dtype: torch.dtype
) -> PrefixCache | None:
    kept = trial.recipe.execution.activation_cache
    if kept is None:
        return None
    if any(p is adapter.head_VD for p in adapter.family.input_parameters()):
        raise ValueError("activation_cache with a tied head; accepted: an embedding that rests")
    file, width = Path(trial.folder) / ACTIVATIONS_FILE, adapter.head_VD.shape[1]
    return PrefixCache(kept, num_positions, width, dtype, device, file)
