"""MatrixOptimizer in other people's loops: against torch's AdamW, what rests, moves or has no finite gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from small_loops import BOTH8, RULES, batch, model_of, train, weights
from torch import Tensor, nn

from cggr_ray import AdamW, GaLore, Int8Blockwise, MatrixOptimizer, Muon
from cggr_ray.optim.state_formats import Float32

pytestmark = pytest.mark.usefixtures("small_tensors_in_8_bits")


def test_with_adamw_everywhere_it_is_torch_s_with_its_schedulers() -> None:
    ours, theirs = model_of(), model_of()
    rule = AdamW(lr=0.02, beta1=0.9, beta2=0.95, weight_decay=0.1)
    mine = MatrixOptimizer(ours, rule, rule)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    schedules = [torch.optim.lr_scheduler.StepLR(o, step_size=5, gamma=0.5) for o in (mine, adamw)]
    found = train(ours, mine, range(15), schedules[0].step)
    assert found == pytest.approx(train(theirs, adamw, range(15), schedules[1].step), rel=1e-5)
    assert [group["lr"] for group in mine.param_groups] == [0.0025, 0.0025]
    for name, value in weights(theirs).items():
        torch.testing.assert_close(ours.get_parameter(name), value, rtol=1e-3, atol=1e-4)


def test_hidden_matrices_are_those_of_the_blocks() -> None:
    model = model_of()
    optimizer = MatrixOptimizer(model)
    matrix, rest = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    for name, p in model.named_parameters():
        assert (id(p) in matrix) == ("layers" in name and p.ndim == 2) != (id(p) in rest), name
    only = MatrixOptimizer(model_of(), hidden=["model.layers.0.mlp.up_proj.weight"])
    assert [len(group["params"]) for group in only.param_groups] == [1, len(matrix) + len(rest) - 1]


def test_a_parametrized_head_is_none_of_them() -> None:
    model = Two()
    model.head = nn.utils.parametrizations.weight_norm(nn.Linear(16, 8, bias=False))
    model.ways[0] = nn.utils.parametrizations.spectral_norm(model.ways[0])
    matrix, rest = (group["params"] for group in MatrixOptimizer(model).param_groups)
    assert {id(p) for p in matrix} == {id(p) for p in model.ways.parameters()}
    assert {id(p) for p in rest} == {id(p) for p in model.head.parameters()}


class Two(nn.Module):
    """Two ways through; one of them may be left out of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(16, 16, bias=False) for _ in range(2)])

    def forward(self, x: Tensor, ways: tuple[int, ...]) -> Tensor:
        for way in ways:
            x = self.ways[way](x).tanh()
        return x.square().sum()


@pytest.mark.parametrize("name", ["adamw", *RULES])
def test_what_has_no_gradient_rests(name: str) -> None:
    torch.manual_seed(0)
    model = Two()
    matrix, rest = RULES[name]() if name != "adamw" else (AdamW(lr=0.01), AdamW())
    other = copy.deepcopy(model)
    optimizer, torch_s = MatrixOptimizer(model, matrix, rest), torch.optim.AdamW(other.parameters(), 0.01, (0.9, 0.95),
                                                                                weight_decay=0)  # fmt: skip
    for ways in ((0,), (0, 1), (1,), (1,), (0, 1)):
        before = weights(model)
        for net, steps in ((model, optimizer), (other, torch_s)):
            net(torch.ones(3, 16), ways).backward()
            steps.step()
            steps.zero_grad()
        for way in range(2):
            key = f"ways.{way}.weight"
            moved = not torch.equal(before[key], weights(model)[key])
            assert moved == (way in ways) and weights(model)[key].isfinite().all(), (key, ways)
    if name == "adamw":
        for key, value in weights(other).items():
            torch.testing.assert_close(weights(model)[key], value, rtol=1e-5, atol=1e-7)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert all(torch.equal(value, weights(model)[key]) for key, value in before.items())
    assert optimizer.state_dict()["state"]["steps"] == state["state"]["steps"] == 5


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("way", [0, 1])
def test_none_of_those_that_full_rank_draws_among_can_rest_alone(way: int, frozen: bool) -> None:
    torch.manual_seed(0)
    model = Two()
    optimizer = MatrixOptimizer(model, GaLore(rank=4, refresh_every=3, smallest=8, full_rank=0.5))
    model(torch.ones(3, 16), (0, 1)).backward()
    optimizer.step()
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    rested = f"ways.{1 - way}.weight"
    model.get_parameter(rested).requires_grad_(not frozen)
    model(torch.ones(3, 16), (way,)).backward()
    with pytest.raises(RuntimeError, match=rf"parameter '{rested}' has no gradient.*accepted: .*full_rank = 0"):
        optimizer.step()
    assert all(torch.equal(value, weights(model)[key]) for key, value in before.items())
    after = optimizer.state_dict()["state"]
    assert after["steps"] == 1
    assert all(torch.equal(value, after["tensors"][key]) for key, value in state["tensors"].items())
    # Neither learns, or both.
    model.zero_grad()
    optimizer.step()
    model.requires_grad_(True)
    model(torch.ones(3, 16), (0, 1)).backward()
    optimizer.step()
    assert not any(torch.equal(value, weights(model)[key]) for key, value in before.items())


@pytest.mark.parametrize("basis", [Float32(), BOTH8])
def test_a_basis_waits_for_the_first_gradient(basis: Float32 | Int8Blockwise) -> None:
    model = Two()
    optimizer = MatrixOptimizer(model, GaLore(rank=4, refresh_every=200, smallest=8, basis=basis))

    def stepped(way: int) -> list[Tensor]:
        model(torch.ones(3, 16), (way,)).backward()
        optimizer.step()
        found = optimizer.state_dict()["state"]["tensors"]
        return [value.clone() for key, value in found.items() if key.endswith(".left")]

    first, second = stepped(0), stepped(1)
    assert first and all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_basis_waits_for_as_long_as_a_matrix_rests(frozen: bool, saved: bool) -> None:
    """Until then it lies anywhere; then it holds the strongest direction of the first gradient, here the only one."""

    def new() -> tuple[Two, MatrixOptimizer]:
        torch.manual_seed(0)
        model = Two()
        model.ways.requires_grad_(True)
        return model, MatrixOptimizer(model, GaLore(rank=4, refresh_every=200, smallest=8))

    model, optimizer = new()
    model.ways[1].requires_grad_(not frozen)
    for _ in range(3):
        model(torch.ones(3, 16), (0,)).backward()
        optimizer.step()
    if saved:
        weights_then, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        model, optimizer = new()
        model.load_state_dict(weights_then)
        optimizer.load_state_dict(state)
    model.ways[1].requires_grad_(True)
    model(torch.ones(3, 16), (1,)).backward()
    weight = model.ways[1].weight
    assert isinstance(weight, nn.Parameter) and weight.grad is not None
    strongest = torch.linalg.svd(weight.grad).U[:, 0]
    optimizer.step()
    basis = next(v for key, v in optimizer.state_dict()["state"]["tensors"].items() if key.endswith(".left"))[1]
    assert float((basis @ strongest).norm()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_a_model_that_is_moved_is_followed(name: str, dtype: torch.dtype) -> None:
    """As to another device, which `cpu:0` is to torch."""
    runs = []
    for moves in (False, True):
        model = model_of(dtype=dtype)
        optimizer = MatrixOptimizer(model, *RULES[name]())
        found = []
        for steps in (range(2), range(2, 5), range(5, 7)):
            if moves:
                model.to("cpu:0")
            found += train(model, optimizer, steps)
        runs.append((found, weights(model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][key]) for key, value in runs[0][1].items())


def test_a_weight_that_is_put_in_place_of_another_is_what_learns() -> None:
    model = model_of(dtype=torch.bfloat16)
    optimizer = MatrixOptimizer(model, Muon(lr=0.0), AdamW(lr=0.0))
    train(model, optimizer, range(2))
    other = torch.randn_like(model.model.norm.weight)
    model.model.norm.weight.data = other.clone()
    train(model, optimizer, range(2))
    assert torch.equal(model.model.norm.weight.detach(), other)


def test_masters_keep_what_16_bits_lose() -> None:
    model = model_of(dtype=torch.bfloat16)
    optimizer = MatrixOptimizer(model, AdamW(lr=1e-5), AdamW(lr=1e-5))
    start = weights(model)["model.norm.weight"].float()
    assert (start == 1).all()
    for step in range(500):
        loss = model(batch(0), labels=batch(0)).loss
        loss.backward()
        optimizer.step()
        if step == 0:
            assert torch.equal(weights(model)["model.norm.weight"].float(), start), "a step is below what bf16 holds"
    assert not torch.equal(weights(model)["model.norm.weight"].float(), start)


def test_a_gradient_that_is_not_finite_changes_nothing_and_a_clip_is_of_all() -> None:
    model = model_of()
    optimizer = MatrixOptimizer(model, Muon(lr=0.01), AdamW(lr=0.01), clip_norm=0.5)
    train(model, optimizer, range(2))
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"]["tensors"])
    model(batch(3), labels=batch(3)).loss.backward()
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    next(model.parameters()).grad[0, 0] = torch.inf  # type: ignore[index]
    optimizer.step()
    assert all(torch.equal(value, weights(model)[name]) for name, value in before.items())
    now = optimizer.state_dict()["state"]["tensors"]
    assert all(torch.equal(value, now[key]) for key, value in state.items())
    model(batch(3), labels=batch(3)).loss.backward()
    optimizer.step()
    assert float(optimizer.grad_norm or 0) == pytest.approx(squares**0.5, rel=1e-4)


def test_a_closure_is_called_with_gradients() -> None:
    model = model_of()
    optimizer = MatrixOptimizer(model)

    def closure() -> Tensor:
        loss = model(batch(0), labels=batch(0)).loss
        loss.backward()
        return loss

    with torch.no_grad():
        first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first


class Mixed(nn.Module):
    """A block in bf16 whose norm is in float32, and has parameters of its bias' shape; and one without values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(4, 4, dtype=torch.bfloat16), nn.LayerNorm(4)])
        self.nothing = nn.Parameter(torch.zeros(0, 4))


@pytest.mark.parametrize("state", [Float32(), BOTH8], ids=["float32", "int8"])
def test_parameters_of_one_shape_keep_their_dtypes(state: Float32 | Int8Blockwise) -> None:
    model = Mixed()
    before = {name: (p.dtype, p.detach().float()) for name, p in model.named_parameters()}
    rule = AdamW(lr=0.02, state=state)
    optimizer = MatrixOptimizer(model, rule, rule)
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = gradients[name].clone()
    optimizer.step()
    for name, p in model.named_parameters():
        dtype, start = before[name]
        theirs = nn.Parameter(start.clone())
        theirs.grad = gradients[name].float()
        torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.0).step()
        assert p.dtype == dtype, name
        tolerance = 1e-6 if dtype == torch.float32 else 0.01
        torch.testing.assert_close(p.detach().float(), theirs.detach(), rtol=tolerance, atol=1e-6, msg=name)


def test_a_sparse_gradient_is_named_and_changes_nothing() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Embedding(6, 4, sparse=True)])
    optimizer = MatrixOptimizer(model)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    model[0](model[1](torch.arange(3))).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of '1\.weight' with layout torch\.sparse_coo; accepted: dense"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    after = optimizer.state_dict()["state"]
    assert after["steps"] == 0 and all(torch.equal(value, after["tensors"][k]) for k, value in state["tensors"].items())
    model[1].weight.grad = model[1].weight.grad.to_dense()
    optimizer.step()
    assert not torch.equal(before["1.weight"], weights(model)["1.weight"])


def test_mistakes_are_named() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="model of type generator; accepted: the nn"):
        MatrixOptimizer(model.parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matrix = 'muon'; accepted: Muon, GaLore or AdamW of cggr_ray, or None"):
        MatrixOptimizer(model, "muon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rest = Muon\(.*\); accepted: AdamW of cggr_ray, or None"):
        MatrixOptimizer(model, AdamW(), Muon())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip_norm = None; accepted: a positive number"):
        MatrixOptimizer(model, clip_norm=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameter requires a gradient; accepted: a model of which something"):
        MatrixOptimizer(copy.deepcopy(model).requires_grad_(False))
    with pytest.raises(ValueError, match=r"parameter 'weight' of dtype torch\.float64; accepted: float32, bfloat16"):
        MatrixOptimizer(nn.Linear(4, 4, bias=False, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"no hidden matrix: .*accepted: hidden = the names"):
        MatrixOptimizer(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="parameter 'weight' is a Tensor on meta; accepted: plain tensors"):
        MatrixOptimizer(nn.Linear(4, 4, bias=False, device="meta"))
    with pytest.raises(ValueError, match="hidden name 'up'; accepted: names of the model's parameters that require"):
        MatrixOptimizer(model, hidden=["up"])
    optimizer = MatrixOptimizer(model)
    with pytest.raises(ValueError, match="add_param_group; accepted: a new optimizer"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="state of an optimizer of other parameters; accepted: that of the same model"):
        optimizer.load_state_dict(MatrixOptimizer(Two()).state_dict())
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, range(1))
    with pytest.raises(ValueError, match="state of another kind of optimizer; accepted: that of a MatrixOptimizer"):
        optimizer.load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError, match="optimizer state without"):
        optimizer.load_state_dict(MatrixOptimizer(model_of(), Muon(state=BOTH8, row_beta=0.9)).state_dict())
    model.to(torch.bfloat16)
    train_one = model(batch(0), labels=batch(0)).loss
    train_one.backward()
    with pytest.raises(
        RuntimeError, match=r"parameter '.*' was cast or resized after the optimizer was made; accepted: "
    ):
        optimizer.step()
