"""CGGRModel and CGGRWrapper inside `transformers.Trainer`, which needs the package accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import small_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from cggr_ray import CGGRModel, CGGRWrapper


class CountSteps(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if isinstance(model, CGGRModel | CGGRWrapper):
            model.step()


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Rows of one length, padded on the right, with prompts that have no label."""
    g = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        tokens = torch.randint(96, (14,), generator=g)
        mask, labels = torch.ones_like(tokens), tokens.clone()
        mask[14 - i % 5 :], labels[14 - i % 5 :], labels[: i % 4] = 0, -100, -100
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return found


def trained(model: nn.Module, folder: Path, resume: bool = False, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=1,
        **{"save_strategy": "no"} | options,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(16), eval_dataset=rows(4), callbacks=[CountSteps()])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Trainer) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])


def test_with_everything_kept_it_is_the_trainer_s_own_run(tmp_path: Path) -> None:
    plain, model = small_model("llama"), small_model("llama")
    own = trained(plain, tmp_path, num_train_epochs=1)
    found = trained(CGGRModel(model, min_tokens_ratio=1.0, return_dict=True), tmp_path, num_train_epochs=1)
    assert len(losses(own)) == 4
    torch.testing.assert_close(losses(found), losses(own), rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(found.evaluate()["eval_loss"], own.evaluate()["eval_loss"], rtol=1e-4, atol=1e-4)


def test_a_selecting_run_learns_and_counts_its_steps(tmp_path: Path) -> None:
    model = small_model("qwen2")
    cggr = CGGRModel(model, min_tokens_ratio=0.5, warmup_steps=4, return_dict=True)
    before = cggr.eval()(**torch.utils.data.default_collate(rows(4))).loss.item()
    trainer = trained(cggr, tmp_path, num_train_epochs=3, bf16=True)
    assert int(cggr.curriculum.num_steps) == trainer.state.global_step == 12
    assert trainer.evaluate()["eval_loss"] < before - 0.3
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_checkpoints_of_the_trainer_hold_the_steps(tmp_path: Path) -> None:
    def run(folder: Path, resume: bool, steps: int) -> CGGRModel:
        cggr = CGGRModel(small_model("llama"), warmup_steps=4, return_dict=True)
        options: dict[str, Any] = {"max_steps": steps, "save_steps": 2, "lr_scheduler_type": "constant"}
        trained(cggr, folder, resume, save_strategy="steps", **options)
        return cggr

    whole = run(tmp_path / "whole", False, 4)
    run(tmp_path / "parts", False, 2)
    resumed = run(tmp_path / "parts", True, 4)
    assert resumed.curriculum.steps == int(resumed.curriculum.num_steps) == 4
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("engine", ["sparse", "every"])
def test_a_wrapper_with_one_bucket_is_the_trainer_s_own_run(engine: str, tmp_path: Path) -> None:
    own = trained(small_model("llama"), tmp_path, num_train_epochs=1)
    wrapper = CGGRWrapper(small_model("llama"), num_buckets=1, engine=engine, return_dict=True)
    found = trained(wrapper, tmp_path, num_train_epochs=1)
    torch.testing.assert_close(losses(found), losses(own), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.evaluate()["eval_loss"], own.evaluate()["eval_loss"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["sparse", "faithful"])
def test_checkpoints_of_the_trainer_hold_a_wrapper_s_steps(engine: str, tmp_path: Path) -> None:
    for resume, steps in ((False, 1), (True, 2)):
        wrapper = CGGRWrapper(small_model("llama"), num_buckets=3, warmup_steps=2, engine=engine, return_dict=True)
        trained(wrapper, tmp_path, resume, max_steps=steps, save_strategy="steps", save_steps=1)
        assert wrapper.curriculum.steps == int(wrapper.curriculum.num_steps) == steps
