"""cggr-ray evaluate: kept models asked later say what they said in the loop, and reach the frames of the analysis."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from small_runs import rows_of
from typer.testing import CliRunner

from analysis.frames import read_race, with_late
from cggr_ray import cli
from cggr_ray.data.dataset import DataSpec, prepare
from cggr_ray.data.sources import Problems
from cggr_ray.evaluation.generated import Generated
from cggr_ray.evaluation.suite import Evaluation
from cggr_ray.loop import run_race
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import RaceSpec, plan_trials

Files = dict[str, bytes]
TASKS = (
    Generated(questions=4, max_new_tokens=8, seconds=600.0),
    Generated(name="drawn", questions=4, max_new_tokens=8, seconds=600.0, temperature=1.0),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Files]:
    """A race of one run, with the content of all of its files."""
    race = tmp_path_factory.mktemp("race")
    spec = RaceSpec(
        recipes=("baseline",),
        budget_seconds=3.0,
        step_seconds=0.5,
        global_rows=2,
        micro_rows=2,
        milestones=(0.5,),
        model=ModelSpec(preset="tiny"),
        data=DataSpec(sources=(Problems(count=300),), row_tokens=64, val_documents=4),
        device="cpu",
        evaluation=Evaluation(tasks=TASKS, rows=3),
    )
    prepare(spec.data, race / "data")
    (trial,) = plan_trials(spec, race)
    run_race(trial)
    run = Path(trial.folder)
    return run, {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.fixture
def run(finished: tuple[Path, Files], tmp_path: Path) -> Path:
    """The race's run, fresh for every test."""
    folder = tmp_path / "race" / "runs" / finished[0].name
    for name, content in finished[1].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def evaluated(*arguments: object) -> str:
    done = CliRunner().invoke(cli.app, ["evaluate", "--device", "cpu", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def late_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluation" / "late.jsonl").read_text().splitlines()]


def test_asked_again_a_kept_model_says_the_same(run: Path, finished: tuple[Path, Files]) -> None:
    """Drawn samples too; and nothing that the run had written is another."""
    shown = evaluated(run.parents[1])
    for late, row in zip(late_rows(run), rows_of(run, "milestone"), strict=True):
        assert late.items() <= row.items()
        assert late.keys() - {"kind", "step", "fraction", "train_seconds", "wall_seconds", "tokens_seen"} == {
            name for name in row if name.startswith("eval/")
        }
    for name, content in finished[1].items():
        assert (run / name).read_bytes() == content, name
    assert f"{run.name} 0.500: generated/n 4" in shown and f"{run.name} 1.000:" in shown


def test_other_tasks_reach_the_frames(run: Path) -> None:
    """Beside the old values, and in place of those of the same name; the last evaluation counts."""
    tasks = run.parents[2] / "more.toml"
    for questions in (1, 2):
        common = {"kind": "generated", "questions": questions, "max_new_tokens": 4, "seconds": 600.0}
        asked = [{"name": name, **common} for name in ("other", "drawn")]
        tasks.write_text(tomli_w.dumps({"evaluation": {"tasks": asked}}))
        evaluated(run.parents[1], "--tasks", tasks, "--rows", 1)
    race = read_race(run.parents[1])
    frame, (ended,) = race.milestones, race.runs.to_dict("records")
    assert {name: ended[name] for name in frame if name.startswith("eval/")} == {
        name: frame[name].iloc[-1] for name in frame if name.startswith("eval/")
    }
    assert list(frame["fraction"]) == [0.5, 1.0]
    assert list(frame["eval/other/n"]) == [2, 2] and list(frame["eval/drawn/n"]) == [2, 2]
    assert list(frame["eval/generated/n"]) == [4, 4]
    assert list(frame["val/loss"]) == [row["val/loss"] for row in rows_of(run, "milestone")]
    assert len(late_rows(run)) == 4
    assert len((run / "evaluation" / "0.500" / "drawn.jsonl").read_text().splitlines()) == 2


def test_a_run_alone_is_asked_what_its_race_was(run: Path) -> None:
    """The settings of the race's own task, written out, are the same task."""
    tasks = run.parents[2] / "same.toml"
    asked = {"kind": "generated", "questions": 4, "max_new_tokens": 8, "seconds": 600.0}
    tasks.write_text(tomli_w.dumps({"evaluation": {"tasks": [asked]}}))
    evaluated(run, "--tasks", tasks)
    assert len(late_rows(run)) == 2


def test_late_rows_belong_to_a_step() -> None:
    rows = [
        {"kind": "step", "step": 3, "train/loss": 1.0},
        {"kind": "milestone", "step": 3, "val/loss": 2.0, "eval/a/n": 1, "eval/a/accuracy": 0.0, "eval/c/n": 9},
        {"kind": "milestone", "step": 6, "val/loss": 1.5},
    ]
    late = [
        {"kind": "milestone", "step": 3, "fraction": 0.4, "eval/a/n": 5, "eval/b/n": 6},
        {"kind": "milestone", "step": 5, "eval/a/n": 7},
        {"kind": "milestone", "step": 3, "eval/b/n": 8},
    ]
    asked = {"kind": "milestone", "step": 3, "val/loss": 2.0, "eval/c/n": 9, "eval/a/n": 5, "eval/b/n": 8}
    assert with_late(rows, late) == [rows[0], asked, rows[2]]


def without_models(run: Path) -> None:
    for path in (run / "milestones").rglob("milestone.json"):
        path.unlink()


def without_spec(run: Path) -> None:
    described = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({key: value for key, value in described.items() if key != "spec"}))


def nothing(run: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        (nothing, ["--rows", 0], "error: --rows 0; accepted: at least 1"),
        (nothing, ["--tasks", "nowhere.toml"], "tasks file 'nowhere.toml' does not exist; accepted: a .toml file"),
        (nothing, ["--tasks", "race.toml"], "race.toml: no evaluation; accepted: --tasks with a .toml file that has"),
        (nothing, ["--tasks", "trained.toml"], "seed = 0 of task 'generated' is also that of source 'problems'"),
        (nothing, ["--tasks", "long.toml"], "task 'long': the longest prompt has"),
        (nothing, ["--tasks", "fewer.toml"], "task 'generated' has other settings than the race's of this name"),
        (without_models, [], "has kept no model; accepted: a run, or a race, with evaluation.keep_models"),
        (without_spec, [], "no evaluation; accepted: --tasks"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_asked(
    change: Callable[[Path], None], arguments: list[object], said: str, run: Path, monkeypatch: Any, capsys: Any
) -> None:
    change(run)
    monkeypatch.chdir(run.parents[2])
    Path("race.toml").write_text("seeds = [0]\n")
    table = '[evaluation]\n[[evaluation.tasks]]\nkind = "generated"\n'
    Path("trained.toml").write_text(f"{table}seed = 0\n")
    Path("fewer.toml").write_text(f"{table}questions = 2\nmax_new_tokens = 8\nseconds = 600.0\n")
    Path("long.toml").write_text(f'{table}name = "long"\nmax_new_tokens = 4096\n')
    monkeypatch.setattr("sys.argv", ["cggr-ray", "evaluate", str(run), "--device", "cpu", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and line.startswith("error: ") and said in line
    assert not (run / "evaluation" / "late.jsonl").exists()


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["evaluate", str(tmp_path)])
    assert isinstance(done.exception, ValueError) and "holds no run; accepted: the folder of a run" in str(
        done.exception
    )


def test_a_tuning_asks_nothing(finished: tuple[Path, Files]) -> None:
    from cggr_ray.race import Tuning
    from cggr_ray.tuning import plan_tuning

    spec = RaceSpec.from_plain(json.loads((finished[0] / "run.json").read_text())["spec"])
    assert spec.evaluation is not None and spec.evaluation.tasks == TASKS
    tuned = replace(spec, tuning=Tuning(seconds=1.0, seed=9, values=({"optimizer.lr_scale": 0.5},)))
    assert all(trial.race.evaluation is None for trial in plan_tuning(tuned, finished[0]))
