"""A text model has no row for the token that stands for images in its tokenizer, as the small Gemma 3 have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from cggr_ray.data.dataset import DataSpec, open_data, prepare
from cggr_ray.data.sources import Jsonl
from cggr_ray.data.tokenizer import SHIPPED, SHIPPED_VOCABULARY, load_tokenizer
from cggr_ray.data_checks import check_tokens
from cggr_ray.evaluation.aime import Aime
from cggr_ray.evaluation.reference import check_reference
from cggr_ray.evaluation.suite import Evaluation
from cggr_ray.loop import run_race
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import RaceSpec, plan_trials

IMAGE = "<image_soft_token>"


def race_of(folder: Path, *said: str) -> RaceSpec:
    """A race of two steps with a small Gemma and its tokenizer, on documents and a question; `said` is one more."""
    tokenizer = load_tokenizer(SHIPPED)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    assert tokenizer.convert_tokens_to_ids(IMAGE) == SHIPPED_VOCABULARY
    tokenizer.save_pretrained(folder / "model")
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Gemma3TextConfig(
            vocab_size=SHIPPED_VOCABULARY, num_key_value_heads=1, max_position_embeddings=128, **shape
        )
        Gemma3ForCausalLM(config).save_pretrained(folder / "model")
    texts = [*(f"Document {i} of some words." for i in range(60)), *said]
    (folder / "own.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "asked.jsonl").write_text(json.dumps({"problem": "What is 1 + 1?", "answer": 2}) + "\n")
    task = Aime(path=str(folder / "asked.jsonl"), samples=1, temperature=0, max_new_tokens=4, pass_at=())
    return RaceSpec(
        recipes=("baseline",),
        budget_seconds=2.0,
        step_seconds=1.0,
        global_rows=2,
        micro_rows=2,
        milestones=(),
        model=ModelSpec(folder=str(folder / "model")),
        data=DataSpec((Jsonl("own", path=str(folder / "own.jsonl")),), 32, tokenizer="model", val_per_mille=200),
        device="cpu",
        evaluation=Evaluation((task,)),
    )


def test_a_race_runs_where_nothing_says_it(tmp_path: Path) -> None:
    spec = race_of(tmp_path)
    prepare(spec.data, tmp_path / "data")
    check_tokens(spec, (), tmp_path / "data")
    check_reference(str(tmp_path / "model"), open_data(spec.data, tmp_path / "data"))
    summary = run_race(plan_trials(spec, tmp_path)[0].placed(tmp_path / "run", tmp_path / "data"))
    assert (summary["status"], summary["steps"], summary["eval/aime/n"]) == ("finished", 2, 1)


def test_a_document_that_says_it_is_refused(tmp_path: Path) -> None:
    spec = race_of(tmp_path, f"An {IMAGE} here.")
    prepare(spec.data, tmp_path / "data")
    said = f"a vocabulary of {SHIPPED_VOCABULARY}; accepted: at least the .*{SHIPPED_VOCABULARY + 1}"
    with pytest.raises(ValueError, match=said):
        check_tokens(spec, (), tmp_path / "data")
    with pytest.raises(ValueError, match=said):
        check_reference(str(tmp_path / "model"), open_data(spec.data, tmp_path / "data"))


def test_a_question_that_says_it_is_refused(tmp_path: Path) -> None:
    spec = race_of(tmp_path)
    prepare(spec.data, tmp_path / "data")
    (tmp_path / "asked.jsonl").write_text(json.dumps({"problem": f"What is on {IMAGE}?", "answer": 2}) + "\n")
    with pytest.raises(ValueError, match=f"task 'aime': a prompt has the token '{IMAGE}'; accepted: the 2048 tokens"):
        check_tokens(spec, (), tmp_path / "data")
