"""Ways to train a language model in less time, each for real, and the race that compares them fairly.

Public names resolve on first use, so that `import cggr_ray.schema` needs nothing but the standard library.
"""

from importlib import import_module

_PUBLIC = {
    "CGGRLoss": "cggr_ray.api",
    "CGGRModel": "cggr_ray.api",
    "CGGRScorer": "cggr_ray.api",
    "CGGRWrapper": "cggr_ray.api",
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
