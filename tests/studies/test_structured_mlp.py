"""Kept channels by a plain loop, the re-fit against torch.linalg.lstsq, the 2:4 pattern group by group."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_studies import Folders
from torch import Tensor

from cggr_ray.studies import factors
from cggr_ray.studies.structured_mlp import (
    Settings,
    blocks_of,
    channel_scores,
    drop,
    kept_channels,
    mlp_call,
    refit,
    two_four,
)


def activations(positions: int = 80, channels: int = 22) -> tuple[Tensor, Tensor]:
    """(W_down, f) with channels that are correlated and of different sizes."""
    g = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    return draw(9, channels), draw(positions, channels) @ (draw(channels, channels) + 2 * torch.eye(channels))


@pytest.mark.parametrize(("block", "fraction"), [(4, 0.5), (1, 0.3), (8, 0.7), (5, 1.0), (22, 0.1)])
def test_kept_channels_are_those_of_the_best_blocks(block: int, fraction: float) -> None:
    weight, f = activations()
    scores = channel_scores(weight, f.abs().mean(0))
    by_block = []
    for at in range(0, 22, block):
        each = []
        for j in range(at, min(at + block, 22)):
            mean = sum(abs(float(x)) for x in f[:, j]) / len(f)
            each.append(mean * sum(float(w) ** 2 for w in weight[:, j]) ** 0.5)
        by_block.append((sum(each) / len(each), at))
    count = max(1, round(fraction * len(by_block)))
    best = sorted(at for _, at in sorted(by_block, reverse=True)[:count])
    wanted = [j for at in best for j in range(at, min(at + block, 22))]
    assert blocks_of(fraction, 22, block) == count
    assert kept_channels(scores, block, count).tolist() == wanted


def test_refit_leaves_the_residual_of_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "DAMPING", 0.0)
    weight, f = activations()
    kept = torch.tensor([0, 3, 4, 9, 17, 21])
    gone = torch.tensor([j for j in range(22) if j not in kept.tolist()])
    cut, fitted = drop(weight, f.mT @ f, kept), refit(weight, f.mT @ f, kept)
    assert not cut[:, gone].any() and not fitted[:, gone].any() and cut[:, kept].equal(weight[:, kept])
    wanted = torch.linalg.lstsq(f[:, kept], f @ weight.mT).solution
    torch.testing.assert_close(fitted[:, kept], wanted.mT, rtol=1e-7, atol=1e-7)
    residual = float((f @ (weight - fitted).mT).norm())
    assert residual == pytest.approx(float((f[:, kept] @ wanted - f @ weight.mT).norm()))
    assert residual < float((f @ (weight - cut).mT).norm())


def test_two_of_every_four_stay() -> None:
    weight, f = activations(channels=24)
    mean = f.abs().mean(0)
    found = two_four(weight, mean)
    for i in range(9):
        for at in range(0, 24, 4):
            scores = [abs(float(weight[i, j])) * float(mean[j]) for j in range(at, at + 4)]
            best = sorted(range(4), key=lambda k: -scores[k])[:2]
            for k in range(4):
                assert float(found[i, at + k]) == (float(weight[i, at + k]) if k in best else 0.0)


def test_zero_columns_equal_an_mlp_without_the_channels() -> None:
    g = torch.Generator().manual_seed(0)
    x, gate, up = (torch.randn(size, generator=g, dtype=torch.float64) for size in ((5, 6), (22, 6), (22, 6)))
    weight, _ = activations()
    kept = torch.tensor([1, 2, 8, 20])
    whole = (F.silu(x @ gate.mT) * (x @ up.mT)) @ drop(weight, torch.empty(0), kept).mT
    smaller = (F.silu(x @ gate[kept].mT) * (x @ up[kept].mT)) @ weight[:, kept].mT
    torch.testing.assert_close(whole, smaller)
    out = mlp_call(x.float(), 4, F.silu)()()
    assert isinstance(out, Tensor) and out.shape == (5, 6)


def test_bad_blocks_and_patterns_are_refused(folders: Folders) -> None:
    with pytest.raises(ValueError, match="block = 64; accepted: at most the model's 48 channels"):
        Settings(str(folders.model), str(folders.data))
    with pytest.raises(ValueError, match="methods: 'refitted'; did you mean 'refit'"):
        Settings(str(folders.model), str(folders.data), methods=("refitted",), block=16)
