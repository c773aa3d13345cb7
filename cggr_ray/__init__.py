"""Ways to train a language model in less time, each for real, and the race that compares them fairly.

Public names resolve on first use, so that `import cggr_ray.schema` needs nothing but the standard library.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cggr_ray.api import CGGRLoss as CGGRLoss
    from cggr_ray.api import CGGRModel as CGGRModel
    from cggr_ray.api import CGGRScorer as CGGRScorer
    from cggr_ray.api import CGGRWrapper as CGGRWrapper
    from cggr_ray.api import MatrixOptimizer as MatrixOptimizer
    from cggr_ray.api import create_truncated_router as create_truncated_router
    from cggr_ray.loop import run_race as run_race
    from cggr_ray.optim.adamw import AdamW as AdamW
    from cggr_ray.optim.galore import GaLore as GaLore
    from cggr_ray.optim.muon import Muon as Muon
    from cggr_ray.optim.state_formats import BFloat16 as BFloat16
    from cggr_ray.optim.state_formats import Int8Blockwise as Int8Blockwise
    from cggr_ray.race import RaceSpec as RaceSpec
    from cggr_ray.race import load_race as load_race
    from cggr_ray.race import plan_trials as plan_trials
    from cggr_ray.recipe import Recipe as Recipe
    from cggr_ray.recipe import load_recipe as load_recipe

_PUBLIC = {
    "AdamW": "cggr_ray.optim.adamw",
    "BFloat16": "cggr_ray.optim.state_formats",
    "CGGRLoss": "cggr_ray.api",
    "CGGRModel": "cggr_ray.api",
    "CGGRScorer": "cggr_ray.api",
    "CGGRWrapper": "cggr_ray.api",
    "GaLore": "cggr_ray.optim.galore",
    "Int8Blockwise": "cggr_ray.optim.state_formats",
    "MatrixOptimizer": "cggr_ray.api",
    "Muon": "cggr_ray.optim.muon",
    "RaceSpec": "cggr_ray.race",
    "Recipe": "cggr_ray.recipe",
    "create_truncated_router": "cggr_ray.api",
    "load_race": "cggr_ray.race",
    "load_recipe": "cggr_ray.recipe",
    "plan_trials": "cggr_ray.race",
    "run_race": "cggr_ray.loop",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cggr_ray' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
