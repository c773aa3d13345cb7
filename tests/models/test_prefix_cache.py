"""What layers at rest compute, read back in later epochs: the same training, with fewer passes through those layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_batches import packed
from small_learners import NoHeldOut
from small_models import small_model

from cggr_ray.data.batch import MicroBatch
from cggr_ray.data.packing import RowOrder
from cggr_ray.data.store import TokenStore
from cggr_ray.learner import Learner
from cggr_ray.models.adapter import Adapter
from cggr_ray.models.prefix_cache import GIB, ActivationCache, PrefixCache
from cggr_ray.objectives.next_token import NextToken
from cggr_ray.progress import Progress
from cggr_ray.recipe import Recipe
from cggr_ray.routing.route import TokenRoute
from cggr_ray.routing.rows import RandomRows
from cggr_ray.routing.scorers import TruncatedRouter
from cggr_ray.routing.tokens import SelectedTokens, SkippedTokens
from cggr_ray.routing.trained_scorers import Probe, TunedLens
from cggr_ray.schema import TRAIN_LOSS
from cggr_ray.sparse.plan import Dense, KeptRows, Plan, TwoPass
from cggr_ray.updates.fixed import StaticSuffix
from cggr_ray.updates.random import RandomBlocks
from cggr_ray.warmup import first_batch, warm_up

POSITIONS, WIDTH, LAYERS = 126, 32, 3
ROW = 4 * WIDTH
ROWS = ("tokens_BT", "labels_BT", "positions_BT", "position_ids_BT")
# The two packings hold the same documents in other rows and at other places.
DOCUMENTS = [[5, 11, 5], [21], [1, 1, 18], [9, 4], [20], [7, 7, 7]]
MEMORY = {"memory": (POSITIONS, 0), "disk": (0, POSITIONS), "both": (50, 76)}


def with_ids(micro: MicroBatch) -> MicroBatch:
    return MicroBatch(**{**vars(micro), "ids_BT": micro.position_ids_BT.numpy()})


def other_packing(micro: MicroBatch) -> MicroBatch:
    """The same rows in another order."""
    order = torch.tensor([3, 0, 5, 2, 1, 4])
    starts = [
        r * 21 + t for r, row in enumerate(micro.positions_BT[order].tolist()) for t, p in enumerate(row) if p == 0
    ]
    changed = {
        name: getattr(micro, name)[order] for name in ("tokens_BT", "labels_BT", "positions_BT", "position_ids_BT")
    }
    starts += [micro.tokens_BT.numel()] * 3
    return with_ids(MicroBatch(**{**vars(micro), **changed, "document_starts": torch.tensor(starts).int()}))


MICRO = with_ids(packed(DOCUMENTS, width=21))
REAL = MICRO.position_ids_BT >= 0


def cache_of(tmp_path: Path, here: int, there: int) -> PrefixCache:
    config = ActivationCache(here * ROW / GIB, there * ROW / GIB)
    return PrefixCache(config, POSITIONS, WIDTH, torch.float32, torch.device("cpu"), tmp_path / "kept.bin")


def route(micro: MicroBatch) -> TokenRoute:
    """Of every row the first and the ninth position."""
    index = torch.tensor([[0, 8]]).expand(len(micro.tokens_BT), 2).contiguous()
    return TokenRoute(index, torch.ones(index.shape))


def gradients(adapter: Adapter, plan: Plan, reads: int, micro: MicroBatch) -> dict[str, torch.Tensor]:
    planned = plan.forward(micro, reads, lambda seen: route(micro))
    NextToken().loss(planned.stream, micro, planned.route, torch.tensor(1 / micro.labelled)).total.backward()
    found = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    adapter.model.zero_grad()
    return found


PLANS: dict[str, Any] = {
    "dense": lambda adapter: (Dense(adapter), 0),
    "after": lambda adapter: (KeptRows(adapter, "const"), LAYERS),
    "before": lambda adapter: (KeptRows(adapter, "live"), 0),
    "two_pass": lambda adapter: (TwoPass(adapter, "const"), LAYERS),
}


@pytest.mark.parametrize("where", MEMORY)
@pytest.mark.parametrize("plan", PLANS)
def test_what_is_read_back_trains_the_same(plan: str, where: str, tmp_path: Path) -> None:
    adapter, passes = Adapter(small_model("llama")), Counter[str]()
    adapter.set_active_layers((False, False, True))
    adapter.cache = cache_of(tmp_path, *MEMORY[where])
    adapter.layers[1].register_forward_hook(lambda *_: passes.update(["below"]))
    plain = Adapter(small_model("llama"))
    plain.set_active_layers((False, False, True))
    for visit, micro in enumerate((MICRO, other_packing(MICRO), MICRO)):
        found = gradients(adapter, *PLANS[plan](adapter), micro)
        expected = gradients(plain, *PLANS[plan](plain), micro)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
        assert passes["below"] == 1 and (adapter.cache.hits, adapter.cache.misses) == (visit, 1)
    assert (tmp_path / "kept.bin").exists() == (MEMORY[where][1] > 0)


def test_a_cache_that_does_not_hold_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="126 positions of 128 bytes; accepted: together at least"):
        cache_of(tmp_path, 50, 75)
    assert not (tmp_path / "kept.bin").exists()


@pytest.mark.parametrize("positions, row", [(126, 128), (68_150, 512), (5_000_001, 3072)])
def test_what_is_said_to_be_enough_is(positions: int, row: int) -> None:
    with pytest.raises(ValueError, match="together at least") as refused:
        ActivationCache(1e-6).shares(positions, row)
    enough = float(str(refused.value).split()[-2])
    assert enough < positions * row / GIB + 0.0011
    for memory in (enough, enough / 3):
        here, there = ActivationCache(memory, enough - memory).shares(positions, row)
        assert here + there == positions and here * row <= memory * GIB and there * row <= (enough - memory) * GIB


def test_the_disk_gives_its_room_before_the_first_step(tmp_path: Path) -> None:
    cache_of(tmp_path, 50, 76)
    file = (tmp_path / "kept.bin").stat()
    assert file.st_size == 76 * ROW and file.st_blocks * 512 >= file.st_size


def test_what_is_kept_is_not_written_again(tmp_path: Path) -> None:
    adapter = Adapter(small_model("llama"))
    adapter.set_active_layers((False, False, True))
    adapter.cache = cache_of(tmp_path, POSITIONS, 0)
    half = packed(DOCUMENTS, width=21)
    starts = torch.tensor([0, 5, 16, 21, 42, 43, 44, 62, 63, 63, 63]).int()
    three = {name: getattr(half, name)[:3] for name in ROWS}
    first = with_ids(MicroBatch(**{**vars(half), **three, "document_starts": starts}))
    adapter.enter(first, adapter.documents(first))
    memory = adapter.cache._memory.clone()
    with torch.no_grad():
        adapter.layers[0].mlp.up_proj.weight.mul_(1.5)
    # Somebody else's weights, of which it was not told: what is there stays, what is missing is added.
    adapter.enter(MICRO, adapter.documents(MICRO))
    assert MICRO.ids_BT is not None and first.ids_BT is not None
    changed = (adapter.cache._memory != memory).any(1).nonzero().flatten().tolist()
    kept = set(first.ids_BT.ravel().tolist())
    assert changed and not kept & set(changed)


@torch.no_grad()
def below(adapter: Adapter, micro: MicroBatch) -> torch.Tensor:
    return adapter.run_layers(adapter.embed(micro), micro.positions_BT, adapter.documents(micro), slice(0, 2))


def test_a_change_below_is_noticed(tmp_path: Path) -> None:
    adapter = Adapter(small_model("llama"))
    adapter.cache = cache_of(tmp_path, POSITIONS, 0)

    def entering(*active: bool) -> torch.Tensor:
        adapter.set_active_layers(active)
        return adapter.enter(MICRO, adapter.documents(MICRO))[0][REAL]

    first = entering(False, False, True)
    assert torch.equal(entering(False, False, True), first) and adapter.cache.hits == 1
    # A step of every layer, after which the lower ones rest again.
    assert entering(True, True, True).requires_grad
    with torch.no_grad():
        adapter.layers[0].mlp.up_proj.weight.mul_(1.5)
    changed = entering(False, False, True)
    assert not torch.equal(changed, first) and torch.equal(changed, below(adapter, MICRO)[REAL])
    assert not torch.equal(entering(False, True, True), changed)
    # A forward without gradient may be of other data, which has ids of its own.
    entering(False, False, True)
    hits = adapter.cache.hits
    with torch.no_grad():
        assert torch.equal(entering(False, False, True), changed) and adapter.cache.hits == hits
    # Weights that somebody else has written.
    with torch.no_grad():
        adapter.layers[0].mlp.up_proj.weight.mul_(1.5)
    adapter.forget()
    assert torch.equal(entering(False, False, True), below(adapter, MICRO)[REAL])


def test_a_warm_up_leaves_nothing_kept(
    make_store: Callable[..., TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes steps of every layer, then of the upper ones over what these have made, and puts the weights back."""
    read, taken = PrefixCache._read, []
    monkeypatch.setattr(PrefixCache, "_read", lambda cache, ids: taken.append(ids) or read(cache, ids))

    store, losses = make_store([20, 11, 32, 7, 30], vocabulary=96), []
    order = RowOrder([store], (1.0,), (None,), 32, False, 2)
    for kept in (False, True):
        adapter = Adapter(small_model("llama_biased"))
        recipe = Recipe("x", updates=StaticSuffix(1 / 3)).with_values({"optimizer.schedule.warmup_tokens": 1})
        learner = Learner(recipe, adapter, 0, 100)
        if kept:
            cpu = torch.device("cpu")
            adapter.cache = PrefixCache(ActivationCache(1.0), 100, WIDTH, torch.float32, cpu, tmp_path / "kept.bin")
        warm_up(learner, NoHeldOut(), order, 2, 2, learner.levels())  # type: ignore[arg-type]
        assert bool(taken) == kept and (adapter.cache is None or adapter.cache.hits == adapter.cache.misses == 0)
        row = learner.step(first_batch(order, 2, 2, adapter.device), Progress(0, 0.0, 1.0, 64))
        losses.append(float(row.device_values[TRAIN_LOSS]))
    assert losses[0] == losses[1]


def test_padding_is_neither_kept_nor_missed(tmp_path: Path) -> None:
    adapter = Adapter(small_model("llama"))
    adapter.set_active_layers((False, False, True))
    adapter.cache = cache_of(tmp_path, POSITIONS, 0)
    first = adapter.enter(MICRO, adapter.documents(MICRO))[0]
    again = adapter.enter(MICRO, adapter.documents(MICRO))[0]
    assert not REAL.all() and torch.equal(first[REAL], again[REAL]) and (again[~REAL] == 0).all()


@pytest.mark.parametrize(
    "parts, named",
    [
        ({}, "activation_cache with updates 'full_update'"),
        ({"updates": RandomBlocks()}, "activation_cache with updates 'random_blocks'"),
        ({"updates": StaticSuffix(), "rows": RandomRows()}, "rows and tokens .*random_rows"),
        ({"updates": StaticSuffix(), "tokens": SkippedTokens()}, "rows and tokens .*skipped_tokens"),
        *(
            (
                {"updates": StaticSuffix(), "tokens": SelectedTokens(score="loss", plan="before", router=router)},
                "a router that reads the first layers",
            )
            for router in (Probe(), TruncatedRouter(), TunedLens())
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(parts: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Recipe("x", **parts).with_values({"execution.activation_cache": {"memory_gib": 1.0}})
    Recipe("x", updates=StaticSuffix(), tokens=SelectedTokens(plan="after")).with_values(
        {"execution.activation_cache": {"memory_gib": 1.0}}
    )
    with pytest.raises(ValueError, match="0 or more GiB of each"):
        ActivationCache(0.0, 0.0)
