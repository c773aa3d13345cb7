"""Every race file that is shipped: its plan, with neither network nor data nor a GPU, and what it says of them."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cggr_ray import cli
from cggr_ray.evaluation.aime import Aime
from cggr_ray.evaluation.gsm8k import Gsm8k
from cggr_ray.planning import absent
from cggr_ray.race import RACES, check_rates, load_race, plan_trials
from cggr_ray.routing.scorers import Setting

FILES = sorted((Path(__file__).parents[1] / "races").glob("*.toml"))
SHIPPED = [*map(str, FILES), *(path.stem for path in RACES.glob("*.toml"))]
REAL = str(next(path for path in FILES if path.stem == "numina_gemma"))
SHORT = str(next(path for path in FILES if path.stem == "h100_short"))
GEMMA_BATCH = str(next(path for path in FILES if path.stem == "gemma_batch"))
SMOKE = str(next(path for path in FILES if path.stem == "cpu_smoke"))


@pytest.fixture(autouse=True)
def nothing_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no cache of the hub, no GPU, nothing in the folder."""

    def refuse(*args: Any) -> None:
        raise AssertionError("a plan asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def plan(name: str, *more: str) -> tuple[int, str]:
    shown = CliRunner().invoke(cli.app, ["race", name, "--dry-run", *more])
    return shown.exit_code, shown.output + repr(shown.exception)


@pytest.mark.parametrize("name", SHIPPED, ids=lambda name: Path(name).stem)
def test_the_plan_of_every_shipped_race(name: str, tmp_path: Path) -> None:
    code, said = plan(name)
    assert code == 0, said
    spec = load_race(name)
    trials = plan_trials(spec, tmp_path / "race")
    assert all(trial.trial_id in said for trial in trials)
    many = "trial" if len(trials) == 1 else "trials"
    assert f"{len(trials)} {many}, {len(trials) * spec.budget_seconds:g} train seconds" in said
    assert all(what in said for what in absent(spec))
    assert list(tmp_path.iterdir()) == []


def test_the_real_race_is_the_protocol_s(tmp_path: Path) -> None:
    """Gemma 3 4B, NuminaMath 1.5, 90 minutes a run, AIME and GSM8K after 30, 60 and 90 of them, equal warm-up."""
    spec = load_race(REAL)
    assert spec.model.hub == spec.data.tokenizer == "google/gemma-3-4b-it"
    assert [getattr(source, "dataset", None) for source in spec.data.sources] == ["AI-MO/NuminaMath-1.5"]
    assert spec.budget_seconds == 90 * 60
    assert [round(m * spec.budget_seconds / 60) for m in spec.milestones] == [30, 60]
    assert spec.evaluation is not None and spec.evaluation.keep_models
    assert [type(task) for task in spec.evaluation.tasks] == [Aime, Gsm8k]
    assert len({spec.recipe(name).optimizer.schedule.warmup_tokens for name in spec.recipes}) == 1
    rates = {spec.recipe(name).optimizer.lr_scale * spec.recipe(name).optimizer.rest.lr for name in spec.recipes}
    assert len(rates) == 1 and 1e-5 <= rates.pop() <= 3e-5
    assert spec.wandb == "online" and spec.batch_lr_rule == "sqrt"
    # A copy, beside which there is no data, whatever lies in this checkout.
    _, said = plan(shutil.copy(REAL, tmp_path))
    for needed in ("model google/gemma-3-4b-it", "dataset AI-MO/NuminaMath-1.5", "questions of aime", "of gsm8k"):
        assert f"not here: {needed}" in said or f"not here: questions {needed}" in said
    assert "milestones after 1800, 3600, 5400 s" in said and "GiB" not in said


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_shipped_tuning_tries_is_accepted_of_trained_weights(path: Path) -> None:
    spec = load_race(str(path))
    for values in spec.tuning.values if spec.tuning and spec.model.pretrained else ():
        tried = spec.with_arms(dict.fromkeys(spec.recipes, values))
        for name in spec.recipes:
            check_rates(tried.recipe(name))


def test_the_short_race_has_its_arms_and_its_caps() -> None:
    spec = load_race(SHORT)
    assert spec.recipes == ("baseline", "fewer_rows", "random_tokens", "cggr_seed", "cggr_tuned")
    assert spec.budget_seconds == 150 and len(spec.milestones) == 2
    assert spec.evaluation is not None and sum(task.seconds for task in spec.evaluation.tasks) <= 60
    _, said = plan(SHORT)
    assert "1,560,381,440 parameters" in said and "GiB" in said and "asked at every milestone: generated" in said


def test_the_memory_of_a_quarter_is_that_of_a_quarter() -> None:
    """A curriculum, also one that nobody wrote, begins with full steps, which need all the memory."""
    race = load_race(GEMMA_BATCH)
    setting = Setting(torch.device("cpu"), 34, 2560, 1)
    routers = {name: race.recipe(name).tokens.build(0, setting) for name in race.recipes}
    levels = {name: router.levels() for name, router in routers.items()}
    assert levels[race.recipes[2]] == (0.25,) and max(levels["cggr_seed"]) == max(levels["baseline"]) == 1


def test_the_smoke_race_needs_nothing() -> None:
    spec = load_race(SMOKE)
    assert absent(spec) == []
    seconds = spec.evaluation.tasks[0].seconds if spec.evaluation else 0.0
    trial = spec.budget_seconds + (len(spec.milestones) + 1) * seconds
    assert len(spec.recipes) * len(spec.seeds) * trial < 60
    spec.check()


def race_file(folder: Path, text: str) -> str:
    (folder / "mine.toml").write_text(text)
    return str(folder / "mine.toml")


SOURCE = '[[data.sources]]\nkind = "jsonl"\nname = "mine"\npath = "mine.jsonl"\n'
TASK = '[[evaluation.tasks]]\nkind = "aime"\npath = "aime.jsonl"\n'


def test_a_rate_that_the_race_would_refuse_is_refused_by_its_plan() -> None:
    assert "optimizer.matrix.lr = 0.006, a rate for random" in plan(REAL, "--set", "optimizer.lr_scale=2")[1]


def test_what_is_there_is_checked(tmp_path: Path) -> None:
    name = race_file(tmp_path, SOURCE + TASK)
    code, said = plan(name)
    assert code == 0 and "not here: data file" in said and "not here: questions of aime" in said
    (tmp_path / "mine.jsonl").write_text('{"query": "1"}\n')
    assert "accepted: question/answer" in plan(name)[1]
    (tmp_path / "mine.jsonl").write_text('{"question": "1", "answer": "2"}\n')
    (tmp_path / "aime.jsonl").write_text('{"problem": "1", "answer": "1000"}\n')
    assert "accepted: an integer from 0 to 999" in plan(name)[1]
    (tmp_path / "aime.jsonl").write_text('{"problem": "1", "answer": "999"}\n')
    code, said = plan(name)
    assert code == 0 and "not here" not in said
    name = race_file(tmp_path, '[data]\ntokenizer = "mine.json"\n' + SOURCE + TASK)
    code, said = plan(name)
    assert code == 0 and "not here: tokenizer file mine.json" in said


def test_a_model_in_the_cache_is_checked_too(tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--a--b"
    (repository / "snapshots" / "c").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c")
    config = {"model_type": "gpt2", "n_layer": 3, "n_embd": 8, "n_head": 2, "n_positions": 256, "vocab_size": 300}
    config |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    (repository / "snapshots" / "c" / "config.json").write_text(json.dumps(config))
    name = race_file(tmp_path, 'recipes = ["baseline"]\n[model]\nhub = "a/b@c"\n[data]\nrow_tokens = 128\n')
    (tmp_path / "cache" / "models--a--b" / "refs" / "c").write_text("c")
    code, said = plan(name)
    assert code == 0 and "not here: model" not in said and "model a/b@c:" in said and "GiB" in said
    assert "at least 5 layers, 'a/b@c' has 3" in plan(name, "--recipes", "baseline,cggr_seed")[1]
    assert "not here: weights of model a/b@c" in said and "not here: tokenizer" not in said
    name = race_file(tmp_path, (tmp_path / "mine.toml").read_text() + 'tokenizer = "model"\n')
    for file, still in (("model.safetensors.index.json", ["tokenizer a/b@c"]), ("tokenizer.json", [])):
        (repository / "snapshots" / "c" / file).write_text("{}")
        absent_now = [what.partition(":")[0] for what in absent(load_race(name))]
        assert absent_now == still
    (repository / "snapshots" / "c" / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.1}))
    assert "resid_pdrop = 0.1; accepted: 0" in plan(name)[1]


def test_a_model_that_a_race_is_yet_to_write_is_no_mistake_of_the_plan(tmp_path: Path) -> None:
    name = race_file(tmp_path, 'recipes = ["baseline"]\n[model]\nfolder = "base/model"\n[data]\nrow_tokens = 128\n')
    code, said = plan(name)
    assert code == 0 and f"not here: model folder {tmp_path / 'base/model'}" in said
    ran = CliRunner().invoke(cli.app, ["race", name, "--out", str(tmp_path / "out")])
    assert "has no config.json; accepted" in repr(ran.exception) and not (tmp_path / "out").exists()
    (tmp_path / "base/model").mkdir(parents=True)
    assert "has no config.json; accepted" in plan(name)[1]


def test_a_gpu_that_is_not_there_is_no_mistake_of_the_plan() -> None:
    code, said = plan("gpu", "--device", "cuda")
    assert code == 0 and "not here: a GPU" in said
