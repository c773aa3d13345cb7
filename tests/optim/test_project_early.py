"""Gradients that are projected inside the backward pass."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from small_optimizers import HALF, OPTIMIZERS, at, build, snapshot, wide

from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.optimizer import Optimizer


def losses(model, seed, micro_batches):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(micro_batches):
        tokens = torch.randint(0, 96, (2, 24), generator=generator)
        yield model(input_ids=tokens, labels=tokens).loss / micro_batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", ["galore", "galore8", "galore_adamw"])
def test_projecting_early_equals_projecting_at_the_step(name, micro_batches, dtype):
    late = replace(OPTIMIZERS[name], matrix=replace(OPTIMIZERS[name].matrix, refresh_every=3))
    runs = [(model, build(model, config)) for config in (late, replace(late, project_early=True))
            for model in [wide(dtype)]]  # fmt: skip
    start = snapshot(runs[0][1])
    for step in range(5):
        norms = []
        for model, optimizer in runs:
            optimizer.begin(at(step))
            for loss in losses(model, step, micro_batches):
                loss.backward()
                if micro_batches > 1:
                    optimizer.accumulate()
            norms.append(optimizer.step(at(step)))
            assert all(p.grad is None for p in model.parameters())
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    found, expected = snapshot(runs[1][1]), snapshot(runs[0][1])
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5, msg=key)
        assert value.ndim == 0 or not torch.equal(value, start[key])


def test_no_projected_gradient_outlives_its_place_in_the_backward_pass():
    model = wide()
    optimizer = build(model, replace(OPTIMIZERS["galore"], project_early=True))
    projected, short = [], []
    for name, p in model.named_parameters():
        if name.startswith("model.layers") and p.ndim == 2:
            (short if min(p.shape) < 64 else projected).append(p)
    assert len(projected) == 10 and len(short) == 4
    held = []
    for name, p in model.named_parameters():
        if "norm" in name or "embed" in name:
            p.register_post_accumulate_grad_hook(lambda _: held.append(sum(q.grad is not None for q in projected)))
    optimizer.begin(at())
    for loss in losses(model, 0, 1):
        loss.backward()
    assert held == [0] * 6 and all(p.grad is None for p in projected) and all(p.grad is not None for p in short)
    before = [p.detach().clone() for p in projected]
    assert optimizer.step(at()).isfinite()
    assert not any(torch.equal(p, q) for p, q in zip(projected, before, strict=True))


def test_hooks_keep_no_optimizer_alive():
    model = wide()
    optimizer = build(model, replace(OPTIMIZERS["galore"], project_early=True))
    stacks = [weakref.ref(stack) for stack in optimizer.stacks.values()]
    del optimizer
    gc.collect()
    assert not any(stack() for stack in stacks)
    next(losses(model, 0, 1)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_an_interrupted_step_left_is_gone():
    models = [wide(), wide()]
    optimizers = [build(model, replace(OPTIMIZERS["galore"], project_early=True)) for model in models]
    optimizers[0].begin(at())
    next(losses(models[0], 7, 1)).backward()
    models[0].zero_grad()
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.begin(at())
        next(losses(model, 3, 1)).backward()
        optimizer.step(at())
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_a_missing_gradient_is_noticed_where_gradients_are_projected_early():
    model = wide()
    optimizer = build(model, replace(OPTIMIZERS["galore"], project_early=True))
    optimizer.begin(at())
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    next(losses(model, 0, 1)).backward()
    with pytest.raises(AssertionError, match="no gradient"):
        optimizer.step(at())


@pytest.mark.parametrize("early", [False, True])
def test_bases_follow_all_gradients_at_first_and_then_each_once_a_period(early, monkeypatch):
    model, seen, refresh = wide(), [], GaLore.refresh
    config = replace(OPTIMIZERS["galore"], matrix=GaLore(**HALF, refresh_every=5), project_early=early)
    optimizer = build(model, config)

    def watched(self, gradient, state, which, first):
        assert len(gradient) == which.stop - which.start
        seen.extend((id(state), i, first) for i in range(which.start, which.stop))
        refresh(self, gradient, state, which, first)

    monkeypatch.setattr(GaLore, "refresh", watched)
    every = {(id(s.state), i) for s in optimizer.stacks.values() if s.rule.projects(s.state)
             for i in range(len(s.parameters))}  # fmt: skip
    for step in range(6):
        optimizer.begin(at(step))
        for loss in losses(model, step, 2):
            loss.backward()
            optimizer.accumulate()
        optimizer.step(at(step))
        if step == 0:
            assert len(seen) == 10 and set(seen) == {(*one, True) for one in every}
            seen.clear()
    assert len(seen) == 10 and set(seen) == {(*one, False) for one in every}


@pytest.mark.parametrize("matrix", [Muon(), AdamW()])
def test_projecting_early_is_refused_where_nothing_is_projected(matrix):
    with pytest.raises(ValueError, match="project_early with a rule that projects nothing"):
        Optimizer(matrix=matrix, project_early=True)
