"""The tuning of a race: what is refused, what runs in which order, what is best, and the file that a race takes."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cggr_ray import cli
from cggr_ray.data.sources import Jsonl
from cggr_ray.race import RaceSpec, Trial, Tuning, load_race
from cggr_ray.schema import SUMMARY_FILE, VAL_LOSS
from cggr_ray.tried import at_the_edge
from cggr_ray.tuning import best_rows, notes, plan_tuning, tuning_rows, write_tuned

MATRIX, REST = "optimizer.matrix.lr", "optimizer.rest.lr"
LOW, MIDDLE, HIGH = ({MATRIX: lr, REST: lr / 2} for lr in (1e-3, 4e-3, 1.6e-2))
TUNING = Tuning(seconds=2.0, seed=1000, values=(LOW, MIDDLE, HIGH))
RACE = """
recipes = ["baseline", "cggr_loss"]
budget_seconds = 9
global_rows = 2
micro_rows = 2
device = "cpu"
data.row_tokens = 64
data.val_documents = 5
data.sources = [{ kind = "jsonl", path = "../texts/train.jsonl" }]
values."optimizer.schedule.warmup_tokens" = 1000
arms.cggr_loss."tokens.keep" = 0.5

[tuning]
seconds = 2
seed = 1000
values = [
    { "optimizer.matrix.lr" = 0.001, "optimizer.rest.lr" = 0.0005 },
    { "optimizer.matrix.lr" = 0.004, "optimizer.rest.lr" = 0.002 },
    { "optimizer.matrix.lr" = 0.016, "optimizer.rest.lr" = 0.008 },
]
"""


@pytest.fixture
def race_file(tmp_path: Path) -> Path:
    """A race in a folder of its own, its data beside it."""
    (tmp_path / "texts").mkdir()
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(300)]
    (tmp_path / "texts" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "races").mkdir()
    (tmp_path / "races" / "mine.toml").write_text(RACE)
    return tmp_path / "races" / "mine.toml"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": 0}, r"tuning\.seconds = 0\.0; accepted: a positive"),
        ({"seconds": math.nan}, r"tuning\.seconds = nan; accepted"),
        ({"seed": -1}, r"tuning\.seed = -1; accepted: from 0"),
        ({"seed": 1}, r"tuning\.seed = 1; accepted: none of the race's seeds \[0, 1\]"),
        ({"values": []}, r"tuning\.values = \[\]; accepted: at least one"),
        ({"values": [{}]}, r"tuning\.values\[0\] = \{\}; accepted"),
        ({"values": [LOW, HIGH, LOW]}, r"tuning\.values\[2\] = .*; accepted: no entry twice"),
        ({"values": [LOW, {MATRIX: 1.0}]}, r"tuning\.values\[1\] = .*; accepted: the same keys in every entry"),
        ({"values": {MATRIX: [1.0]}}, r"tuning\.values = .*; accepted: a list"),
        ({"grid": {}}, r"unknown key 'tuning\.grid'"),
    ],
)
def test_an_impossible_tuning_says_what_is_accepted(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        RaceSpec.from_plain({"seeds": [0, 1], "tuning": TUNING.to_plain() | change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens.keep": 0.5}, r"tuning\.values\[0\]: recipe 'baseline': unknown key 'tokens\.keep'"),
        ({MATRIX: "fast"}, r"tuning\.values\[0\]: recipe 'baseline': optimizer\.matrix\.lr = 'fast'; accepted: float"),
        ({"tokens": "skipped_tokens"}, r"tuning\.values\[0\]: recipe 'baseline': tokens need .* at least 5 layers"),
    ],
)
def test_values_that_do_not_fit_a_recipe_name_it(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plan_tuning(RaceSpec(tuning=Tuning(2.0, 1000, (values,))), tmp_path)


def test_trials_run_entry_by_entry_with_all_recipes(tmp_path: Path) -> None:
    spec = RaceSpec(
        recipes=("baseline", "cggr_loss"),
        values={MATRIX: 0.5, "optimizer.clip_norm": 2.0},
        arms={"cggr_loss": {"tokens.keep": 0.5}},
        save_model=True,
        tuning=TUNING,
    )
    trials = plan_tuning(spec, tmp_path)
    assert [t.trial_id for t in trials] == [
        *("baseline-1", "cggr_loss-1"),
        *("baseline-2", "cggr_loss-2"),
        *("baseline-3", "cggr_loss-3"),
    ]
    assert [t.recipe.optimizer.matrix.lr for t in trials] == [1e-3, 1e-3, 4e-3, 4e-3, 1.6e-2, 1.6e-2]
    assert all(t.recipe.optimizer.rest.lr == t.recipe.optimizer.matrix.lr / 2 for t in trials)
    assert trials[3].values == {"optimizer.clip_norm": 2.0, "tokens.keep": 0.5, **MIDDLE}
    assert {(t.seed, t.race.seeds, t.race.budget_seconds, t.race.milestones) for t in trials} == {
        (1000, (1000,), 2.0, ())
    }
    assert all(t.race.tuning is None and not t.race.save_model and t.race.model == spec.model for t in trials)
    assert Trial.from_plain(json.loads(json.dumps(trials[0].to_plain()))) == trials[0]


def test_a_short_trial_warms_up_for_the_part_that_the_race_does(tmp_path: Path) -> None:
    warmup = "optimizer.schedule.warmup_tokens"
    spec = RaceSpec(
        recipes=("baseline", "cggr_loss"), budget_seconds=16.0, values={warmup: 1000}, arms={"cggr_loss": {warmup: 80}},
        tuning=TUNING,
    )  # fmt: skip
    trials = plan_tuning(spec, tmp_path)
    assert [t.recipe.optimizer.schedule.warmup_tokens for t in trials] == [125, 10] * 3
    rows = tuning_rows(spec, trials)
    assert all(row["values"] in spec.tuning.values for row in rows if spec.tuning)


def test_a_race_without_a_tuning_has_no_trials_of_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"race 'race' has no \[tuning\]; accepted"):
        plan_tuning(RaceSpec(), tmp_path)


def row(
    recipe: str, loss: float | None, status: str = "finished", values: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"trial_id": f"{recipe}-0", "recipe": recipe, "values": values or {}, "status": status, VAL_LOSS: loss}


def test_the_best_is_the_lowest_finite_loss_of_what_finished() -> None:
    first, second = row("a", 2.0), row("a", 2.0)
    lost = [
        row("a", math.nan),
        row("a", None),
        row("a", -math.inf),
        row("a", 1.0, "diverged"),
        row("a", None, "failed"),
    ]
    assert best_rows([*lost, row("a", 3.0), first, second])["a"] is first
    assert best_rows(lost) == {}
    assert best_rows([row("b", 3.0), row("a", 9.0)]).keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("values", "edges"),
    [
        (LOW, {MATRIX: "smallest", REST: "smallest"}),
        (MIDDLE, {}),
        (HIGH, {MATRIX: "largest", REST: "largest"}),
    ],
)
def test_the_edge_of_what_was_tried(values: dict[str, Any], edges: dict[str, str]) -> None:
    assert at_the_edge(values, TUNING.values) == edges


def test_one_value_words_and_flags_have_no_edge() -> None:
    both = {"optimizer.clip_norm": 1.0, "execution.gradient_checkpointing": "block", "tokens.detach": "const"}
    tuning = Tuning(1.0, 9, (both | {MATRIX: 1}, both | {MATRIX: 2, "tokens.detach": "live"}))
    assert at_the_edge(tuning.values[1], tuning.values) == {MATRIX: "largest"}
    (line, edge) = notes(tuning, {"a": row("a", 2.0, values={MATRIX: 2})})
    assert (
        "2.0000" in line
        and edge == f"a: {MATRIX} = 2 is at the edge, the largest value tried: the optimum may lie beyond"
    )


def test_a_tuned_race_is_read_back_as_the_race_with_its_best_values(race_file: Path, tmp_path: Path) -> None:
    spec = load_race(str(race_file))
    out = tmp_path / "elsewhere" / "tuned.toml"
    out.parent.mkdir()
    rows = [row("baseline", 2.0, values=MIDDLE), row("cggr_loss", 3.0, values=HIGH), row("cggr_loss", None, "diverged")]
    write_tuned(spec, rows, out)
    tuned = load_race(str(out))
    assert tuned == spec.with_arms({"baseline": MIDDLE, "cggr_loss": HIGH})
    assert tuned.arms == {"baseline": MIDDLE, "cggr_loss": {"tokens.keep": 0.5, **HIGH}}
    (source,) = tuned.data.sources
    assert isinstance(source, Jsonl) and source.path == str((tmp_path / "texts" / "train.jsonl").resolve())
    tuned.data.check()
    comments = [line for line in out.read_text().splitlines() if line.startswith("# ")]
    assert any("3 trials of 2 train seconds for every arm, seed 1000" in line for line in comments)
    assert [line.split(":")[0] for line in comments if "at the edge" in line] == ["# cggr_loss", "# cggr_loss"]
    assert comments[-1] == "# cggr_loss-0: diverged"


def test_arms_of_one_name_are_told_apart() -> None:
    """As in the race that a sweep writes: a shipped recipe, and a file that is called as it is."""
    recipes = ("cggr_loss", "/best/cggr_loss.toml", "/mine/own.toml")
    lines = notes(Tuning(1.0, 9, ({MATRIX: 1},)), {name: row(name, 2.0, values={MATRIX: 1}) for name in recipes})
    assert [line.split(":")[0] for line in lines] == ["cggr_loss", "/best/cggr_loss.toml", "own"]


def test_a_reference_among_the_values_is_relative_to_the_file(tmp_path: Path) -> None:
    text = '[tuning]\nseconds = 1\nseed = 9\nvalues = [{ "tokens.reference" = "models/r" }]\n'
    (tmp_path / "mine.toml").write_text(text)
    tuning = load_race(str(tmp_path / "mine.toml")).tuning
    assert tuning and tuning.values == ({"tokens.reference": str((tmp_path / "models" / "r").resolve())},)


def test_a_part_that_is_replaced_whole_keeps_the_values_inside_it(tmp_path: Path) -> None:
    values = {MATRIX: 0.5, "optimizer.matrix": {"kind": "adamw"}}
    tuning = Tuning(1.0, 9, (values,))
    spec = RaceSpec(recipes=("baseline",), budget_seconds=1.0, values={MATRIX: 0.1}, tuning=tuning)
    (trial,) = plan_tuning(spec, tmp_path)
    write_tuned(spec, [row("baseline", 1.0, values=values)], tmp_path / "tuned.toml")
    assert load_race(str(tmp_path / "tuned.toml")).recipe("baseline") == trial.recipe
    assert (type(trial.recipe.optimizer.matrix).__name__, trial.recipe.optimizer.matrix.lr) == ("AdamW", 0.5)


class Runs:
    """Stands in for Ray: writes the summary of every trial but those that are to fail, and remembers what it ran."""

    def __init__(self, losses: dict[str, float | None], fail: Sequence[str] = ()) -> None:
        self.losses, self.fail = losses, fail
        self.ran: list[str] = []

    def __call__(
        self, trials: Sequence[Trial], folder: Path, executor: str, address: str | None, on_row: Any
    ) -> list[str]:
        for trial in trials:
            self.ran.append(trial.trial_id)
            if trial.trial_id in self.fail:
                continue
            loss = self.losses.get(trial.trial_id, 5.0)
            summary = {"status": "finished", VAL_LOSS: loss, "train_seconds": 2.0, "tokens_seen": 640}
            Path(trial.folder).mkdir(parents=True)
            (Path(trial.folder) / SUMMARY_FILE).write_text(json.dumps(summary))
        return [trial_id for trial_id in self.fail if trial_id in self.ran]


def tune(monkeypatch: pytest.MonkeyPatch, runs: Runs, *arguments: object) -> tuple[int, str]:
    """Exit code and output of the command with `runs` in Ray's place."""
    monkeypatch.setattr("trainables.driver.run_trials", runs)
    done = CliRunner().invoke(cli.app, ["tune", *map(str, arguments)])
    return done.exit_code, done.output


def test_tune_writes_rows_and_a_race_that_can_be_run(
    race_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs, out = Runs({"baseline-2": 1.5, "cggr_loss-3": 1.25, "cggr_loss-2": None}), tmp_path / "out"
    code, said = tune(monkeypatch, runs, "races/mine.toml", "--out", "out")
    assert code == 0, said
    assert runs.ran == [f"{name}-{number}" for number in (1, 2, 3) for name in ("baseline", "cggr_loss")]
    rows = [json.loads(line) for line in (out / "tuning.jsonl").read_text().splitlines()]
    assert [r["trial_id"] for r in rows] == runs.ran and rows[2] == {
        **{"trial_id": "baseline-2", "recipe": "baseline", "values": MIDDLE, "status": "finished"},
        **{VAL_LOSS: 1.5, "train_seconds": 2.0, "tokens_seen": 640},
    }
    assert said.count("at the edge, the largest") == 2 and "cggr_loss: optimizer.matrix.lr = 0.016 is at" in said
    assert load_race(str(out / "tuned.toml")).arms == {"baseline": MIDDLE, "cggr_loss": {"tokens.keep": 0.5, **HIGH}}
    monkeypatch.chdir(out)
    planned = CliRunner().invoke(cli.app, ["race", "tuned.toml", "--dry-run"])
    assert planned.exit_code == 0 and "2 trials, 18 train seconds" in planned.output
    assert "to be tuned" not in planned.output
    untuned = CliRunner().invoke(cli.app, ["race", str(race_file), "--dry-run"])
    assert "to be tuned before: 3 values x 2 recipes, 2 s each" in untuned.output


def test_a_recipe_without_a_finite_loss_is_named_and_resuming_runs_what_is_left(
    race_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, lost = tmp_path / "my tuning [b] :x:", [f"cggr_loss-{number}" for number in (1, 2, 3)]
    code, said = tune(monkeypatch, Runs({}, fail=lost), race_file, "--out", out)
    assert code == 1 and "no trial with a finite loss: cggr_loss; no tuned.toml is written" in said
    typed = shlex.split(said.partition("go on with: ")[2])
    assert typed == ["cggr-ray", "tune", "--resume", str(out)] and not (out / "tuned.toml").exists()
    assert [json.loads(line)["status"] for line in (out / "tuning.jsonl").read_text().splitlines()].count("failed") == 3
    again = Runs({}, fail=lost[:1])
    code, said = tune(monkeypatch, again, "--resume", out)
    assert code == 1 and again.ran == lost and "did not finish: cggr_loss-1" in said
    assert "# cggr_loss-1: failed" in (out / "tuned.toml").read_text()
    last = Runs({})
    assert tune(monkeypatch, last, "--resume", out)[0] == 0 and last.ran == lost[:1]
    nothing = Runs({})
    assert tune(monkeypatch, nothing, "--resume", out)[0] == 0 and nothing.ran == []


def test_more_values_are_tried_by_every_recipe_and_those_before_are_left_alone(
    race_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, more = tmp_path / "out", '{ "optimizer.matrix.lr" = 0.064, "optimizer.rest.lr" = 0.032 }'
    tune(monkeypatch, Runs({"cggr_loss-3": 2.0}), race_file, "--out", out)
    before, runs = {path: path.read_text() for path in out.glob("runs/*/*")}, Runs({"cggr_loss-4": 1.5})
    code, said = tune(monkeypatch, runs, "--resume", out, "--also", more, "--dry-run")
    assert code == 0 and "8 trials" in said and runs.ran == [] and "0.064" not in (out / "tuning.json").read_text()
    code, said = tune(monkeypatch, runs, "--resume", out, "--also", more)
    assert code == 0 and runs.ran == ["baseline-4", "cggr_loss-4"], said
    assert len(before) >= 6 and {path: path.read_text() for path in out.glob("runs/*-[123]/*")} == before
    tuned = load_race(str(out / "tuned.toml"))
    assert tuned.arms["cggr_loss"] == {"tokens.keep": 0.5, MATRIX: 0.064, REST: 0.032}
    assert tuned.tuning is not None and len(tuned.tuning.values) == 4
    nothing = Runs({})
    assert tune(monkeypatch, nothing, "--resume", out)[0] == 0 and nothing.ran == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("{MATRIX}", r"--also '\{MATRIX\}': .*; accepted: \{'recipe.key' = value\}"),
        ("3.0", r"--also '3.0'; accepted: \{'recipe.key'"),
        ("{ 'optimizer.lr_scale' = 3.0 }", r"tuning\.values\[3\] = .*; accepted: the same keys"),
        ("{ 'optimizer.matrix.lr' = 0.001, 'optimizer.rest.lr' = 0.0005 }", r"accepted: no entry twice"),
        ("{ 'optimizer.matrix.lr' = -1.0, 'optimizer.rest.lr' = 0.1 }", r"tuning\.values\[3\]: recipe 'baseline'"),
    ],
)
def test_more_values_that_do_not_fit_change_nothing(
    more: str, message: str, race_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    tune(monkeypatch, Runs({}), race_file, "--out", out)
    before = (out / "tuning.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(cli.app, ["tune", "--resume", str(out), "--also", more], catch_exceptions=False)
    with pytest.raises(ValueError, match="--also without --resume"):
        CliRunner().invoke(cli.app, ["tune", str(race_file), "--also", more], catch_exceptions=False)
    assert (out / "tuning.json").read_bytes() == before


def test_a_recipe_that_was_edited_in_the_middle_of_a_tuning_is_refused(
    race_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, out = race_file.with_name("own.toml"), tmp_path / "out"
    own.write_text("[objective]\nkind = 'next_token'\n")
    tune(monkeypatch, Runs({}, fail=["own-1"]), race_file, "--recipes", f"baseline,{own}", "--out", out)
    before = (out / "tuning.jsonl").read_text()
    own.write_text("[objective]\nkind = 'next_token'\nlabel_smoothing = 0.1\n")
    changed = CliRunner().invoke(cli.app, ["tune", "--resume", str(out)])
    assert "own.toml' is another than" in str(changed.exception) and "or a new tuning" in str(changed.exception)
    assert not (out / "runs" / "own-1" / SUMMARY_FILE).exists() and (out / "tuning.jsonl").read_text() == before
    own.write_text("[objective]\nkind = 'next_token'\n")
    resumed = Runs({})
    assert tune(monkeypatch, resumed, "--resume", out)[0] == 0 and resumed.ran == ["own-1"]


def test_fewer_recipes_are_tuned_and_raced(race_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs({})
    code, _ = tune(monkeypatch, runs, race_file, "--out", tmp_path / "out", "--recipes", "cggr_loss")
    assert code == 0 and runs.ran == ["cggr_loss-1", "cggr_loss-2", "cggr_loss-3"]
    assert load_race(str(tmp_path / "out" / "tuned.toml")).recipes == ("cggr_loss",)


def test_a_dry_run_shows_trials_and_values_and_takes_nothing(
    race_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs, before = Runs({}), sorted(tmp_path.rglob("*"))
    code, said = tune(monkeypatch, runs, race_file, "--dry-run")
    assert code == 0 and "6 trials, 12 train seconds" in said and json.dumps(HIGH) in said
    assert not runs.ran and sorted(tmp_path.rglob("*")) == before


def test_rows_of_trials_that_left_nothing(tmp_path: Path) -> None:
    spec = RaceSpec(recipes=("baseline",), tuning=TUNING)
    rows = tuning_rows(spec, plan_tuning(spec, tmp_path))
    assert [(r["status"], r["values"], r[VAL_LOSS]) for r in rows] == [("failed", v, None) for v in TUNING.values]
