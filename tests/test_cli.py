"""The command line: its surface, and every mistake as one line with exit code 2, nothing started or overwritten."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cggr_ray import arguments, cli, commands
from cggr_ray.lock import only_writer
from cggr_ray.race import Trial
from search_spaces import SPACES

COMMANDS = {
    "race",
    "evaluate",
    "tune",
    "sweep",
    "report",
    "reproduce",
    "recipe",
    "bench",
    "calibrate",
    "study",
    "doctor",
}


def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a mistake prints."""
    monkeypatch.setattr("sys.argv", ["cggr-ray", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_the_commands_are_these_and_each_shows_an_example() -> None:
    names = {c.name or c.callback.__name__ for c in cli.app.registered_commands} | {"recipe"}
    assert names == COMMANDS
    for name in (*(COMMANDS - {"recipe"}), "recipe list", "recipe show", "recipe check"):
        shown = CliRunner().invoke(cli.app, [*name.split(), "--help"])
        assert shown.exit_code == 0 and "Example: cggr-ray" in shown.output, name


def test_the_help_of_a_sweep_names_every_shipped_space() -> None:
    shown = " ".join(CliRunner().invoke(cli.app, ["sweep", "--help"]).output.replace("│", " ").split())
    assert f"A search space ({', '.join(sorted(SPACES))})" in shown


@pytest.mark.parametrize(
    ("name", "body", "default"),
    [
        ("race", "cggr_ray.commands.race", "train"),
        ("tune", "cggr_ray.tune_command.tune", "train"),
        ("sweep", "cggr_ray.sweep_command.sweep", "inprocess"),
    ],
)
def test_help_says_which_executor_is_taken(name: str, body: str, default: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[object] = []
    monkeypatch.setattr(body, lambda *arguments: taken.extend(arguments))
    assert CliRunner().invoke(cli.app, [name]).exit_code == 0
    assert set(commands.EXECUTORS) & {word for word in taken if isinstance(word, str)} == {default}
    shown = " ".join(CliRunner().invoke(cli.app, [name, "--help"]).output.split())
    assert f"[default: {default}]" in shown[shown.index("--executor") : shown.index("--address")]


def race_file(folder: Path, data: str) -> Path:
    (folder / "race.toml").write_text(data)
    return folder / "race.toml"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["race", "--budget", 0], "budget of 0.0 seconds; accepted: a positive number"),
        (["race", "--recipes", "baseline,cgr_loss"], "unknown recipe 'cgr_loss'; did you mean 'cggr_loss'?"),
        (["race", "--recipes", "cggr_loss", "--set", "tokens.keep=1.5"], "keep = 1.5; accepted: a ratio in (0, 1]"),
        (["race", "--set", "optimizer.matrix.rl=1"], "unknown key 'optimizer.matrix.rl'; did you mean 'lr'?"),
        (
            ["race", "cpu", "--set", "tokens.keep=0.5"],
            "error: recipe 'baseline': unknown key 'tokens.keep'; accepted: ",
        ),
        (["race", "--set", "nobody:tokens.keep=0.5"], "arms.nobody: no such recipe in the race"),
        (["race", "--set", "tokens.keep"], "accepted: key=value"),
        (["race", "--set", "tokens.keep=0.5", "--set", "tokens.keep=0.25"], "another value of 'tokens.keep'; accepted"),
        (["race", "--seeds", "0,x"], "accepted: whole numbers"),
        (["race", "--seeds", "a"], "--seeds 'a'; accepted: whole numbers with commas between"),
        (["study", "low-rank", "--fractions", "0.5,x"], "--fractions '0.5,x'; accepted: numbers with commas between"),
        (["race", "--recipes", ""], "--recipes ''; accepted: names with commas between"),
        (["race", "--recipes", "baseline,,cggr_loss"], "'baseline,,cggr_loss'; accepted: names with commas between"),
        (["race", "cpu", "--trials", 0], "--trials 0; accepted: 1 or more"),
        (["race", "cpu", "--trials", -1], "--trials -1; accepted: 1 or more"),
        (
            ["race", "cpu", "--dry-run", "--recipes", "baseline,cggr_model"],
            "of at least 5 layers, 'tiny' has 4; accepted",
        ),
        (["race", "cpu", "--recipes", "cggr_model_sequence"], "rows need a model of at least 5 layers, 'tiny' has 4"),
        (["race", "cpu", "--recipes", "cggr_skip"], "tokens need a model of at least 5 layers, 'tiny' has 4"),
        (
            ["race", "cpu", "--recipes", "random_rows", "--set", "rows.keep=0.2"],
            "'random_rows': keep = 0.2 of a micro-",
        ),
        (["sweep", "baseline", "--set", 'tokens={kind="skipped_tokens"}', "--dry-run"], "at least 5 layers"),
        (["sweep", "cggr", "--set", "tokens.keep=0.5"], "--set tokens.keep of a sweep that draws tokens; accepted"),
        (["sweep", "cggr", "--set", "tokens=all_tokens"], "--set tokens of a sweep that draws tokens; accepted"),
        (["sweep", "cggr", "--set", "cggr_loss:optimizer.rest.lr=1"], "of a sweep that draws optimizer.rest.lr; acc"),
        (["race", "nowhere.toml"], "unknown race 'nowhere.toml'"),
        (["race", "--executor", "magic"], "executor 'magic'"),
        (["race", "--data", "numina"], "data 'numina'; did you mean 'numinamath'?"),
        (["race", "cpu", "--device", "tpu"], "device = 'tpu'"),
        (
            ["race", "cpu", "--dry-run", "--wandb-project", "mine"],
            "--wandb-project 'mine' with wandb = 'off'; accepted",
        ),
        (["race", "--resume", "nowhere"], "'nowhere' holds no race"),
        (["tune", "cpu"], "race 'cpu' has no [tuning]; accepted: "),
        (["tune", "--resume", "nowhere"], "'nowhere' holds no tuning; accepted: a folder with tuning.json"),
        (["tune", "cpu", "--resume", "nowhere"], "--resume with other settings"),
        (["tune", "cpu", "--executor", "magic"], "executor 'magic'"),
        (["sweep", "cgr"], "search space 'cgr'; did you mean 'cggr'?"),
        (["sweep", "cggr", "--trials", 0], "trials = 0; accepted: at least 1"),
        (["sweep"], "no space; accepted: a search space, a sweep's .toml file, or --resume FOLDER"),
        (["sweep", "nowhere.toml"], "'nowhere.toml' does not exist; accepted: a sweep's .toml file, or baseline"),
        (["sweep", "cggr", "--algorithm", "tep"], "algorithm.kind = 'tep'; did you mean 'tpe'?"),
        (["sweep", "cggr", "--scheduler", "sha"], "scheduler.kind = 'sha'; did you mean 'asha'?"),
        (["sweep", "baseline", "--scheduler", "pbt", "--executor", "train"], "'pbt' with executor 'train'; accepted"),
        (["sweep", "baseline", "--gpus-per-trial", 2], "gpus_per_trial = 2.0; accepted: a part of a GPU in (0, 1]"),
        (["sweep", "baseline", "--growing", 2], "accepted: at least 1 trial on the GPUs of a cluster"),
        (["sweep", "--resume", "nowhere"], "'nowhere' holds no sweep; accepted: a folder with sweep.json"),
        (["sweep", "cggr", "--resume", "nowhere"], "--resume with other settings"),
        (["recipe", "show", "basline"], "did you mean 'baseline'?"),
        (["bench", "optimiser"], "benchmark 'optimiser'; did you mean 'optimizer'?"),
        (["study", "lowrank"], "study 'lowrank'; did you mean 'low-rank'?"),
        (
            ["study", "low-rank", "--data", "data"],
            "study 'low-rank' without --model; accepted: with --model and --data",
        ),
        (["study", "structured-mlp", "--model", "m"], "study 'structured-mlp' without --data; accepted: with --model"),
        (["study", "low-rank", "--model", "nowhere", "--data", "data"], "model folder 'nowhere' has no config.json"),
        (["study", "low-rank", "--model", "m", "--data", "d", "--fractions", "0.5,1.5"], "fractions: 1.5; accepted"),
        (["study", "low-rank", "--model", "m", "--data", "d", "--methods", "svg"], "did you mean 'svd'?"),
        (["study", "structured-mlp", "--model", "m", "--data", "d", "--block", 0], "block = 0; accepted: at least 1"),
        (["study", "attention-backends", "--model", "m"], "unknown key 'model'; accepted: "),
        (["study", "attention-backends", "--shapes", "4x4096"], "shape '4x4096'; accepted: ROWSx"),
        (["race", ""], "unknown race ''; accepted: cpu, gpu, or the path of a .toml file"),
        (["sweep", "baseline", "--race", ""], "unknown race ''; accepted: "),
        (["bench", "step", "--shapes", ""], "--shapes ''; accepted: names with commas between"),
        (["bench", "step", "--device", ""], "device ''; accepted: auto, cpu, cuda"),
        (["bench", "step", "--shapes", "tiny-2x64"], "shape 'tiny-2x64'; accepted: model/ROWSxPOSITIONS"),
        (["bench", "step", "--shapes", "tiny/0x64"], "shape 'tiny/0x64'; accepted: model/ROWSxPOSITIONS"),
        (["bench", "step", "--shapes", "tinny/2x64"], "model preset 'tinny'; did you mean 'tiny'?"),
        (["bench", "head-stats", "--shapes", "bf16/2x64"], "shape 'bf16/2x64'; accepted: vVOCABULARY/ROWSxWIDTH"),
        (["bench", "logit-stats", "--shapes", "v9/2x64"], "shape 'v9/2x64'; accepted: DTYPE/ROWSxVOCABULARY"),
        (["bench", "step", "--repeats", 0], "--repeats 0; accepted: at least 1"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[object],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in fails(monkeypatch, capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"question": "1", "answer": "2"}\n{"question": ', "train.jsonl:2: not JSON"),
        ('{"query": "1", "reply": "2"}\n', "accepted: question/answer; problem/solution"),
        ('{"question": "1", "answer": 2}\n', "train.jsonl:1: column 'answer' is int; accepted: text"),
        ('{"question": "1", "answer": "\\ud800"}\n', "train.jsonl:1: column 'answer' has '\\ud800'; accepted: Unicode"),
        (None, "does not exist; accepted: a .jsonl"),
    ],
)
def test_broken_data_is_named_by_file_and_line(
    content: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "train.jsonl").write_text(content)
    spec = race_file(tmp_path, '[[data.sources]]\nkind = "jsonl"\nname = "mine"\npath = "train.jsonl"\n')
    assert said in fails(monkeypatch, capsys, "race", spec, "--out", tmp_path / "race")


def test_a_tokenizer_file_that_is_not_there_leaves_no_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec = race_file(tmp_path, '[data]\ntokenizer = "mine.json"\n')
    said = fails(monkeypatch, capsys, "race", spec, "--out", tmp_path / "race")
    assert "tokenizer file 'mine.json' does not exist; accepted" in said and not (tmp_path / "race").exists()


def test_a_model_folder_without_safetensors_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    spec = race_file(tmp_path, '[model]\nfolder = "model"\n')
    assert "has no *.safetensors; accepted" in fails(monkeypatch, capsys, "race", spec)


def test_a_cache_that_does_not_hold_the_data_is_refused_before_the_first_trial(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, out = tmp_path / "mine.toml", tmp_path / "out"
    file.write_text(
        'recipes = ["baseline", "static_suffix"]\nbudget_seconds = 1.0\nglobal_rows = 2\nmicro_rows = 2\n'
        '[model]\npreset = "tiny"\ntie_embeddings = false\n'
        '[data]\nrow_tokens = 64\nval_documents = 4\n[[data.sources]]\nkind = "problems"\nname = "p"\ncount = 60\n'
        '[arms.static_suffix]\n"execution.activation_cache" = { memory_gib = 0.001 }\n'
    )
    # Of a width of 128, in float32 on a CPU, and in the half of that where a GPU may take it.
    for device, row in (("cpu", 512), ("auto", 256)):
        said = fails(monkeypatch, capsys, "race", file, "--device", device, "--out", out / device)
        assert f"positions of {row} bytes; accepted: together at least 0.00" in said
        assert not (out / device / "runs").exists()


def test_two_commands_do_not_run_trials_of_a_race_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The second would find the first one's trial in use, and run the next one beside it, on the same device."""
    spec = race_file(tmp_path, 'recipes = ["baseline"]\ndevice = "cpu"\n[data]\nval_documents = 4\n')
    refused: list[str] = []

    def run_trials(trials: Sequence[Trial], *_: object) -> list[str]:
        if not refused:
            refused.append("")  # a second command below would come here again
            refused.append(fails(monkeypatch, capsys, "race", "--resume", tmp_path / "race"))
        return []

    monkeypatch.setattr("trainables.driver.run_trials", run_trials)
    monkeypatch.setattr("cggr_ray.commands.finish", lambda *_: None)
    monkeypatch.setattr("cggr_ray.commands.only_writer", partial(only_writer, wait_seconds=0.3))
    commands.race(str(spec), tmp_path / "race", {}, {}, "train", None, None, None, False)
    assert f"process {os.getpid()} on " in refused[1] and "accepted: one run at a time in a folder" in refused[1]


def test_what_began_on_a_gpu_is_not_taken_up_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec = race_file(tmp_path, 'recipes = ["baseline"]\ndevice = "cpu"\n[data]\nval_documents = 4\n')
    monkeypatch.setattr("trainables.driver.run_trials", lambda *_: [])
    monkeypatch.setattr("cggr_ray.commands.finish", lambda *_: None)
    folder = tmp_path / "race"
    commands.race(str(spec), folder, {}, {}, "train", None, None, None, False)
    record = folder / "runs" / "baseline-s0" / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"device": {"type": "cuda", "name": "a large GPU"}}))
    said = fails(monkeypatch, capsys, "race", "--resume", folder)
    assert f"'{record.parent}' began on 'a large GPU' (cuda), and the device is 'cpu' here; accepted: cuda" in said
    record.write_text(json.dumps({"device": {"type": "cpu", "name": "another CPU"}}))
    commands.race(None, None, {}, {}, "train", None, folder, None, False)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [(["race"], "race"), (["calibrate", "cpu", "--device", "cpu", "--memory-mib", 1], "calibration")],
)
def test_a_folder_that_holds_something_else_is_left_alone(
    arguments: list[object],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "data" / "problems").mkdir(parents=True)
    (tmp_path / "data" / "problems" / "thesis.txt").write_text("precious")
    assert f"is not empty and holds no {what}" in fails(monkeypatch, capsys, *arguments, "--out", tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["data", "problems", "thesis.txt"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"name": "mine", "sp', "not JSON (Unterminated string starting at: line 1 column 18 (char 17)); accepted"),
        ("[]", "a list; accepted: one object"),
        ("{}", "'; accepted: an object with "),
    ],
)
@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (["race", "--resume", "mine"], "race.json"),
        (["race", "cpu", "--out", "mine"], "race.json"),
        (["tune", "--resume", "mine"], "tuning.json"),
        (["sweep", "--resume", "mine"], "sweep.json"),
        (["race", "cpu", "--out", "mine"], "data/ready.json"),
    ],
)
def test_a_record_that_is_none_is_named(
    arguments: list[str],
    file: str,
    content: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    record = Path("mine") / file
    record.parent.mkdir(parents=True)
    record.write_text(content)
    error = fails(monkeypatch, capsys, *arguments)
    assert error.startswith(f"error: {record}: ") and said in error
    assert record.read_text() == content and [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / record]


@pytest.mark.parametrize("command", [["race"], ["recipe", "check"], ["sweep"]])
def test_a_file_that_is_no_toml_says_what_is_accepted(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for content, said in ((b'name = "min', "(at end of document)"), ("a = 1".encode("utf-16"), "invalid start byte")):
        (tmp_path / "mine.toml").write_bytes(content)
        error = fails(monkeypatch, capsys, *command, tmp_path / "mine.toml")
        assert error.startswith("error: mine.toml: ") and error.endswith(f"{said}; accepted: TOML in UTF-8")


@pytest.mark.parametrize(
    "arguments",
    [
        ("race", "cpu"),
        ("tune", "cpu"),
        ("sweep", "baseline"),
        ("calibrate", "cpu"),
        ("report", "race"),
        ("reproduce", "race/runs/a"),
        ("bench", "step"),
        ("study", "low-rank"),
    ],
)
@pytest.mark.parametrize("out", ["thesis.txt", "thesis.txt/race", "/proc/race"])
def test_results_have_to_go_into_a_folder(
    arguments: tuple[str, ...],
    out: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """A file, or a system that gives no right to write, is said before anything begins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != Path("/proc"))
    Path("thesis.txt").write_text("precious")
    said = fails(monkeypatch, capsys, *arguments, "--out", out)
    assert f"folder '{out}' cannot be written, for" in said and "accepted: a new folder" in said
    assert Path("thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("out", ["s3://bucket/sweep", "gs://bucket/sweep", "file:///mnt/results"])
def test_results_do_not_go_into_a_local_folder_named_like_an_address(
    out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    said = fails(monkeypatch, capsys, "sweep", "baseline", "--dry-run", "--out", out)
    assert "is an address; accepted: a path, where a bucket may be mounted" in said
    assert not list(tmp_path.iterdir())


def test_blanks_between_names_are_left_out() -> None:
    assert arguments.words("--recipes", "baseline, cggr_loss") == ["baseline", "cggr_loss"]
    assert arguments.words("--recipes", None) is None


def test_dotted_keys_without_quotes_do_not_replace_what_they_are_a_part_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole = """recipes = ["e3/full"]\n[%s]\n%s = "fp32"\n"""
    for table in ("values", 'arms."e3/full"'):
        spec = race_file(tmp_path, whole % (table, "execution.precision"))
        said = fails(monkeypatch, capsys, "race", spec, "--dry-run")
        assert (
            """race.toml: execution = {'precision': 'fp32'} for all of 'execution'; accepted: dotted keys in""" in said
        )
        assert 'such as "execution.precision", or a table with its kind' in said
        spec = race_file(tmp_path, whole % (table, '"execution.precision"'))
        execution = commands.specify(str(spec), {}, {}).recipe("e3/full").execution
        assert (execution.precision, execution.gradient_checkpointing) == ("fp32", "block")


def test_a_file_may_begin_with_a_mark_of_the_byte_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cggr_ray.race import load_race
    from cggr_ray.recipe import load_recipe
    from trainables.settings import load_parts

    for name, text in (("race", "budget_seconds = 7"), ("recipe", 'description = "é"'), ("sweep", 'space = "cggr"')):
        (tmp_path / f"{name}.toml").write_bytes(f"{text}\n".encode("utf-8-sig"))
    assert load_race(str(tmp_path / "race.toml")).budget_seconds == 7
    assert load_recipe(str(tmp_path / "recipe.toml")).description == "é"
    assert load_parts(str(tmp_path / "sweep.toml")).space == "cggr"


def test_names_of_recipes_stand_in_a_column() -> None:
    lines = CliRunner().invoke(cli.app, ["recipe", "list"]).output.splitlines()
    starts = {len(line) - len(line[len(line.split()[0]) :].lstrip()) for line in lines}
    assert len(lines) > 30 and len(starts) == 1


def test_the_plan_of_a_sweep_is_readable(tmp_path: Path) -> None:
    shown = CliRunner().invoke(cli.app, ["sweep", "cggr", "--dry-run"]).output
    assert max(map(len, shown.splitlines())) < 200
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in shown.splitlines()}
    assert lines["scheduler"] == "asha (first_rung 0.125, reduction 2.0, brackets 1)"
    assert lines["algorithm"] == "random" and lines["tokens.num_strata"] == "one of 2, 4, 8"
    assert lines["tokens.keep"] == "0.25 to 0.75"
    assert lines["optimizer.matrix.lr"] == "0.0005 to 0.02, evenly by its logarithm"
    different = {json.dumps(value) for value in load_parts_domain("tokens")}
    assert lines["tokens"].startswith(f'one of {len(different)}, such as {{"kind": "selected_tokens", ')


def load_parts_domain(key: str) -> list[object]:
    """All that a shipped choice may be."""

    return list(SPACES["cggr"].domains()[key].of)


def test_a_plan_counts_one_as_one_and_says_every_limit_of_a_sweep() -> None:
    shown = CliRunner().invoke(cli.app, ["race", "cpu", "--dry-run", "--recipes", "baseline"]).output
    assert "\n1 trial, 30 train seconds in all" in shown
    limits = ("--total-seconds", "90", "--wall-seconds", "75.5", "--trials")
    for trials, counted in (("1", "1 trial"), ("4", "4 trials")):
        shown = CliRunner().invoke(cli.app, ["sweep", "cggr", "--race", "cpu", "--dry-run", *limits, trials]).output
        most = min(int(trials) * 30, 90)
        assert shown.startswith(f"{counted} of cggr_loss, at most {most} train seconds, 75.5 s of the wall clock\n")


def test_dry_run_plans_and_takes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(cli.app, ["race", "cpu", "--dry-run", "--seeds", "0,1"])
    assert shown.exit_code == 0 and "8 trials, 240 train seconds" in shown.output and "GiB" in shown.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [("race", "far.toml"), ("tune", "far.toml"), ("sweep", "cggr", "--race", "far.toml")]
)
def test_a_plan_says_what_is_not_here_yet(
    arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = '[data]\nval_documents = 2\n[[data.sources]]\nkind = "jsonl"\nname = "far"\npath = "far.jsonl"\n'
    tuning = '[tuning]\nseconds = 1.0\nseed = 9\nvalues = [{ "optimizer.lr_scale" = 0.5 }]\n'
    Path("far.toml").write_text(f'recipes = ["baseline"]\ndevice = "cpu"\n{sources}{tuning}')
    shown = CliRunner().invoke(cli.app, [*arguments, "--dry-run"], catch_exceptions=False)
    assert shown.exit_code == 0 and "train seconds" in shown.output
    assert f"not here: data file {tmp_path / 'far.jsonl'}" in shown.output
    said = fails(monkeypatch, capsys, *arguments)
    assert "far.jsonl' does not exist; accepted: a .jsonl" in said
    assert [path.name for path in tmp_path.iterdir()] == ["far.toml"]


def test_set_reaches_every_arm_or_one() -> None:
    values = arguments.assignments(["optimizer.matrix.lr=0.5", "cggr_loss:tokens.keep=0.5", "tag=word"])
    assert values == {"optimizer.matrix.lr": 0.5, "cggr_loss:tokens.keep": 0.5, "tag": "word"}
    values.pop("tag")
    spec = commands.specify("cpu", {}, values)
    assert spec.recipe("cggr_loss").tokens.keep == 0.5
    assert spec.recipe("random_tokens").tokens.keep == 0.25
    assert {spec.recipe(name).optimizer.matrix.lr for name in spec.recipes} == {0.5}


def test_data_by_a_short_name() -> None:
    sources = commands.specify("cpu", {"data": "numinamath"}, {}).data.sources
    assert [(s.name, s.dataset) for s in sources] == [("numinamath", "AI-MO/NuminaMath-1.5")]


def test_recipe_show_explains_every_part_and_prints_all_values() -> None:
    shown = CliRunner().invoke(cli.app, ["recipe", "show", "cggr_loss"])
    assert all(part in shown.output for part in ("rows", "tokens", "objective", "optimizer", "updates"))
    plain = json.loads(shown.output[shown.output.index("{") :])
    assert plain["tokens"]["selection"] == "stratified" and plain["optimizer"]["matrix"]["kind"] == "muon"


WHOLE, MAY_USE = "what was saved before is whole", "accepted: a path that this user may use"


@pytest.mark.parametrize(
    ("number", "behind"),
    [
        (errno.ENOSPC, WHOLE),
        (errno.EDQUOT, WHOLE),
        (errno.EACCES, MAY_USE),
        (errno.EPERM, MAY_USE),
        (errno.EROFS, MAY_USE),
    ],
)
def test_a_full_disk_or_a_forbidden_path_is_one_line_and_no_traceback(
    number: int, behind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it is met; any other error of the system is shown as it is."""

    def failing(number: int) -> None:
        def body(*_: object) -> None:
            raise OSError(number, "words", "best/baseline.toml")

        monkeypatch.setattr("cggr_ray.sweep_command.sweep", body)
        monkeypatch.setattr("sys.argv", ["cggr-ray", "sweep", "baseline"])
        cli.main()

    with pytest.raises(SystemExit) as exit_:
        failing(number)
    said = f"error: [Errno {number}] words: 'best/baseline.toml'; {behind}"
    assert exit_.value.code == 1 and capsys.readouterr().err.splitlines() == [said]
    with pytest.raises(OSError, match="words"):
        failing(errno.EIO)
