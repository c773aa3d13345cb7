"""Recipe: five typed parts and an execution. What a run does, in one immutable value, as TOML and JSON both ways.

rows        which sequences enter the forward?
tokens      which positions carry a gradient, with what weight?
objective   what is minimised?
optimizer   how does a gradient become an update?
updates     which layers learn this step?
execution   how it runs; recorded, and never branched on by a method
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from cggr_ray.codec import Plain, kind_of, nearest, read_toml, with_values
from cggr_ray.models.attention import check_dtype
from cggr_ray.models.checkpointing import Checkpointing
from cggr_ray.models.prefix_cache import ActivationCache
from cggr_ray.models.presets import check_folder
from cggr_ray.objectives.multi_token import MultiToken
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.optimizer import Optimizer
from cggr_ray.paths import beside, own_name
from cggr_ray.routing.buckets import DepthBuckets
from cggr_ray.routing.collider import Collider
from cggr_ray.routing.rows import AllRows, FewerRows, HardestRows, RandomRows
from cggr_ray.routing.scorers import TruncatedRouter
from cggr_ray.routing.tokens import AllTokens, RandomTokens, SelectedTokens, SkippedTokens
from cggr_ray.routing.trained_scorers import Probe, TunedLens
from cggr_ray.updates.dynamic import DynamicSuffix
from cggr_ray.updates.fixed import FullUpdate, StaticSuffix
from cggr_ray.updates.random import RandomBlocks, RandomSuffix
from cggr_ray.updates.relevance import WHOLE_GRADIENT

RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class Execution:
    """How a step runs: precision, gradient checkpointing, batches that the loader has ready, CUDA graphs, a cache.

    `precision`: `auto` is bf16 with float32 masters on a GPU and float32 elsewhere.
    `gradient_checkpointing`: see `models.checkpointing`. `cuda_graphs`: on a GPU, forward and backward of a micro-batch
    are one launch; for small models. `prefetch`: batches that the loader's thread has packed and copied ahead.
    `activation_cache`: keeps what layers at rest compute from one epoch to the next, see `models.prefix_cache`; a run
    with it resumes exactly but for rounding, as it begins with nothing kept. `deterministic`: torch takes
    its deterministic algorithms while the run lasts, and raises where it has none. A CPU repeats a run anyway; an H100
    does with it, to the bit, also what was stopped and goes on. What that costs is not measured yet.
    """

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: Checkpointing = "none"
    cuda_graphs: bool = False
    prefetch: int = 3
    activation_cache: ActivationCache | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.prefetch < 1:
            raise ValueError(f"prefetch = {self.prefetch}; accepted: at least 1 batch")

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of weights and activations on `device`."""
        bf16 = self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")
        return torch.bfloat16 if bf16 else torch.float32

    def check_device(self, kind: str) -> None:
        """Raises ValueError where it cannot run on a device of this kind; `auto` is any."""
        if self.precision == "fp32":
            check_dtype(kind, torch.float32)


@dataclass(frozen=True)
class Recipe(Plain):
    """A way to train. Every part has a neutral default, so `Recipe(name)` is the baseline."""

    name: str
    description: str = ""
    rows: AllRows | FewerRows | HardestRows | RandomRows = field(default_factory=AllRows)
    tokens: AllTokens | SelectedTokens | RandomTokens | SkippedTokens | DepthBuckets | Collider = field(
        default_factory=AllTokens
    )
    objective: NextToken | MultiToken = field(default_factory=NextToken)
    optimizer: Optimizer = field(default_factory=Optimizer)
    updates: FullUpdate | StaticSuffix | DynamicSuffix | RandomBlocks | RandomSuffix = field(default_factory=FullUpdate)
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        if self.reference is not None:
            check_folder(Path(self.reference))
        if self.execution.cuda_graphs and self.optimizer.project_early:
            raise ValueError("cuda_graphs with project_early, whose backward pass does more than leave gradients; "
                             "accepted: one of the two")  # fmt: skip
        if not isinstance(self.updates, FullUpdate):
            self._check_resting(self.updates)
        if self.execution.activation_cache is not None:
            self._check_cache()
        if not (self.objective.runs_on_kept_rows() or self.tokens.runs_all_positions()):
            raise ValueError(f"{self.objective} reads all positions, and {self.tokens} leaves some out; accepted: "
                             "all_tokens, plan 'dense', skipped_tokens with exit of at least 1, depth_buckets with "
                             "engine 'every' or 'faithful'")  # fmt: skip

    def _check_cache(self) -> None:
        """Whether what layers at rest compute can be kept."""
        if not isinstance(self.updates, StaticSuffix | DynamicSuffix):
            raise ValueError(f"activation_cache with updates {kind_of(type(self.updates))!r}; accepted: static_suffix, "
                             "dynamic_suffix, whose lower layers rest for long")  # fmt: skip
        if not isinstance(self.rows, AllRows | FewerRows) or isinstance(self.tokens, SkippedTokens):
            kinds = kind_of(type(self.rows)), kind_of(type(self.tokens))
            raise ValueError(f"activation_cache with rows and tokens {kinds}; accepted: all_rows or fewer_rows, which "
                             "the host knows, and no skipped_tokens")  # fmt: skip
        early = TruncatedRouter | Probe | TunedLens
        if isinstance(self.tokens, SelectedTokens) and isinstance(self.tokens.router, early):
            raise ValueError("activation_cache with a router that reads the first layers; accepted: own_scores, "
                             "stale_scores or chance")  # fmt: skip
        if self.execution.cuda_graphs:
            raise ValueError("activation_cache with cuda_graphs; accepted: one of the two")

    def _check_resting(self, updates: object) -> None:
        """Whether layers can rest beside the other parts."""
        kind, matrix = kind_of(type(updates)), self.optimizer.matrix
        if isinstance(self.tokens, DepthBuckets):
            raise ValueError(f"updates {kind!r} with tokens 'depth_buckets'; accepted: one of the two chooses layers")
        if isinstance(matrix, GaLore) and matrix.full_rank:
            raise ValueError(f"updates {kind!r} with full_rank = {matrix.full_rank}; accepted: one of the two, a layer "
                             "that rests could be drawn")  # fmt: skip
        relevance = getattr(updates, "relevance", None)
        if isinstance(matrix, GaLore) and relevance in WHOLE_GRADIENT:
            raise ValueError(f"relevance = {relevance!r} with GaLore, whose gradients are projected; "
                             "accepted: gradient_norm, fisher")  # fmt: skip
        if isinstance(updates, RandomBlocks) and self.execution.cuda_graphs:
            raise ValueError("updates 'random_blocks' with cuda_graphs; accepted: without, as there are too many draws "
                             "to capture each before the race")  # fmt: skip

    @property
    def reference(self) -> str | None:
        """The folder of the reference model that the scores need, if they need one."""
        return self.tokens.reference if isinstance(self.tokens, SelectedTokens) else None

    def with_values(self, values: Mapping[str, Any]) -> Recipe:
        """A copy with dotted keys replaced, for example `{"tokens.keep": 0.5, "optimizer.matrix.lr": 1e-3}`."""
        recipe: Recipe = with_values(self, values)
        return recipe

    def is_that_of(self, record: Mapping[str, Any]) -> bool:
        """Whether a record, of an older version with fewer settings perhaps, has this recipe, in whatever words."""
        return replace(Recipe.from_plain(record), description=self.description) == self


def recipe_names() -> list[str]:
    """All shipped recipes, the baseline first."""
    names = {str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.toml")}
    return ["baseline", *sorted(names - {"baseline"})]


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or one from a TOML file by path; a model path in it is relative to the file.

    Raises:
        ValueError: unknown name, or a file that does not parse; with the file and what is accepted.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        raise ValueError(f"unknown recipe {name!r}; {nearest(name, recipe_names())}, or the path of a .toml file")
    try:
        table = read_toml(path)
        beside(path.parent, table.get("tokens"), "reference")
        return Recipe.from_plain({"name": own_name(name)} | table)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def explain(recipe: Recipe) -> list[tuple[str, str, str]]:
    """(part, kind, first line of its documentation) for every part and the parts inside it, then for the execution, for
    `recipe show`."""
    parts = ("rows", "tokens", "objective", "optimizer", "updates")
    lines = [line for part in parts for line in _lines(recipe, part)]
    cache = _lines(recipe.execution, "activation_cache", "execution")
    return [*lines, _own("execution", recipe.execution), *cache]


def _lines(owner: Any, part: str, name: str = "") -> list[tuple[str, str, str]]:
    value = getattr(owner, part)
    if not hasattr(type(value), "IS_PART"):
        return []
    name = f"{name}.{part}" if name else part
    return [_own(name, value), *(line for field in fields(value) for line in _lines(value, field.name, name))]


def _own(name: str, value: object) -> tuple[str, str, str]:
    return name, kind_of(type(value)), (type(value).__doc__ or "").split("\n")[0]


@contextmanager
def of_recipe(name: str) -> Iterator[None]:
    """Inside, a ValueError says of which recipe it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"recipe {name!r}: {error}") from None
