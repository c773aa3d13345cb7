"""Moments, losses and gradients of a saved model against plain Hugging Face forwards; bad folders are refused."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_studies import Folders
from torch import Tensor
from transformers import LlamaForCausalLM

from cggr_ray.data.batch import MicroBatch
from cggr_ray.studies import low_rank
from cggr_ray.studies.factors import Factors, svd
from cggr_ray.studies.moments import relative_errors
from cggr_ray.studies.trained import KINDS, Trained

CPU = torch.device("cpu")


def settings(folders: Folders, **changes: object) -> low_rank.Settings:
    small = {"calibration_rows": 4, "heldout_rows": 5, "micro_rows": 2, "tokens": 16, "rounds": 1, "steps": 4}
    return low_rank.Settings(str(folders.model), str(folders.data), **(small | changes))  # type: ignore[arg-type]


@pytest.fixture
def trained(folders: Folders) -> Trained:
    return Trained(settings(folders), CPU)


@pytest.fixture
def plain(folders: Folders) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folders.model, attn_implementation="eager")


def documents(micro: MicroBatch) -> list[tuple[Tensor, Tensor]]:
    """(tokens, labels) of every document of a micro-batch, padding left out."""
    found = []
    for row in range(len(micro.tokens_BT)):
        starts = [*(micro.positions_BT[row] == 0).nonzero().flatten().tolist(), micro.tokens_BT.shape[1]]
        for start, stop in pairwise(starts):
            if micro.position_ids_BT[row, start] >= 0:
                found.append((micro.tokens_BT[row, start:stop], micro.labels_BT[row, start:stop]))
    return found


@torch.no_grad()
def test_heldout_loss_is_that_of_the_documents_one_by_one(trained: Trained, plain: LlamaForCausalLM) -> None:
    nats, labelled = 0.0, 0
    for micro in trained.heldout:
        for tokens, labels in documents(micro):
            logits = plain(tokens.unsqueeze(0)).logits[0].double()
            nats += float(F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
            labelled += int((labels != -100).sum())
    assert labelled == trained.facts()["heldout_tokens"] > 100
    assert trained.full_loss == pytest.approx(nats / labelled, rel=1e-5)


@torch.no_grad()
def test_moments_and_errors_are_those_of_the_activations(trained: Trained, plain: LlamaForCausalLM) -> None:
    read: dict[str, list[Tensor]] = {}
    inside = {kind: name for kind in KINDS for name, _ in plain.named_modules() if name.endswith(f"1.{_path(kind)}")}
    for kind, name in inside.items():
        module = plain.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, kind=kind: read.setdefault(kind, []).append(args[0][0]))
    for micro in trained.calibration:
        for tokens, _ in documents(micro):
            plain(tokens.unsqueeze(0))
    moments = trained.moments(trained.calibration)
    for matrix in trained.matrices:
        if matrix.layer == 1:
            x_NI = torch.cat(read[matrix.kind]).double()
            found = moments[matrix.reads]
            assert found.count == len(x_NI)
            torch.testing.assert_close(found.gram_II, x_NI.mT @ x_NI, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(found.mean_absolute_I, x_NI.abs().mean(0), rtol=1e-4, atol=1e-4)
            weight = matrix.weight_OI.double()
            other = weight + 0.1 * torch.randn_like(weight)
            errors = relative_errors([(weight, other, found.gram_II)])
            assert errors[0] == pytest.approx(float((weight - other).norm() / weight.norm()))
            wanted = float((x_NI @ (weight - other).mT).norm() / (x_NI @ weight.mT).norm())
            assert errors[1] == pytest.approx(wanted, rel=1e-3)


def _path(kind: str) -> str:
    return f"mlp.{kind}_proj" if kind in ("gate", "up", "down") else f"self_attn.{kind}_proj"


def test_replaced_weights_come_back(trained: Trained) -> None:
    before = {name: p.clone() for name, p in trained.adapter.model.named_parameters()}
    downs = [matrix for matrix in trained.matrices if matrix.kind == "down"]
    with trained.replaced(downs, [torch.zeros_like(m.weight_OI) for m in downs]):
        assert all(not m.weight_OI.any() for m in downs) and trained.heldout_loss() != trained.full_loss
    assert all(p.equal(before[name]) for name, p in trained.adapter.model.named_parameters())
    assert trained.heldout_loss() == trained.full_loss


def test_gradients_of_factors_are_those_of_autograd() -> None:
    g = torch.Generator().manual_seed(0)
    left, right, x = (torch.randn(size, generator=g, dtype=torch.float64) for size in ((5, 2), (2, 7), (11, 7)))
    weight = (left @ right).requires_grad_()
    (x @ weight.mT).sin().sum().backward()
    left.requires_grad_(), right.requires_grad_()
    (x @ (left @ right).mT).sin().sum().backward()
    assert weight.grad is not None
    found = low_rank.factor_gradients(left.detach(), right.detach(), weight.grad)
    torch.testing.assert_close(found, (left.grad, right.grad))


def test_the_distillation_loss_is_cross_entropy_and_kl_by_hand(trained: Trained, plain: LlamaForCausalLM) -> None:
    micro = trained.calibration[0]
    teacher = low_rank.teacher_hidden(trained, micro)
    downs = [matrix for matrix in trained.matrices if matrix.kind == "down"]
    halves = [m.weight_OI.detach() / 2 for m in downs]
    total, count = 0.0, 0
    student = LlamaForCausalLM.from_pretrained(plain.name_or_path)
    with torch.no_grad():
        for m, half in zip(downs, halves, strict=True):
            student.model.layers[m.layer].mlp.down_proj.weight.copy_(half)
        for tokens, labels in documents(micro):
            log_p, log_q = (m(tokens.unsqueeze(0)).logits[0].log_softmax(-1) for m in (plain, student))
            for i in range(len(tokens)):
                if labels[i] != -100:
                    total += float(-log_q[i, labels[i]] + (log_p[i].exp() * (log_p[i] - log_q[i])).sum())
                    count += 1
    with trained.replaced(downs, halves):
        found = low_rank.distillation_loss(trained, micro, teacher).detach()
        assert float(found) == pytest.approx(total / count, rel=1e-4)


def test_training_the_factors_lowers_what_it_minimises(folders: Folders) -> None:
    chosen = settings(folders, steps=12)
    trained = Trained(chosen, CPU)
    matrices = [matrix for matrix in trained.matrices if matrix.kind == "gate"]
    start = [svd(m.weight_OI.detach(), torch.empty(0), [2])[0] for m in matrices]
    teachers = [low_rank.teacher_hidden(trained, micro) for micro in trained.calibration]

    def loss(factors: list[Factors]) -> float:
        with torch.no_grad(), trained.replaced(matrices, [f.dense_OI() for f in factors]):
            return sum(
                float(low_rank.distillation_loss(trained, m, t))
                for m, t in zip(trained.calibration, teachers, strict=True)
            )

    assert loss(low_rank.trained_factors(trained, chosen, matrices, start)) < loss(start)
    assert trained.heldout_loss() == trained.full_loss
    same = low_rank.trained_factors(trained, settings(folders, steps=0), matrices, start)
    assert all(a.dense_OI().equal(b.dense_OI()) for a, b in zip(same, start, strict=True))


def test_what_cannot_be_studied_is_refused_before_anything_is_loaded(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no ready\.json; accepted: the data folder of a race"):
        low_rank.Settings(str(folders.model), str(tmp_path))
    shutil.copytree(folders.model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"model family 'gpt2' .*accepted: llama, "):
        low_rank.Settings(str(tmp_path / "model"), str(folders.data))
    with pytest.raises(ValueError, match=r"fractions: 0.0; accepted: numbers in \(0, 1\]"):
        settings(folders, fractions=(0.5, 0.0))
    with pytest.raises(ValueError, match="rounds = 0; accepted: at least 1"):
        settings(folders, rounds=0)
