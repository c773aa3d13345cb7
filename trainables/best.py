"""What a sweep leads to: its best trials, the best recipe as a file, and a race of it against what it started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tomli_w

from cggr_ray.codec import to_toml
from cggr_ray.files import write_whole
from cggr_ray.recipe import Recipe, load_recipe
from cggr_ray.schema import BEST_FOLDER, VAL_LOSS
from trainables.algorithms import text_of
from trainables.history import Drawn
from trainables.settings import SweepSpec


def best_trials(trials: Sequence[Drawn], most: int = 5) -> list[Drawn]:
    """Those with the lowest validation loss, of trials that used their whole budget; the first of equals first."""
    losses = {trial.trial_id: (trial.end or {}).get(VAL_LOSS) for trial in trials if trial.status == "finished"}
    found = [trial for trial in trials if losses.get(trial.trial_id) is not None]
    return sorted(found, key=lambda trial: (losses[trial.trial_id], trial.number))[:most]


def best_recipe(spec: SweepSpec, best: Drawn) -> Recipe:
    """The recipe of a trial, under a name of its own; at the rate of the race's rows a step."""
    recipe = load_recipe(spec.recipe).with_values(spec.race.with_arms({spec.recipe: best.values}).changes(spec.recipe))
    end = best.end or {}
    text = f"{recipe.name} with {text_of(best.values)}: val/loss {end[VAL_LOSS]:.4f}, the best of {spec.space}"
    return replace(recipe, name=f"{recipe.name.replace('/', '-')}-best", description=text)


def write_best(spec: SweepSpec, best: Drawn, folder: Path) -> tuple[Path, Path]:
    """Writes best/<recipe>.toml, and best/race.toml: what the sweep started from, and the best, on the sweep's model
    and data. With trained weights every seed has an order of the data, as it would else differ by rounding alone.
    Returns both paths."""
    recipe = best_recipe(spec, best)
    file = (folder / BEST_FOLDER / f"{recipe.name.removesuffix('-best')}.toml").resolve()
    file.parent.mkdir(exist_ok=True)
    write_whole(file, tomli_w.dumps(recipe.to_plain()))
    # By its name beside, so that both can be copied elsewhere.
    race, name, own = spec.race, file.name, spec.race.recipes[0]
    # The race's values are for all its arms, and would be set again on top of the recipe.
    arms = race.arms | {name: race.with_arms({own: best.values}).changes(own)}
    batches = race.batches | ({name: race.batches[own]} if own in race.batches else {})
    beside = file.parent / "race.toml"
    by_seed = race.order_by_seed or race.model.pretrained is not None
    # Its mirror is the sweep's.
    compared = replace(
        race,
        name=f"{race.name}-best",
        recipes=(own, name),
        arms=arms,
        batches=batches,
        order_by_seed=by_seed,
        mirror=None,
    )
    write_whole(beside, tomli_w.dumps(to_toml(compared.to_plain())))
    return file, beside
