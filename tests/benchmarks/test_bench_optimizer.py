"""`bench optimizer` on a CPU: whose updates it times, and on what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import small_model
from torch import nn

from cggr_ray.benchmarks import peers, timing, workload
from cggr_ray.benchmarks.optimizer import _others, bench_optimizer
from cggr_ray.benchmarks.peers import Peer, Weights
from cggr_ray.benchmarks.projection import projection
from cggr_ray.benchmarks.rows import Shape
from cggr_ray.data.sources import Problems
from cggr_ray.models.adapter import Adapter
from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.galore import GaLore
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.optimizer import Optimizer


class Descent:
    """A peer that keeps what it was given."""

    matrix: Weights
    rest: Weights

    def build(self, matrix: Weights, rest: Weights) -> list[torch.optim.Optimizer]:
        self.matrix, self.rest = matrix, rest
        return [torch.optim.SGD(matrix, lr=0.5), torch.optim.SGD(rest, lr=0.25)]


def test_a_peer_updates_copies_of_the_weights_by_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    descent = Descent()
    large = Peer((), Descent().build, timed_below=100)
    monkeypatch.setattr(peers, "PEERS", {"descent": Peer((), descent.build), "for_small_models": large})
    model = small_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: torch.randn_like(p) for name, p in before.items()}
    calls = _others(Adapter(model), {id(p): gradients[name] for name, p in model.named_parameters()})
    assert set(calls) == {"muon_torch", "descent"}
    calls["descent"]()
    hidden = [name for name in before if ".layers." in name and before[name].ndim == 2]
    others = [name for name in before if name not in hidden]
    for names, copies, lr in ((hidden, descent.matrix, 0.5), (others, descent.rest, 0.25)):
        for name, copy in zip(names, copies, strict=True):
            torch.testing.assert_close(copy.detach(), before[name] - lr * gradients[name])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_rows_of_peers_that_are_installed_and_of_one_that_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(workload, "Problems", lambda count: Problems(count=200))
    monkeypatch.setattr(timing, "WARM_UP_ROUNDS", 0)
    absent = Peer(("no_such_package",), Descent().build)
    monkeypatch.setattr(peers, "PEERS", {"descent": Peer((), Descent().build), "absent": absent})
    rows = bench_optimizer(Shape("tiny", 1, 16), "cpu", 1, tmp_path)
    found = {(row.provider, row.unit): row for row in rows}
    assert found["absent", "not_installed"].value == 0
    for unit in ("step_fraction", "of_muon_fp32"):
        assert found["descent", unit].ms_p50 > 0
    ratio = found["descent", "of_muon_fp32"].ms_p50 / found["muon_fp32", "of_muon_fp32"].ms_p50
    assert found["descent", "of_muon_fp32"].value == pytest.approx(ratio, rel=0.02)


def test_the_projection_of_galore_is_timed_apart_with_its_refresh_spread_over_the_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(workload, "Problems", lambda count: Problems(count=200))
    monkeypatch.setattr(timing, "WARM_UP_ROUNDS", 0)
    monkeypatch.setattr(peers, "PEERS", {})
    found = {(row.provider, row.unit): row for row in bench_optimizer(Shape("tiny", 1, 16), "cpu", 1, tmp_path)}
    there, refresh = found["galore_project", "ms"].value, found["galore_refresh", "ms"].value
    assert min(there, refresh) > 0
    step = found["forward_backward", "ms"].value + found["galore", "step_fraction"].ms_p50
    part = (there + refresh / 200) / step
    assert found["galore_projection", "step_fraction"].value == pytest.approx(part, abs=1e-4)


def test_a_timed_refresh_turns_every_basis_towards_its_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128, bias=False), nn.Linear(128, 96, bias=False))
    optimizer = Optimizer(GaLore(Muon(), rank=8), AdamW()).build(
        model.named_parameters(), [name for name, _ in model.named_parameters()], torch.device("cpu")
    )
    gradients = {id(p): torch.randn_like(p) for p in model.parameters()}
    before = {name: {k: v.clone() for k, v in stack.state.items()} for name, stack in optimizer.stacks.items()}
    timings = projection(optimizer, gradients, 1, torch.device("cpu"))
    assert set(timings) == {"galore_project", "galore_refresh"} and all(t.p50 > 0 for t in timings.values())
    for name, stack in optimizer.stacks.items():
        side = "left" if "left" in stack.state else "right"
        # Refreshed bases span the gradient's strongest directions better than random ones.
        gradient = gradients[id(stack.parameters[0])]
        wide = gradient if side == "left" else gradient.mT
        energy = [float((basis[0] @ wide).square().sum()) for basis in (before[name][side], stack.state[side])]
        assert energy[1] > 1.5 * energy[0]
