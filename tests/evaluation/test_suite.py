"""Tasks at milestones: their rows and records, off the budget, once, and without a trace in the training."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import KilledError, killed_after, prepared, rows_of, step_losses
from transformers import AutoModelForCausalLM

from cggr_ray.data.dataset import DataSpec, open_data
from cggr_ray.data.sources import Jsonl, Problems
from cggr_ray.evaluation import generate, heldout
from cggr_ray.evaluation import suite as module
from cggr_ray.evaluation.generated import Generated
from cggr_ray.evaluation.gsm8k import Gsm8k
from cggr_ray.evaluation.suite import Evaluation, Suite
from cggr_ray.evaluation.task import Sample
from cggr_ray.loop import run_race
from cggr_ray.milestones import Milestones
from cggr_ray.models.presets import ModelSpec
from cggr_ray.out_of_memory import with_fewer
from cggr_ray.race import RaceSpec, load_race, plan_trials

STEP_SECONDS = 0.5
TASK = Generated(questions=5, max_new_tokens=8, seconds=600.0)
EVALUATION = Evaluation(tasks=(TASK,), rows=3)


@pytest.fixture(scope="module")
def spec() -> RaceSpec:
    return RaceSpec(
        recipes=("baseline",),
        budget_seconds=8 * STEP_SECONDS,
        step_seconds=STEP_SECONDS,
        global_rows=2,
        micro_rows=2,
        milestones=(0.5,),
        model=ModelSpec(preset="tiny"),
        data=DataSpec(sources=(Problems(count=300),), row_tokens=64, val_documents=4),
        values={"optimizer.schedule.warmup_tokens": 500},
        device="cpu",
        evaluation=EVALUATION,
    )


@pytest.fixture(scope="module")
def data_folder(spec: RaceSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(spec.data, tmp_path_factory)


def run(spec: RaceSpec, folder: Path, data_folder: Path, *report: Any) -> dict[str, Any]:
    return run_race(plan_trials(spec, folder)[0].placed(folder, data_folder), *report)


@pytest.fixture(scope="module")
def plain(spec: RaceSpec, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, run(replace(spec, evaluation=None), folder, data_folder)


@pytest.fixture(scope="module")
def asked(spec: RaceSpec, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Drawn samples too, which would move the process's own draws."""
    folder = tmp_path_factory.mktemp("asked")
    drawn = replace(TASK, name="drawn", temperature=1.0)
    spec = replace(spec, save_model=True, evaluation=replace(EVALUATION, tasks=(TASK, drawn)))
    return folder, run(spec, folder, data_folder)


def test_training_does_not_notice(plain: tuple[Path, dict[str, Any]], asked: tuple[Path, dict[str, Any]]) -> None:
    assert len(step_losses(plain[0])) == 8
    assert step_losses(asked[0]) == step_losses(plain[0])
    assert [r["val/loss"] for r in rows_of(asked[0], "milestone")] == [
        r["val/loss"] for r in rows_of(plain[0], "milestone")
    ]
    assert not {"evaluation", "milestones"} & {path.name for path in plain[0].iterdir()}


def test_a_milestone_s_row_is_what_its_records_say(asked: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = asked
    rows = rows_of(folder, "milestone")
    assert [row["fraction"] for row in rows] == [0.5, 1.0]
    for name, row in zip(("0.500", "1.000"), rows, strict=True):
        for task in ("generated", "drawn"):
            lines = (folder / "evaluation" / name / f"{task}.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            samples = [sample for record in records for sample in record["samples"]]
            assert [record["key"] for record in records] == [question.key for question in TASK.load()]
            assert [record["answer"] for record in records] == [question.answer for question in TASK.load()]
            assert row[f"eval/{task}/n"] == len(records) == 5
            assert row[f"eval/{task}/truncated"] == sum(sample["truncated"] for sample in samples) / 5
            assert row[f"eval/{task}/accuracy"] == sum(sample["correct"] for sample in samples) / 5
            assert row[f"eval/{task}/disagreements"] == sum(s["correct"] != s["second"] for s in samples)
    assert summary["eval/generated/n"] == 5


def test_kept_models_are_the_model_then(asked: tuple[Path, dict[str, Any]], data_folder: Path, spec: RaceSpec) -> None:
    """The last is the run's final model; the first says again what it said at its milestone."""
    folder, _ = asked
    kept = {path.name: path for path in (folder / "milestones").iterdir()}
    assert set(kept) == {"0.500", "1.000"}
    first, last, final = (
        AutoModelForCausalLM.from_pretrained(path) for path in (kept["0.500"], kept["1.000"], folder / "model")
    )
    weights, wanted = last.state_dict(), final.state_dict()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert any(not torch.equal(first.state_dict()[name], wanted[name]) for name in wanted)
    tokenizer = open_data(spec.data, data_folder).tokenizer
    for name, model in (("0.500", first), ("1.000", last)):
        found = module.generate(model, tokenizer, TASK.load(), TASK, 2)
        lines = (folder / "evaluation" / name / "generated.jsonl").read_text().splitlines()
        assert [[s.text for s in one] for one in found] == [
            [s["text"] for s in json.loads(n)["samples"]] for n in lines
        ]
    noted = json.loads((kept["0.500"] / "milestone.json").read_text())
    row = rows_of(folder, "milestone")[0]
    assert noted == {key: row[key] for key in ("step", "fraction", "train_seconds", "wall_seconds", "tokens_seen")}


def test_a_milestone_is_a_checkpoint_and_is_not_done_again(
    spec: RaceSpec, data_folder: Path, tmp_path: Path, plain: tuple[Path, dict[str, Any]], monkeypatch: Any
) -> None:
    """Nothing else writes one in this run; the process ends within the fifth step, the first after the milestone."""
    ran, real = [], Suite.run

    def counted(self: Suite, model: Any, milestone: str) -> dict[str, float]:
        ran.append(milestone)
        return real(self, model, milestone)

    monkeypatch.setattr(Suite, "run", counted)
    spec = replace(spec, checkpoint_every_seconds=1e9, evaluation=replace(EVALUATION, keep_models=False))
    with pytest.raises(KilledError):
        run(spec, tmp_path, data_folder, killed_after(4.5 * STEP_SECONDS))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]
    summary = run(spec, tmp_path, data_folder)
    assert ran == ["0.500", "1.000"]
    assert [row["step"] for row in rows_of(tmp_path, "milestone")] == [4, 8]
    assert step_losses(tmp_path) == step_losses(plain[0]) and summary["val/loss"] == plain[1]["val/loss"]
    assert not (tmp_path / "milestones").exists()


def test_tasks_are_off_the_budget(spec: RaceSpec, data_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    real = Suite.run

    def slow(self: Suite, model: Any, milestone: str) -> dict[str, float]:
        time.sleep(0.5)
        return real(self, model, milestone)

    monkeypatch.setattr(Suite, "run", slow)
    summary = run(replace(spec, step_seconds=None, budget_seconds=1.0), tmp_path, data_folder)
    ledgers = summary["ledgers"]
    assert ledgers["evaluation"] > 1.0 and ledgers["checkpoint"] > 0
    assert summary["train_seconds"] < 1.0 + summary["last_step_seconds"] + 0.01
    assert sum(ledgers.values()) == pytest.approx(summary["wall_seconds"], rel=0.005)
    first, last = rows_of(tmp_path, "milestone")
    assert first["train_seconds"] < 1.0 and last["eval/generated/n"] == 5
    assert (tmp_path / "evaluation" / "0.500" / "generated.jsonl").is_file()


def test_verdicts_are_of_what_was_said(spec: RaceSpec, data_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Of five questions the fourth and fifth come too late; the others are right, wrong, and cut off when right."""
    questions = TASK.load()
    said = [
        [Sample(f"Some steps.\n#### {questions[0].answer}", truncated=False)],
        [Sample("No idea.", truncated=False)],
        [Sample(f"#### {questions[2].answer}", truncated=True)],
        [],
        [],
    ]
    monkeypatch.setattr(module, "generate", lambda *_: said)
    tokenizer = open_data(spec.data, data_folder).tokenizer
    found = Suite(EVALUATION, tokenizer, spec.model.config(), tmp_path).run(None, "0.250")
    assert found["eval/generated/n"] == 3 and found["eval/generated/valid"] == 1
    assert found["eval/generated/accuracy"] == pytest.approx(1 / 3)
    assert found["eval/generated/truncated"] == pytest.approx(1 / 3)
    assert found["eval/generated/accuracy_low"] < 1 / 3 < found["eval/generated/accuracy_high"]
    lines = (tmp_path / "evaluation" / "0.250" / "generated.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {
        "key": questions[0].key,
        "answer": questions[0].answer,
        "samples": [
            {
                "text": said[0][0].text,
                "truncated": False,
                "extracted": questions[0].answer,
                "correct": True,
                "second": True,
                "marks": {},
            }
        ],
    }
    assert [json.loads(line)["samples"][0]["extracted"] for line in lines[1:]] == [None, None]


def test_no_question_in_time_is_no_score(spec: RaceSpec, data_folder: Path, tmp_path: Path) -> None:
    hurried = replace(EVALUATION, tasks=(replace(TASK, seconds=1e-9),))
    tokenizer, config = open_data(spec.data, data_folder).tokenizer, spec.model.config()
    model = spec.model.build(len(tokenizer), 0, torch.device("cpu"), torch.float32)
    found = Suite(hurried, tokenizer, config, tmp_path).run(model, "1.000")
    assert found["eval/generated/n"] == 0 and "eval/generated/accuracy" not in found
    assert (tmp_path / "evaluation" / "1.000" / "generated.jsonl").read_text() == ""


def test_filling_takes_the_largest_batch_to_its_last_token(spec: RaceSpec, data_folder: Path, tmp_path: Path) -> None:
    """Every sample ends at once when it may: the weights of the end-of-text token win."""
    tokenizer = open_data(spec.data, data_folder).tokenizer
    model, shapes = spec.model.build(len(tokenizer), 0, torch.device("cpu"), torch.float32), []
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits are equal, and the first token is the end
    assert tokenizer.eos_token_id == 0
    model.model.register_forward_pre_hook(
        lambda _, arguments, keywords: shapes.append(tuple(keywords["input_ids"].shape)), with_kwargs=True
    )
    suite = Suite(EVALUATION, tokenizer, model.config, tmp_path)
    suite.run(model, "1.000")
    assert len(shapes) == 2
    shapes.clear()
    suite.fill(model)
    longest = max(len(tokenizer(question.prompt)["input_ids"]) for question in TASK.load()) + 1
    assert shapes == [(3, longest), *[(3, 1)] * 7]


def test_milestones_that_find_no_memory_ask_fewer_rows_at_once(
    plain: tuple[Path, dict[str, Any]],
    asked: tuple[Path, dict[str, Any]],
    spec: RaceSpec,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Validation in rows of one, generation in batches of one: answers and losses are those of a run with room."""
    summed, batch, ask = heldout.summed_nll, generate._batch, Milestones.ask
    warm: list[float] = []

    def at_milestones(milestones: Milestones, name: str, fraction: float) -> Any:
        warm.append(fraction)
        return ask(milestones, name, fraction)

    def narrow_validation(adapter: Any, micro: Any) -> Any:
        if warm and len(micro.tokens_BT) > 1:
            raise torch.OutOfMemoryError("no memory for held-out rows")
        return summed(adapter, micro)

    def narrow_generation(model: Any, tokenizer: Any, prompts: list[list[int]], *rest: Any) -> Any:
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("no memory for a cache")
        return batch(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(Milestones, "ask", at_milestones)
    monkeypatch.setattr(heldout, "summed_nll", narrow_validation)
    monkeypatch.setattr(generate, "_batch", narrow_generation)
    with caplog.at_level("INFO"):
        run(spec, tmp_path, data_folder)
    said = [message for message in caplog.messages if "out of memory" in message]
    assert [message.partition("out of memory, ")[2] for message in said] == [
        "1 rows at once from here on: no memory for held-out rows",
        "1 rows at once from here on: no memory for a cache",
    ]
    first = rows_of(tmp_path, "milestone")[0]
    events = rows_of(tmp_path, "out_of_memory")
    assert [(event["step"], event["train_seconds"]) for event in events] == [
        (first["step"], first["train_seconds"])
    ] * 2
    assert [event["message"] for event in events] == [message.partition(": ")[2] for message in said]
    assert step_losses(tmp_path) == step_losses(plain[0])
    for found, wanted in zip(rows_of(tmp_path, "milestone"), rows_of(asked[0], "milestone"), strict=True):
        assert found["val/loss"] == pytest.approx(wanted["val/loss"], rel=1e-6)
        assert found["eval/generated/accuracy"] == wanted["eval/generated/accuracy"]


def test_what_a_milestone_tried_before_it_found_no_memory_is_in_the_log(
    spec: RaceSpec, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(adapter: Any, micro: Any) -> Any:
        raise torch.OutOfMemoryError(f"no memory for {len(micro.tokens_BT)} held-out rows")

    monkeypatch.setattr(heldout, "summed_nll", full)
    monkeypatch.setattr(heldout.HeldOut, "rehearse", lambda *_: None)
    with pytest.raises(torch.OutOfMemoryError, match="no memory for 1 held-out rows"):
        run(spec, tmp_path, data_folder)
    (event,) = rows_of(tmp_path, "out_of_memory")
    assert event["step"] == 4
    assert event["message"] == "out of memory, 1 rows at once from here on: no memory for 2 held-out rows"
    assert len(rows_of(tmp_path, "step")) == 4


def test_one_row_that_finds_no_memory_ends_it() -> None:
    def attempt(rows: int) -> None:
        tried.append(rows)
        raise torch.OutOfMemoryError("no memory")

    tried: list[int] = []
    with pytest.raises(torch.OutOfMemoryError):
        with_fewer(6, attempt, lambda text: None)
    assert tried == [6, 3, 1]


RACE = """
[[data.sources]]
kind = "problems"

[evaluation]
rows = 5

[[evaluation.tasks]]
kind = "gsm8k"
path = "test.jsonl"
"""


def test_a_race_file_asks_tasks_and_finds_their_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "race.toml").write_text(RACE)
    spec = load_race(str(tmp_path / "race.toml"))
    assert spec.evaluation is not None and spec.evaluation.rows == 5 and spec.evaluation.keep_models
    assert spec.evaluation.tasks[0].path == str(tmp_path / "test.jsonl")
    assert RaceSpec.from_plain(json.loads(json.dumps(spec.to_plain()))) == spec
    with pytest.raises(ValueError, match=r"test\.jsonl' does not exist"):
        spec.evaluation.check()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": []}, r"evaluation.tasks \[\]; accepted: at least one"),
        ({"tasks": [{"kind": "generated"}] * 2}, r"tasks \['generated', 'generated'\]; accepted: at least one, each"),
        ({"tasks": [{"kind": "generated", "name": "../x"}]}, r"task name '../x'; accepted: letters"),
        ({"tasks": [{"kind": "generated"}], "rows": 0}, "evaluation.rows = 0; accepted: at least 1"),
        ({"tasks": [{"kind": "generatd"}]}, r"evaluation.tasks\[0\].kind = 'generatd'; did you mean 'generated'"),
        ({"tasks": [{"kind": "generated"}], "keep_model": True}, "unknown key 'evaluation.keep_model'; did you mean"),
        ({"tasks": [{"kind": "generated", "seed": 0}]}, "seed = 0 of task 'generated' is also that of source"),
    ],
)
def test_a_mistake_is_named(spec: RaceSpec, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RaceSpec.from_plain(spec.to_plain() | {"evaluation": changes})


def test_milestones_that_would_share_a_folder_are_refused(spec: RaceSpec) -> None:
    with pytest.raises(ValueError, match="accepted: with evaluation, a thousandth or more apart"):
        replace(spec, milestones=(0.3, 0.30001))
    replace(spec, milestones=(0.3, 0.30001), evaluation=None)


def test_a_model_without_the_positions_is_refused_at_set_up(spec: RaceSpec, data_folder: Path, tmp_path: Path) -> None:
    long = replace(EVALUATION, tasks=(replace(TASK, max_new_tokens=4096),))
    with pytest.raises(
        ValueError, match=r"task 'generated': the longest prompt has .* max_new_tokens = 4096; accepted"
    ):
        run(replace(spec, evaluation=long), tmp_path, data_folder)


def test_questions_that_a_training_document_has_are_named(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(30)]
    texts = {"seen": " ".join(words[5:20]), "unseen": " ".join(words[::-1])}
    rows = [{"question": text, "answer": "#### 1"} for text in texts.values()]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": " ".join(words)}) + "\n")
    task = Gsm8k(path=str(tmp_path / "asked.jsonl"))
    source = Jsonl("prose", path=str(tmp_path / "train.jsonl"))
    seed = TASK.seed
    found = Evaluation((task, TASK)).overlaps([source, Problems(count=50)])
    assert found["gsm8k"] == {"questions": 2, "words": 13, "keys": ["0"]}
    assert found["generated"]["questions"] == 5 and found["generated"]["keys"] == []
    same = Evaluation((TASK,)).overlaps([Problems(count=50, seed=seed)])
    assert same["generated"]["keys"] == [str(number) for number in range(5)]
