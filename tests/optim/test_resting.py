"""Parameters that rest: nothing of them moves, the others learn as if alone, and what happens when they wake."""

import copy
from dataclasses import replace

import pytest
import torch
from small_optimizers import CPU, OPTIMIZERS, STEADY, Plain, at, build, llama, random_gradients

from cggr_ray.models.adapter import Adapter
from cggr_ray.optim import stack as stack_module
from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.optimizer import Optimizer
from cggr_ray.optim.state_formats import Int8Blockwise
from cggr_ray.updates.relevance import Probe

SUFFIX, SCATTERED = (False, False, True, True), (True, False, True, False)
CONFIGS = {"muon": Optimizer(Muon(weight_decay=0.1), AdamW(weight_decay=0.1), schedule=STEADY)} | OPTIMIZERS


def four_layers(dtype=torch.float32):
    return llama(tied=False, dtype=dtype, vocab_size=80, hidden_size=96, intermediate_size=128, num_hidden_layers=4)


def rest(model, active):
    """Sets which layers learn; returns the names of the parameters that do."""
    Adapter(model).set_active_layers(active)
    return [name for name, p in model.named_parameters() if p.requires_grad]


def give(model, seed):
    random_gradients(model, seed)
    for p in model.parameters():
        if not p.requires_grad:
            p.grad = None


def rows(optimizer, model, names):
    """Copies of every tensor's row of these parameters: (parameter, tensor) -> row."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for stack in optimizer.stacks.values():
        for i, p in enumerate(stack.parameters):
            if name_of[id(p)] in names:
                found |= {(name_of[id(p)], key): value[i].clone() for key, value in stack.tensors().items()}
    return found


@pytest.mark.parametrize("active", [SUFFIX, SCATTERED], ids=["suffix", "scattered"])
@pytest.mark.parametrize("name", CONFIGS)
def test_resting_parameters_do_not_move_and_the_others_learn_as_if_alone(name, active):
    model = four_layers()
    optimizer = build(model, CONFIGS[name])
    alone = copy.deepcopy(model)
    learning = rest(model, active)
    resting = {n for n, _ in model.named_parameters()} - {*learning}
    assert ("model.embed_tokens.weight" in resting) == (not active[0]) and "lm_head.weight" in learning
    before = rows(optimizer, model, resting)
    adapter = Adapter(alone)
    few = [(n, p) for n, p in adapter.named_parameters() if n in learning]
    other = CONFIGS[name].build(few, [n for n in adapter.hidden_names() if n in learning], CPU)
    for step in range(4):
        give(model, step)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        norms = [o.step(at(step)) for o in (optimizer, other)]
        torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
        # A projection that is adapted in turns has other turns in a smaller stack.
        if "galore" in name and step == 0:
            break
    after = rows(optimizer, model, resting)
    assert all(torch.equal(before[key], after[key]) for key in before) and before.keys() == after.keys()
    exact = dict(alone.named_parameters())
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, exact[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("state", [AdamW().state, Int8Blockwise()], ids=["float32", "int8"])
def test_a_first_moment_ages_while_its_parameter_rests(state):
    model = four_layers()
    optimizer = build(model, Optimizer(AdamW(state=state), AdamW(state=state), schedule=STEADY))
    for step in range(3):
        random_gradients(model, step)
        optimizer.step(at(step))
    layer = Adapter(model).layer_parameters(1)
    (stack,) = [s for s in optimizer.stacks.values() if any(p is layer[0] for p in s.parameters)]
    i = next(i for i, p in enumerate(stack.parameters) if p is layer[0])

    def moment(which, codes, row):
        return state.read(stack.state, which, codes)[row].clone()

    first, second, other = (
        moment("first", "geometric", i),
        moment("second", "squares", i),
        moment("first", "geometric", i - 1),
    )
    counts = stack.state["count"].clone()
    optimizer.wake(layer, 7)
    aged = moment("first", "geometric", i)
    torch.testing.assert_close(aged, first * 0.9**7, rtol=0.15 if isinstance(state, Int8Blockwise) else 1e-6, atol=1e-4)
    assert 0.4 < (aged.norm() / first.norm()).item() < 0.55
    assert torch.equal(moment("second", "squares", i), second) and torch.equal(stack.state["count"], counts)
    assert torch.equal(moment("first", "geometric", i - 1), other)


@pytest.mark.parametrize("steps, kept", [(20, True), (21, False)])
def test_a_momentum_is_forgotten_after_a_long_rest(steps, kept):
    model = four_layers()
    optimizer = build(model, Optimizer(Muon(), schedule=STEADY))
    random_gradients(model, 0)
    optimizer.step(at(0))
    layer = Adapter(model).layer_parameters(2)
    before = rows(optimizer, model, {n for n, _ in model.named_parameters()})
    optimizer.wake(layer, steps)
    woken = {n for n, p in model.named_parameters() if any(p is q for q in layer)}
    for (name, key), row in rows(optimizer, model, {n for n, _ in model.named_parameters()}).items():
        if key == "momentum":
            assert torch.equal(row, before[name, key] if kept or name not in woken else torch.zeros_like(row))


def test_the_rate_of_a_woken_parameter_rises_over_ten_steps():
    model = llama(tied=False)
    config = Optimizer(Plain(), Plain(), schedule=STEADY, clip_norm=float("inf"))
    optimizer = build(model, config)
    woken, other = (model.model.layers[i].mlp.up_proj.weight for i in (0, 1))
    optimizer.wake([woken], 30)
    for step in range(12):
        start = {p: p.detach().clone() for p in (woken, other)}
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(at(step))
        assert torch.equal(start[other] - 1, other)
        torch.testing.assert_close(start[woken] - woken, torch.full_like(woken, min(1, (step + 1) / 10)))


def test_a_layer_that_has_rested_counts_by_its_full_rate():
    model = llama(tied=False)
    optimizer = build(model, Optimizer(Plain(lr=0.5), Plain(lr=0.5), schedule=STEADY, clip_norm=float("inf")))
    layers = [Adapter(model).layer_parameters(i) for i in range(2)]
    probe = Probe("decrease", optimizer.parameters, layers)
    optimizer.wake(layers[0], 30)
    random_gradients(model, 0)
    expected = torch.stack([sum(0.5 * p.grad.square().sum() for p in layer) for layer in layers])
    optimizer.step(at(), probe)
    torch.testing.assert_close(probe.of_layers(), expected)


@pytest.mark.parametrize("rule", [Muon(lr=0.5), AdamW(lr=0.5)], ids=["muon", "adamw"])
def test_what_a_layer_remembers_does_not_tell(rule):
    """Both layers get one gradient; one of them has rested for long, and has little or no momentum."""
    model = llama(tied=False)
    adapter = Adapter(model)
    optimizer = build(model, Optimizer(rule, Plain(lr=0.0), schedule=STEADY, clip_norm=float("inf")))
    probe = Probe("decrease", optimizer.parameters, [list(layer.parameters()) for layer in adapter.layers])
    for step in range(4):
        random_gradients(model, step)
        for p, q in zip(*(layer.parameters() for layer in adapter.layers), strict=True):
            q.grad = p.grad.clone()
        if step == 3:
            optimizer.wake(adapter.layer_parameters(0), 30)
            matrices = [p.grad.double() for p in adapter.layers[0].parameters() if p.ndim == 2]
            norms = [0.2 * max(g.shape) ** 0.5 * torch.linalg.svdvals(g).sum() for g in matrices]
        optimizer.step(at(step), probe if step == 3 else None)
    rested, other = probe.of_layers().tolist()
    assert rested == pytest.approx(other, rel=1e-5)
    if isinstance(rule, Muon):
        # What is orthogonalised takes the sum of the singular values off the loss.
        assert rested == pytest.approx(0.5 * sum(norms).item(), rel=0.05)


@pytest.mark.parametrize("name", ["muon", "muon8", "galore"])
def test_scattered_parameters_of_a_shape_that_fills_several_stacks(name, monkeypatch):
    learned = []
    for most in (2**28, 3 * 96 * 96):
        monkeypatch.setattr(stack_module, "LARGEST_STACK", most)
        model = four_layers()
        optimizer = build(model, CONFIGS[name])
        rest(model, SCATTERED)
        for step in range(1 if name == "galore" else 3):
            give(model, step)
            optimizer.step(at(step))
        pieces = [len(part.weights) for s in optimizer.stacks.values() if s.learning for part, _ in s.pieces()]
        learned.append(({n: p.detach().clone() for n, p in model.named_parameters()}, pieces))
    (whole, several), (split, single) = learned
    assert max(several) > 2 and sum(several) == sum(single) and single.count(1) > several.count(1)
    for n, p in whole.items():
        torch.testing.assert_close(split[n], p, rtol=1e-5, atol=1e-6)


def test_a_step_that_is_not_finite_does_not_count_as_awake():
    model = llama(tied=False)
    optimizer = build(model, Optimizer(Plain(), Plain(), schedule=STEADY))
    optimizer.wake(Adapter(model).layer_parameters(0), 5)
    before = [stack.awake.clone() for stack in optimizer.stacks.values()]
    random_gradients(model, 0)
    next(model.parameters()).grad[0] = torch.nan
    assert not optimizer.step(at()).isfinite()
    assert all(torch.equal(a, s.awake) for a, s in zip(before, optimizer.stacks.values(), strict=True))


@pytest.mark.parametrize("early", [False, True])
def test_a_woken_projection_follows_the_gradient_at_once(early):
    model = four_layers()
    config = Optimizer(GaLore(Muon(), rank=24, refresh_every=1000), schedule=STEADY, project_early=early)
    optimizer = build(model, config)
    g = torch.Generator().manual_seed(1)
    strong = {name: torch.randn(p.shape[0], 24, generator=g) @ torch.randn(24, p.shape[1], generator=g)
              for name, p in model.named_parameters() if p.ndim == 2}  # fmt: skip

    def step(number, gradients):
        optimizer.begin(at(number))
        loss = sum(
            (p * gradients[name]).sum() for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2
        )
        loss = loss + sum(p.sum() for p in model.parameters() if p.requires_grad and p.ndim == 1)
        loss.backward()
        optimizer.step(at(number))

    step(0, {name: torch.randn(p.shape, generator=g) for name, p in model.named_parameters() if p.ndim == 2})
    rest(model, SUFFIX)
    step(1, strong)
    model.requires_grad_(True)
    for layer in (0, 1):
        optimizer.wake(Adapter(model).layer_parameters(layer), 1)
    step(2, strong)
    name_of = {id(p): name for name, p in model.named_parameters()}
    (stack,) = [s for n, s in optimizer.stacks.items() if n.startswith("matrix.96x96")]
    for i, p in enumerate(stack.parameters):
        basis, name = stack.state["left"][i], name_of[id(p)]
        outside = strong[name] - basis.T @ (basis @ strong[name])
        missed = (outside.norm() / strong[name].norm()).item()
        assert missed < 1e-4 if ("layers.0." in name or "layers.1." in name) else missed > 0.5


def test_every_parameter_may_rest_but_some():
    model = llama(tied=False)
    optimizer = build(model, replace(OPTIMIZERS["muon8"], clip_norm=1.0))
    for p in model.parameters():
        p.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    give(model, 0)
    norm = optimizer.step(at())
    assert norm > 0 and [n for n, p in model.named_parameters() if not torch.equal(p, start[n])] == ["lm_head.weight"]
