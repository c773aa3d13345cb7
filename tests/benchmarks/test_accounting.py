"""Bytes that are counted, against the shapes of a model worked out by hand."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from cggr_ray.benchmarks import peers
from cggr_ray.benchmarks.accounting import FIRST, Training, accounting, caps, live_bytes, peer_bytes
from cggr_ray.benchmarks.optimizers import OPTIMIZERS
from cggr_ray.benchmarks.peers import Peer, Weights
from cggr_ray.benchmarks.rows import Shape
from cggr_ray.benchmarks.workload import NOW

CPU = torch.device("cpu")
TINY = Shape("tiny", 1, 16)
# The preset `tiny`: 4 layers of width 128, 4 heads and 2 key-value heads of 32, inner width 384, 2048 tokens, tied.
SQUARE, NARROW, WIDE = 128 * 128, 64 * 128, 384 * 128
MATRICES = 4 * (2 * SQUARE + 2 * NARROW + 3 * WIDE)
EMBEDDING, NORMS = 2048 * 128, 9 * 128
PARAMETERS = MATRICES + EMBEDDING + NORMS
NUM_MATRICES, NUM_TENSORS = 4 * 7, 4 * 7 + 1 + 9


def counted() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in accounting(TINY, CPU):
        found[row.provider][row.unit] = row.value
    return found


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "PEERS", {})
        return counted()


def test_weights_and_gradients(rows: dict[str, dict[str, float]]) -> None:
    for name, values in rows.items():
        assert values["weights_bytes"] == 4 * PARAMETERS and values["master_bytes"] == 0
        if name != "e3_full":
            assert values["gradient_bytes"] == 4 * PARAMETERS


def test_states(rows: dict[str, dict[str, float]]) -> None:
    # AdamW counts the steps of each of its parameters: seven matrices and two norms a layer, the embedding, the last
    # norm. All parameters count the steps since they last rested.
    each, rest = 4 * (4 * 9 + 2), 4 * (4 * 2 + 2)
    state = {name: values["optimizer_bytes"] - each for name, values in rows.items()}
    assert state["adamw_fp32"] == 8 * PARAMETERS + each
    assert state["muon_fp32"] == 4 * MATRICES + 8 * (EMBEDDING + NORMS) + rest
    assert state["muon_bf16"] == 2 * MATRICES + (2 + 4) * (EMBEDDING + NORMS) + rest
    codes = 1 + 2 / 128
    assert state["muon_int8"] == codes * (MATRICES + 2 * EMBEDDING) + 8 * NORMS + rest
    # A quarter of the shorter side: rank 32 of 128, 16 of 64.
    low = 4 * (2 * 32 * 128 + 2 * 16 * 128 + 3 * 32 * 384)
    bases = 4 * (2 * 32 * 128 + 2 * 16 * 64 + 3 * 32 * 128)
    assert state["galore"] == 4 * (low + bases) + 8 * (EMBEDDING + NORMS) + rest
    assert rows["e3_full"]["gradient_bytes"] == 4 * (low + EMBEDDING + NORMS)
    assert rows["muon_int8"]["optimizer_of_muon_fp32"] == pytest.approx(
        (state["muon_int8"] + each) / (state["muon_fp32"] + each), abs=1e-5
    )


def test_views_of_one_storage_count_once() -> None:
    x = torch.zeros(10, 10)
    assert live_bytes([x, x[2:], x.mT, torch.zeros(3, dtype=torch.int8)]) == 403


@pytest.mark.parametrize(
    ("gib", "tried"), [(79.1, [24, 48, 80]), (44.4, [24, 48]), (39.5, [24]), (22.1, [24]), (15, [])]
)
def test_caps_that_a_device_has_are_tried(gib: float, tried: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert caps(torch.device("cuda")) == tried


def test_a_second_step_holds_what_the_first_held() -> None:
    training = Training(TINY, OPTIMIZERS["e3_full"], CPU, torch.float32)
    training.backward(FIRST)
    first = training.held()
    training.optimizer.step(FIRST)
    training.backward(NOW)
    assert training.held() == first


def plain_adamw(matrix: Weights, rest: Weights) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(matrix), torch.optim.AdamW(rest)]


def test_a_peer_that_is_installed_and_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    there, absent = Peer(("torch",), plain_adamw), Peer(("torch", "no_such_package"), plain_adamw)
    monkeypatch.setattr(peers, "PEERS", {"there": there, "absent": absent})
    found = counted()
    assert found["absent"] == {"not_installed": 0.0}
    # Two averages of float32, and a count of steps for every parameter.
    assert found["there"]["optimizer_bytes"] == 8 * PARAMETERS + 4 * NUM_TENSORS
    assert found["there"]["optimizer_of_adamw_fp32"] == pytest.approx(1, abs=1e-4)


def test_tensors_inside_dicts_objects_and_subclasses() -> None:
    a, b, c, d = (torch.zeros(n) for n in (1, 2, 3, 4))
    pair = TwoTensor(torch.zeros(5), torch.zeros(5))
    state = {a: {"step": 3, "average": b, "codes": pair, "projector": SimpleNamespace(basis=c, of=[], deep={"d": d})}}
    assert live_bytes(peers.tensors_in(state)) == 4 * (2 + 3 + 4 + 5 + 5)


# In bf16. Blocks of 8-bit averages are of 256 values, with a scale of 4 bytes; a table of codes has 1024 bytes.
EIGHT_BITS = 2 * (1 + 4 / 256) * (MATRICES + EMBEDDING)
LOW_RANK, BASES = 4 * 32 * (4 * 128 + 3 * 384), 4 * 32 * (2 * 128 + 2 * 64 + 3 * 128)
BY_HAND = {
    "torchao_adamw8bit": EIGHT_BITS + 2 * 1024 * (NUM_MATRICES + 1) + 2 * 2 * NORMS + 4 * NUM_TENSORS,
    "bitsandbytes_adamw8bit": EIGHT_BITS + 2 * 1024 + 2 * 4 * NORMS,
    "galore_torch": 2 * 2 * (LOW_RANK + EMBEDDING + NORMS) + 2 * BASES,
}


@pytest.mark.parametrize("name", peers.PEERS)
def test_states_of_peers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in peers.PEERS[name].packages:
        pytest.importorskip(package)
    monkeypatch.setattr(peers, "RANK", 32)
    assert peer_bytes(peers.PEERS[name], TINY, CPU, torch.bfloat16) == BY_HAND[name]
