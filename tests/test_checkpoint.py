from __future__ import annotations

import copy
import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_batches import batches_of
from small_learners import everything, same
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from cggr_ray import checkpoint
from cggr_ray.data.batch import Batch
from cggr_ray.data.packing import RowOrder
from cggr_ray.data.store import TokenStore
from cggr_ray.data.tokenizer import SHIPPED, load_tokenizer
from cggr_ray.learner import Learner
from cggr_ray.models.adapter import Adapter
from cggr_ray.progress import Progress
from cggr_ray.recipe import Recipe
from cggr_ray.workers import ALONE, Workers

CPU = torch.device("cpu")
SELECTING = {"kind": "selected_tokens", "selection": "stratified", "curriculum": {"target_at": 0.0}, "dynamic": {}}


@pytest.fixture
def batches(make_store: Callable[..., TokenStore]) -> list[Batch]:
    rng = random.Random(0)
    order = RowOrder([make_store([rng.randint(3, 60) for _ in range(60)])], (1.0,), (None,), 32, False, 2)
    return batches_of(order, 6, 4, 2, CPU)


def learner(model: PreTrainedModel, recipe: Recipe) -> Learner:
    return Learner(recipe, Adapter(copy.deepcopy(model)), seed=4, num_positions=3600)


def train(learner: Learner, batches: list[Batch], first: int) -> None:
    for step, batch in enumerate(batches, first):
        progress = Progress(step, float(step), 20.0, 128 * step)
        row = learner.step(batch, progress)
        learner.observe({k: float(v) for k, v in row.device_values.items() if v.ndim == 0}, progress)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selecting", [False, True])
def test_training_goes_on_exactly_where_it_was_saved(
    tmp_path: Path, tiny_model: PreTrainedModel, batches: list[Batch], selecting: bool, dtype: torch.dtype
) -> None:
    recipe = Recipe("x").with_values({"tokens": SELECTING} if selecting else {})
    model = tiny_model.to(dtype)
    whole = learner(model, recipe)
    train(whole, batches[:3], 0)
    saved, router = everything(whole), whole.state_dict()
    folder = checkpoint.save(tmp_path, 3, whole, {"extra": [1, None, "two"]})
    train(whole, batches[3:], 3)
    assert not same(everything(whole), saved)

    resumed = learner(model, recipe)
    train(resumed, batches[:1], 0)
    state = checkpoint.load(folder, resumed)
    assert (state["step"], state["extra"]) == (3, [1, None, "two"])
    assert same(everything(resumed), saved)
    assert resumed.state_dict() == router
    assert selecting == any(v is not None for v in router["router"].values())
    train(resumed, batches[3:], 3)
    assert same(everything(resumed), everything(whole))


def test_the_last_two_are_kept_and_the_newest_found(tmp_path: Path, tiny_model: PreTrainedModel) -> None:
    one = learner(tiny_model, Recipe("x"))
    assert checkpoint.newest(tmp_path) == (None, "")
    for step in (1, 2, 9, 10, 100):
        checkpoint.save(tmp_path, step, one, {})
        newest, _ = checkpoint.newest(tmp_path)
        assert newest is not None and checkpoint.load(newest, one)["step"] == step
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    checkpoint.remove_all(tmp_path)
    assert checkpoint.newest(tmp_path) == (None, "")


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_files_have_the_permissions_of_the_umask(umask: int, tmp_path: Path, tiny_model: PreTrainedModel) -> None:
    before = os.umask(umask)
    try:
        saved = checkpoint.save(tmp_path, 1, learner(tiny_model, Recipe("x")), {})
        checkpoint.save_model(tmp_path / "model", tiny_model, load_tokenizer(SHIPPED), {"note.json": {}})
    finally:
        os.umask(before)
    files = [*saved.iterdir(), *(tmp_path / "model").iterdir()]
    assert len([file for file in files if file.suffix == ".safetensors"]) == 5
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (saved, tmp_path / "model")} == {0o777 & ~umask}


def test_a_model_with_several_chat_templates_has_a_folder_that_can_be_entered(
    tmp_path: Path, tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, sync, synced = load_tokenizer(SHIPPED), os.fsync, set[str]()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}

    def seen(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    checkpoint.save_model(tmp_path / "model", tiny_model, tokenizer, {})
    (file,) = tmp_path.glob("model/*/tool_use.jinja")
    assert stat.S_IMODE(file.parent.stat().st_mode) == stat.S_IMODE(file.parent.parent.stat().st_mode)
    assert {file.name, file.parent.name} <= synced
    assert load_tokenizer(tmp_path / "model").chat_template == tokenizer.chat_template


def test_all_workers_go_on_from_what_the_first_one_finds(tmp_path: Path, tiny_model: PreTrainedModel) -> None:
    class Second(Workers):
        rank, size = 1, 2

        def first(self, value: float) -> float:
            return 2.0

    one = learner(tiny_model, Recipe("x"))
    newer = checkpoint.save(tmp_path, 3, one, {})
    assert checkpoint.newest_of_first(tmp_path, ALONE) == (newer, "")
    with pytest.raises(RuntimeError, match=r"worker 1 sees no .*step_00000002; accepted: a folder that all"):
        checkpoint.newest_of_first(tmp_path, Second())
    older = checkpoint.save(tmp_path, 2, one, {})
    assert checkpoint.newest_of_first(tmp_path, Second()) == (older, "")


def test_a_half_written_one_does_not_count(tmp_path: Path, tiny_model: PreTrainedModel) -> None:
    one = learner(tiny_model, Recipe("x"))
    whole = checkpoint.save(tmp_path, 1, one, {})

    class Killed(Exception):
        pass

    def dies(*_: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, 2, one, {})
    assert list((tmp_path / "checkpoints").iterdir()) == [whole]
    assert checkpoint.newest(tmp_path) == (whole, "")
    again = checkpoint.save(tmp_path, 2, one, {})
    assert checkpoint.newest(tmp_path) == (again, "")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == sorted((whole.name, again.name))


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 3}, {"tie_word_embeddings": False}, {"intermediate_size": 64}]
)
def test_another_model_is_refused(
    tmp_path: Path, tiny_model: PreTrainedModel, tiny_config: LlamaConfig, change: dict[str, object]
) -> None:
    folder = checkpoint.save(tmp_path, 1, learner(tiny_model, Recipe("x")), {})
    other = AutoModelForCausalLM.from_config(LlamaConfig(**(tiny_config.to_dict() | change)))
    with pytest.raises(ValueError, match="holds another model"):
        checkpoint.load(folder, learner(other, Recipe("x")))


def test_a_checkpoint_of_another_version_is_refused_before_anything_is_loaded(
    tmp_path: Path, tiny_model: PreTrainedModel
) -> None:
    one = learner(tiny_model, Recipe("x"))
    folder = checkpoint.save(tmp_path, 3, one, {})
    saved = everything(one)
    with torch.no_grad():
        for _, parameter in one.adapter.named_parameters():
            parameter.zero_()
    emptied = everything(one)
    state = json.loads((folder / "state.json").read_text())
    for wrong in (state | {"format": 0}, {name: value for name, value in state.items() if name != "format"}):
        (folder / "state.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"format = (0|None); accepted: 2, this version's"):
            checkpoint.load(folder, one)
        assert same(everything(one), emptied)
    (folder / "state.json").write_text(json.dumps(state))
    checkpoint.load(folder, one)
    assert same(everything(one), saved) and not same(saved, emptied)


def test_nothing_of_it_is_a_pickle(tmp_path: Path, tiny_model: PreTrainedModel) -> None:
    folder = checkpoint.save(tmp_path, 1, learner(tiny_model, Recipe("x")), {})
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}


def text_in(folder: Path) -> str:
    return (folder / "text").read_text()


def test_a_folder_is_replaced_after_a_kill_in_the_middle_of_that(tmp_path: Path) -> None:
    """Killed after the new folder had its place, while the old one was removed; then before the new one had it."""
    final, before = tmp_path / "model", tmp_path / ".model.before"
    for folder in (final, before):
        folder.mkdir()
        (folder / "text").write_text(folder.name)
    with checkpoint.whole(final) as aside:
        (aside / "text").write_text("newer")
    assert text_in(final) == "newer" and list(tmp_path.iterdir()) == [final]
    final.rename(before)
    with pytest.raises(RuntimeError, match="nothing is written"), checkpoint.whole(final):
        assert text_in(final) == "newer"
        raise RuntimeError("nothing is written")
    assert text_in(final) == "newer" and list(tmp_path.iterdir()) == [final]
