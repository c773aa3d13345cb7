"""The reference model's losses: every position once, kept on disk, checked early, and a run that subtracts them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import KilledError, killed_after, step_losses
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cggr_ray import commands
from cggr_ray.data.dataset import DataSpec, PreparedData, open_data, prepare
from cggr_ray.data.sources import Jsonl, Problems
from cggr_ray.data.store import TokenStore
from cggr_ray.data_checks import check_tokens
from cggr_ray.evaluation import reference
from cggr_ray.evaluation.reference import all_rows, check_reference, compute, fingerprint, reference_nll
from cggr_ray.loop import run_race
from cggr_ray.models.adapter import Adapter
from cggr_ray.models.presets import ModelSpec
from cggr_ray.race import RaceSpec, Trial, load_race, plan_trials
from cggr_ray.recipe import Recipe, load_recipe

CPU, FLOAT = torch.device("cpu"), torch.float32
STEP_SECONDS, ROW_TOKENS = 0.5, 32
DATA = DataSpec(sources=(Problems(count=150),), row_tokens=64, val_documents=4)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare(DATA, folder)
    return folder


@pytest.fixture(scope="module")
def data(data_folder: Path) -> PreparedData:
    return open_data(DATA, data_folder)


def save_model(folder: Path, seed: int = 1, vocabulary: int = 2048, positions: int = 64) -> str:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=positions, **shape)
        LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> str:
    found = save_model(tmp_path_factory.mktemp("models") / "reference")
    data.tokenizer.save_pretrained(found)
    return found


# The table


@pytest.fixture
def stores(make_store: Callable[..., TokenStore]) -> tuple[TokenStore, ...]:
    rng = random.Random(0)
    return tuple(make_store([rng.randint(*r) for _ in range(25)], seed=s) for s, r in enumerate(((2, 30), (20, 90))))


@pytest.fixture
def by_stores(stores: tuple[TokenStore, ...]) -> PreparedData:
    spec = DataSpec((Jsonl("short"), Jsonl("long")), ROW_TOKENS, mask_prompts=True)
    return PreparedData(spec, None, stores, stores)  # type: ignore[arg-type]


def by_hand(model: PreTrainedModel, stores: tuple[TokenStore, ...]) -> torch.Tensor:
    """Piece by piece in float64; NaN where a document ends."""
    found = []
    for store in stores:
        for d in range(store.documents):
            tokens = torch.from_numpy(store.tokens[store.offsets[d] : store.offsets[d + 1]].astype(int))
            for at in range(0, len(tokens) - 1, ROW_TOKENS):
                piece = tokens[at : at + ROW_TOKENS + 1]
                log_p = model(piece[:-1].unsqueeze(0)).logits[0].log_softmax(-1)
                found += (-log_p[torch.arange(len(piece) - 1), piece[1:]]).tolist()
            found.append(torch.nan)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("micro_rows", [1, 5])
def test_the_table_is_a_plain_forward_of_every_document(
    tiny_model: PreTrainedModel, by_stores: PreparedData, micro_rows: int
) -> None:
    with torch.no_grad():
        expected = by_hand(copy.deepcopy(tiny_model).double().eval(), by_stores.train)
    said: list[str] = []
    table = compute(Adapter(tiny_model), by_stores, micro_rows, said.append)
    assert table.shape == (by_stores.num_positions + 1,) and table.dtype == torch.float16
    assert table[-1].isnan()
    torch.testing.assert_close(table[:-1].double(), expected, rtol=6e-4, atol=1e-4, equal_nan=True)
    assert said[-1].endswith("100% of the positions") and 3 <= len(said) <= 10


def test_every_position_comes_once_and_in_small_blocks_too(
    by_stores: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = np.concatenate([s.offsets[1:] - 1 + base for s, base in zip(
        by_stores.train, (0, len(by_stores.train[0].tokens)), strict=True)])  # fmt: skip
    expected = np.ones(by_stores.num_positions, int)
    expected[ends] = 0
    for blocks in (128, 2):
        monkeypatch.setattr(reference, "BLOCK_ROWS", blocks)
        rows = list(all_rows(by_stores, by_stores.order().shape))
        ids = np.concatenate([row.position_ids for row in rows])
        assert (np.bincount(ids[ids >= 0], minlength=by_stores.num_positions) == expected).all()
        # Prompts are masked in training, not here.
        assert all(row.labelled == row.real for row in rows)


def test_a_model_whose_loss_is_not_finite_is_refused(tiny_model: PreTrainedModel, by_stores: PreparedData) -> None:
    with torch.no_grad():
        tiny_model.get_input_embeddings().weight[7] = torch.nan
    with pytest.raises(ValueError, match=r"not finite at \d+ of \d+ positions; accepted: a trained model"):
        compute(Adapter(tiny_model), by_stores, 4)


# The file


def test_it_is_computed_once_and_read_afterwards(
    folder: str, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    first = reference_nll(folder, data, tmp_path, 4, CPU, FLOAT, said.append)
    (file,) = tmp_path.iterdir()
    assert file.name == f"reference-{fingerprint(folder, data, FLOAT)}.npy"
    assert np.load(file, allow_pickle=False).shape == (data.num_positions,)
    monkeypatch.setattr(reference, "compute", None)
    again = reference_nll(folder, data, tmp_path, 4, CPU, FLOAT, said.append)
    assert torch.equal(first.nan_to_num(-1), again.nan_to_num(-1)) and again.dtype == torch.float16
    assert folder in said[0] and said[-1].startswith("reading reference-")


def test_an_order_of_another_seed_reads_what_the_first_one_computed(
    folder: str, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reference_nll(folder, data, tmp_path, 4, CPU, FLOAT)
    other = replace(data, spec=replace(data.spec, seed=data.spec.seed + 1))
    computed = compute(Adapter(ModelSpec(folder=folder).build(None, 0, CPU, FLOAT)), other, 4)
    assert torch.equal(first.nan_to_num(-1), computed.nan_to_num(-1))
    monkeypatch.setattr(reference, "compute", None)
    again = reference_nll(folder, other, tmp_path, 4, CPU, FLOAT)
    assert torch.equal(first.nan_to_num(-1), again.nan_to_num(-1))


def test_another_model_other_data_and_another_precision_are_other_files(
    folder: str, data: PreparedData, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other", seed=2)
    longer = replace(data, spec=replace(data.spec, row_tokens=32))
    store = data.train[0]
    moved = replace(data, train=(replace(store, offsets=store.offsets + 1),))
    names = {
        fingerprint(where, found, dtype)
        for where, found, dtype in (
            *((folder, d, FLOAT) for d in (data, longer, moved)),
            (folder, data, torch.bfloat16),
            (other, data, FLOAT),
        )
    }
    assert len(names) == 5


def test_trials_side_by_side_leave_one_whole_file(
    folder: str, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[torch.Tensor] = []

    def slow(*args: Any) -> torch.Tensor:
        """Another trial begins and ends while this one computes."""
        if not found:
            found.append(torch.empty(0))
            found.append(reference_nll(folder, data, tmp_path, 4, CPU, FLOAT))
            assert [f.suffix for f in tmp_path.iterdir()] == [".npy"]
        return compute(*args)

    monkeypatch.setattr(reference, "compute", slow)
    found.append(reference_nll(folder, data, tmp_path, 4, CPU, FLOAT))
    (file,) = tmp_path.iterdir()
    assert torch.equal(found[1].nan_to_num(-1), found[2].nan_to_num(-1))
    assert np.array_equal(np.load(file, allow_pickle=False), found[2][:-1].numpy(), equal_nan=True)


def test_a_failed_write_leaves_nothing(data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="no space"):
        reference._write(tmp_path / "reference.npy", np.zeros(3, np.float16))
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_shape_or_with_objects_is_refused(folder: str, data: PreparedData, tmp_path: Path) -> None:
    file = tmp_path / f"reference-{fingerprint(folder, data, FLOAT)}.npy"
    np.save(file, np.zeros(3, np.float16))
    with pytest.raises(ValueError, match=r"holds float16 \(3,\); accepted"):
        reference_nll(folder, data, tmp_path, 4, CPU, FLOAT)
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        reference_nll(folder, data, tmp_path, 4, CPU, FLOAT)


# Mistakes


def test_a_reference_that_does_not_fit_the_data(folder: str, data: PreparedData, tmp_path: Path) -> None:
    check_reference(folder, data)
    with pytest.raises(ValueError, match=r"vocabulary of 512; accepted: at least the 2048 tokens"):
        check_reference(save_model(tmp_path / "small", vocabulary=512), data)
    with pytest.raises(ValueError, match=r"has 32 positions; accepted: at least row_tokens = 64"):
        check_reference(save_model(tmp_path / "short", positions=32), data)
    with pytest.raises(ValueError, match=r"has no config\.json; accepted"):
        check_reference(str(tmp_path / "nowhere"), data)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    with pytest.raises(ValueError, match=r"model family 'gpt_neox'; accepted: llama"):
        check_reference(str(tmp_path / "small"), data)
    other = save_model(tmp_path / "other")
    data.tokenizer.save_pretrained(other)
    table = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"another id for the token '[ab]' in its tokenizer\.json; accepted"):
        check_reference(other, data)


def test_a_race_refuses_it_before_anything_runs(folder: str, data_folder: Path, tmp_path: Path) -> None:
    values = {"tokens.score": "excess", "tokens.reference": str(tmp_path / "nowhere")}
    spec = RaceSpec(recipes=("baseline", "cggr_loss"), data=DATA, arms={"cggr_loss": values})
    with pytest.raises(ValueError, match=r"nowhere' has no config\.json"):
        spec.recipe("cggr_loss")
    small = save_model(tmp_path / "small", vocabulary=512)
    for where, refused in ((folder, False), (small, True)):
        spec = replace(spec, arms={"cggr_loss": values | {"tokens.reference": where}})
        if refused:
            with pytest.raises(ValueError, match="vocabulary of 512"):
                check_tokens(spec, map(spec.recipe, spec.recipes), data_folder)
        else:
            check_tokens(spec, map(spec.recipe, spec.recipes), data_folder)
    with pytest.raises(ValueError, match=r"model 'small' with a vocabulary of 512"):
        check_tokens(replace(spec, model=ModelSpec(folder=small)), [], data_folder)


def test_paths_are_relative_to_the_file_or_to_where_the_command_runs(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").symlink_to(Path(folder).parent)
    inner = tmp_path / "inner"
    inner.mkdir()
    part = '{kind = "selected_tokens", score = "excess", reference = "../models/reference"}'
    (inner / "mine.toml").write_text(f"tokens = {part}\n")
    recipe = load_recipe(str(inner / "mine.toml"))
    assert recipe.reference == folder and Recipe.from_plain(json.loads(json.dumps(recipe.to_plain()))) == recipe
    assert load_recipe("cggr_loss").reference is None is load_recipe("baseline").reference
    (inner / "race.toml").write_text(
        'recipes = ["cggr_loss", "random_tokens"]\n[values]\n"tokens.curriculum.target_at" = 0.2\n'
        f'[arms.cggr_loss]\n"tokens.score" = "excess"\n"tokens.reference" = "../models/reference"\n'
        f"[arms.random_tokens]\ntokens = {part}\n"
    )
    race = load_race(str(inner / "race.toml"))
    assert {race.recipe(name).reference for name in race.recipes} == {folder}
    monkeypatch.chdir(tmp_path)
    values = {"cggr_loss:tokens.score": "excess", "cggr_loss:tokens.reference": "models/reference"}
    assert commands.specify(None, {"device": "cpu"}, values).recipe("cggr_loss").reference == folder


# A run


@pytest.fixture(scope="module")
def spec() -> RaceSpec:
    return RaceSpec(
        recipes=("cggr_loss",),
        budget_seconds=8 * STEP_SECONDS,
        step_seconds=STEP_SECONDS,
        global_rows=4,
        micro_rows=4,
        milestones=(),
        model=ModelSpec(preset="tiny"),
        data=DATA,
        device="cpu",
    )


def trial_of(spec: RaceSpec, folder: Path, data_folder: Path) -> Trial:
    return plan_trials(spec, folder)[0].placed(folder, data_folder)


@pytest.mark.parametrize("early", [False, True])
def test_a_run_resumes_exactly_and_reads_what_the_first_one_wrote(
    early: bool, spec: RaceSpec, folder: str, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"plan": "before", "router": {"kind": "truncated_router", "layers": 1}} if early else {"plan": "after"}
    part = {"kind": "selected_tokens", "score": "excess", "reference": folder, **plan}
    spec = replace(spec, values={"optimizer.schedule.warmup_tokens": 1000, "tokens": part})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run_race(trial_of(spec, whole, data_folder))
    assert len(list(data_folder.glob("reference-*.npy"))) == 1
    monkeypatch.setattr(reference, "compute", None)

    saving = replace(spec, checkpoint_every_seconds=4 * STEP_SECONDS)
    with pytest.raises(KilledError):
        run_race(trial_of(saving, parts, data_folder), killed_after(5.5 * STEP_SECONDS))
    found = run_race(trial_of(saving, parts, data_folder))
    assert step_losses(parts) == step_losses(whole) and len(step_losses(whole)) == 8
    assert found["val/loss"] == expected["val/loss"]
