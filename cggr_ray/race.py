"""A race: what is compared, on which model and data, for how many seconds. Its trials share all of that.

A trial is one recipe x one draw of hyperparameters x one seed. `RaceSpec` is a TOML file, strict like a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from cggr_ray.batches import (
    ArmBatch,
    BatchLrRule,
    Calibrated,
    check_micro_batches,
    check_workers,
    rows_of_worker,
    with_scaled_rate,
)
from cggr_ray.codec import Plain, nearest, outside, read_toml
from cggr_ray.data.dataset import DataSpec
from cggr_ray.evaluation.suite import Evaluation
from cggr_ray.models.presets import ModelSpec
from cggr_ray.paths import arm_name, race_beside, recipe_values
from cggr_ray.progress import Budget
from cggr_ray.recipe import Recipe, load_recipe, of_recipe
from cggr_ray.remote import check_address
from cggr_ray.schema import DATA_FOLDER, RUNS_FOLDER
from cggr_ray.seeds import ACCEPTED, check_seed, is_seed

RACES = Path(__file__).with_name("races")


@runtime_checkable
class NeedsLayers(Protocol):
    """A part that reads some of the model's layers, and says how many a model has to have."""

    def needs_layers(self) -> int: ...


@dataclass(frozen=True)
class Tuning(Plain):
    """The same small sweep for every arm, before the race: each entry of `values` is one trial of each arm.

    `values` holds dotted recipe keys, the same in every entry; keys that move together stand in one entry. `seconds`
    are a trial's train seconds; `seed` is none of the race's.
    """

    seconds: float
    seed: int
    values: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"tuning.seconds = {self.seconds}; accepted: a positive number of train seconds")
        check_seed("tuning.seed", self.seed)
        if not self.values:
            raise ValueError("tuning.values = []; accepted: at least one table of recipe values")
        for number, entry in enumerate(self.values):
            if not entry or entry.keys() != self.values[0].keys():
                raise ValueError(
                    f"tuning.values[{number}] = {entry}; accepted: the same keys in every entry, at least one"
                )
            if entry in self.values[:number]:
                raise ValueError(f"tuning.values[{number}] = {entry}; accepted: no entry twice")


@dataclass(frozen=True)
class RaceSpec(Plain):
    """All that trials share.

    `values` are dotted recipe keys for every arm, `arms` for one recipe by name. `milestones` are fractions of the
    budget at which the clock stops for validation; the end is always one. `step_seconds` replaces the real clock by one
    that advances so much a step: for exact reproduction, never for comparison. `tuning` is how `arms` are found.
    `batches` holds an arm's own rows a step and a micro-batch, by recipe name, and `batch_lr_rule` what an arm whose
    rows a step are not the race's does to its learning rate; `calibration` what they were found for. `evaluation` is
    what else is asked at every milestone, where a checkpoint is written then. `workers` is how many processes train a
    trial together, each its share of every step's rows, in micro-batches of `micro_rows`: the same steps, in less time.
    `order_by_seed`: every seed reads the data in an order of its own, the same for all arms; else all seeds read one.
    `save_model` keeps a trial's final model, an ordinary one; `save_heads` what its objective trained beside it, in
    heads/objective.safetensors. `mirror` is the address of a folder that holds a copy of the race's, from which another
    machine goes on.
    """

    name: str = "race"
    recipes: tuple[str, ...] = ("baseline", "cggr_loss", "random_tokens", "fewer_rows")
    seeds: tuple[int, ...] = (0,)
    order_by_seed: bool = False
    budget_seconds: float = 30.0
    global_rows: int = 16
    micro_rows: int = 16
    workers: int = 1
    milestones: tuple[float, ...] = (0.25, 0.5, 0.75)
    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataSpec = field(default_factory=DataSpec)
    values: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    batches: dict[str, ArmBatch] = field(default_factory=dict)
    batch_lr_rule: BatchLrRule = "none"
    calibration: Calibrated | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every_seconds: float = 60.0
    save_model: bool = False
    save_heads: bool = False
    step_seconds: float | None = None
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "cggr-ray"
    tensorboard: bool = False
    mirror: str | None = None
    tuning: Tuning | None = None
    evaluation: Evaluation | None = None

    def __post_init__(self) -> None:
        Budget(self.budget_seconds)
        if Path(self.name).name != self.name:
            raise ValueError(f"name = {self.name!r}; accepted: the name of a folder, not a path")
        if not self.recipes or len(set(self.recipes)) != len(self.recipes):
            raise ValueError(f"recipes {list(self.recipes)}; accepted: at least one, none twice")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or not all(map(is_seed, self.seeds)):
            raise ValueError(f"seeds {list(self.seeds)}; accepted: at least one, none twice, {ACCEPTED}")
        if not 1 <= self.micro_rows <= self.global_rows:
            raise ValueError(f"micro_rows = {self.micro_rows}; accepted: 1 to global_rows = {self.global_rows}")
        if self.mirror is not None:
            object.__setattr__(self, "mirror", check_address(self.mirror))
        if self.workers < 1:
            raise ValueError(f"workers = {self.workers}; accepted: 1 or more")
        if self.model.pretrained is None:
            check_positions(self.data, self.model.max_positions)
        if any(not 0 < m <= 1 for m in self.milestones):
            raise ValueError(f"milestones {list(self.milestones)}; accepted: fractions of the budget in (0, 1]")
        if self.evaluation:
            self.evaluation.check_race(self.milestones, self.data.sources)
        if not 0 < self.checkpoint_every_seconds < float("inf"):
            raise ValueError(f"checkpoint_every_seconds = {self.checkpoint_every_seconds}; "
                             "accepted: a positive number of train seconds")  # fmt: skip
        if self.step_seconds is not None and not 0 < self.step_seconds < float("inf"):
            raise ValueError(f"step_seconds = {self.step_seconds}; accepted: a positive number of seconds")
        for table, name in (*(("arms", name) for name in self.arms), *(("batches", name) for name in self.batches)):
            if name not in self.recipes:
                known = [arm_name(recipe, self.recipes) for recipe in self.recipes]
                raise ValueError(f"{table}.{name}: no such recipe in the race; {nearest(name, known)}")
        for name in self.batches:
            try:
                self.rows_of(name)
            except ValueError as error:
                raise ValueError(f"batches.{name}: {error}") from None
        if self.tuning and self.tuning.seed in self.seeds:
            raise ValueError(f"tuning.seed = {self.tuning.seed}; accepted: none of the race's seeds {list(self.seeds)}")
        if self.data.tokenizer == "model":
            if self.model.pretrained is None:
                raise ValueError(f"tokenizer 'model' with preset {self.model.preset!r}, which has none; "
                                 "accepted: shipped, train, or a model with hub or folder")  # fmt: skip
            object.__setattr__(self, "data", replace(self.data, tokenizer=self.model.pretrained))

    def recipe(self, name: str) -> Recipe:
        """A recipe of the race with the race's values, then the arm's own, at the rate of the arm's batch."""
        return self.at_own_rate(name, load_recipe(name).with_values(self.changes(name)))

    def at_own_rate(self, name: str, recipe: Recipe) -> Recipe:
        """The recipe of an arm with its learning rate scaled to the arm's rows a step."""
        return with_scaled_rate(recipe, self.batch_lr_rule, self.rows_of(name)[0], self.global_rows)

    def rows_of(self, name: str) -> tuple[int, int]:
        """(global_rows, micro_rows) of an arm."""
        return self.batches.get(name, ArmBatch()).within(self.global_rows, self.micro_rows)

    def of_arm(self, name: str, seed: int) -> RaceSpec:
        """The race as a trial of an arm sees it: with the arm's rows for everybody's, and the seed's order."""
        global_rows, micro_rows = self.rows_of(name)
        data = replace(self.data, seed=self.data.seed + seed) if self.order_by_seed else self.data
        rows: dict[str, Any] = {"global_rows": global_rows, "micro_rows": micro_rows, "batches": {}}
        return replace(self, data=data, order_by_seed=False, batch_lr_rule="none", calibration=None, **rows)

    def changes(self, name: str) -> dict[str, Any]:
        """The dotted values of an arm: the race's, then its own; a part that is replaced whole before its keys. Where
        neither these nor a recipe of the user's own have a learning rate, trained weights get one of theirs."""
        arm = self.arms.get(name, {})
        chosen = any(map(sets_rate, (*self.values, *arm))) or has_own_rates(name)
        values = self.values if chosen else self.model.values | self.values
        shared = {key: value for key, value in outside(values, arm).items() if key not in arm}
        return {key: table[key] for table in (shared, arm) for key in sorted(table, key=lambda key: key.count("."))}

    def with_arms(self, arms: Mapping[str, Mapping[str, Any]]) -> RaceSpec:
        """The same race with values for some arms, on top of what these have."""
        changed = {name: {**outside(self.arms.get(name, {}), values), **values} for name, values in arms.items()}
        return replace(self, arms={**self.arms, **changed})

    def check(self) -> None:
        """Whether every recipe fits the race's model and micro-batches, from shapes alone.

        Raises:
            ValueError: a value that does not fit, also with the device, a model of another family or of too few
                layers, or a micro-batch of which a recipe cannot keep what it says.
        """
        if self.model.pretrained is not None:
            if len(self.seeds) > 1 and not self.order_by_seed:
                raise ValueError(f"seeds {list(self.seeds)} with trained weights and one order of the data, whose runs "
                                 "differ by rounding; accepted: order_by_seed = true, or one seed")  # fmt: skip
            check_positions(self.data, self.model.config_to_run().max_position_embeddings)
        for name in self.recipes:
            with of_recipe(name):
                recipe = self.recipe(name)
                recipe.execution.check_device(self.device)
                check_layers(recipe, self.model)
                if self.model.pretrained is not None:
                    check_rates(recipe)
                if recipe.execution.activation_cache and self.model.config().tie_word_embeddings:
                    raise ValueError("activation_cache with a head tied to the embedding, which goes on learning; "
                                     "accepted: model.tie_embeddings = false")  # fmt: skip
                global_rows, micro_rows = self.rows_of(name)
                check_workers(recipe, self.workers)
                own_rows = rows_of_worker(recipe.rows.rows_per_step(global_rows), self.workers)
                check_micro_batches(recipe.rows, micro_rows, own_rows)


def sets_rate(key: str) -> bool:
    """Whether a dotted recipe key sets a learning rate, or a part that has one."""
    parts = key.split(".")
    return parts[0] == "optimizer" and parts[-1] in ("optimizer", "matrix", "rest", "lr", "lr_scale")


def has_own_rates(name: str) -> bool:
    """Whether a recipe is a file with other learning rates than those for random weights."""
    return name.endswith(".toml") and rates_of(load_recipe(name)) != rates_of(Recipe("usual"))


def rates_of(recipe: Recipe) -> dict[str, float]:
    """Learning rates by their dotted keys."""
    optimizer = recipe.optimizer
    rates = {"optimizer.matrix.lr": optimizer.matrix.lr, "optimizer.rest.lr": optimizer.rest.lr}
    return {key: rate * optimizer.lr_scale for key, rate in rates.items()}


def check_rates(recipe: Recipe) -> None:
    """Raises ValueError where trained weights would learn at a rate for random ones, or above: where one of two was
    set, or a rate was taken from training from scratch."""
    usual = rates_of(Recipe("usual"))
    for key, rate in rates_of(recipe).items():
        if rate >= usual[key]:
            raise ValueError(
                f"{key} = {rate:g}, a rate for random weights, and the model's are trained; "
                f"accepted: less than {usual[key]:g}, by optimizer.lr_scale or by rates of both matrix and rest"
            )


def check_positions(data: DataSpec, most: int) -> None:
    if data.row_tokens > most:
        raise ValueError(f"row_tokens = {data.row_tokens}; accepted: at most {most} positions")


def check_layers(recipe: Recipe, model: ModelSpec) -> None:
    """Raises ValueError where a part reads more layers than the model has."""
    for part in ("rows", "tokens", "objective", "updates"):
        value = getattr(recipe, part)
        if not isinstance(value, NeedsLayers) or value.needs_layers() <= 1:
            continue
        config, needed = model.config().get_text_config(), value.needs_layers()
        layers = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layer", None)
        if layers is not None and layers < needed:
            raise ValueError(f"{part} need a model of at least {needed} layers, {model.name!r} has {layers}; "
                             f"accepted: a larger model, or {part} that read fewer layers")  # fmt: skip


@dataclass(frozen=True)
class Trial(Plain):
    """One run of a race. `data_folder` holds the prepared data, `folder` is its own."""

    trial_id: str
    recipe: Recipe
    seed: int
    race: RaceSpec
    folder: str
    data_folder: str
    values: dict[str, Any] = field(default_factory=dict)
    """The dotted keys that this trial changed in its recipe, for the record."""
    gpus_per_trial: float = 1.0
    """The part of a GPU that each of its workers has to itself; below 1 its speed is nobody's."""

    def placed(self, folder: Path, data_folder: Path) -> Trial:
        """The same trial in another folder."""
        return replace(self, folder=str(folder.resolve()), data_folder=str(data_folder.resolve()))


def load_race(name: str) -> RaceSpec:
    """A shipped race by name, or one from a TOML file; relative paths in it are relative to the file."""
    path = Path(name) if name.endswith(".toml") else RACES / f"{name}.toml"
    if not path.is_file():
        known = [p.stem for p in RACES.glob("*.toml")]
        raise ValueError(f"unknown race {name!r}; {nearest(name, known)}, or the path of a .toml file")
    try:
        return race_of(read_toml(path), path.parent, path.stem)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def race_of(table: Any, folder: Path, name: str) -> RaceSpec:
    """The race of a file's table, whose relative paths are relative to `folder`; `name` where it has none."""
    if not isinstance(table, dict):
        raise ValueError(f"race = {table!r}; accepted: a table")
    race_beside(folder, table)
    for values in recipe_values(table):
        refuse_unquoted(values)
    return RaceSpec.from_plain({"name": name} | table)


def refuse_unquoted(values: Any) -> None:
    """Raises ValueError where a table takes the place of a whole part and does not say its kind: so TOML reads dotted
    keys without quotes, and all else that the recipe says of the part would be lost."""
    for key, value in values.items() if isinstance(values, dict) else ():
        if "." not in key and isinstance(value, dict) and "kind" not in value:
            inner = next(iter(value), "KEY")
            raise ValueError(f"{key} = {value} for all of {key!r}; accepted: dotted keys in quotes, such as "
                             f'"{key}.{inner}", or a table with its kind')  # fmt: skip


def plan_trials(spec: RaceSpec, folder: Path) -> list[Trial]:
    """The trials in the order they run: all recipes of a seed together, every other seed in reverse order, so that a
    machine that drifts does not favour an arm.

    Raises:
        ValueError: an unknown recipe, a value that does not fit it, or two recipes of one name.
    """
    trials: list[Trial] = []
    for number, seed in enumerate(spec.seeds):
        names = spec.recipes if number % 2 == 0 else spec.recipes[::-1]
        for name in names:
            trials.append(plan_trial(spec, name, seed, f"s{seed}", folder))
    refuse_doubles(trials)
    return trials


def plan_trial(spec: RaceSpec, name: str, seed: int, number: str, folder: Path) -> Trial:
    """The trial of a recipe of the race; its id is the recipe's name and `number`."""
    recipe, values = spec.recipe(name), spec.changes(name)
    if spec.rows_of(name)[0] != spec.global_rows and spec.batch_lr_rule != "none":
        values["optimizer.lr_scale"] = recipe.optimizer.lr_scale
    trial_id = f"{recipe.name.replace('/', '-')}-{number}"
    where, data = (folder / RUNS_FOLDER / trial_id).resolve(), (folder / DATA_FOLDER).resolve()
    return Trial(trial_id, recipe, seed, spec.of_arm(name, seed), str(where), str(data), values)


def refuse_doubles(trials: Sequence[Trial]) -> None:
    """Raises ValueError where two trials would share an id and a folder."""
    seen: set[str] = set()
    for trial in trials:
        if trial.trial_id in seen:
            raise ValueError(f"two trials {trial.trial_id!r}; accepted: recipes with a name of their own")
        seen.add(trial.trial_id)
