"""Closed forms against singular values, explicit inverses, brute force and torch.linalg.lstsq, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cggr_ray.studies import factors
from cggr_ray.studies.factors import Factors, break_even_rank, channel_diagonal, damped, data_aware, plus_diag, svd

RANKS = (1, 3, 5)
SHAPES = ((9, 9), (12, 7), (6, 10))


def problem(out: int, width: int, seed: int = 0, positions: int = 60) -> tuple[Tensor, Tensor]:
    """(weight, inputs) with inputs of very different sizes, mixed with one another."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    return draw(out, width), draw(positions, width) * torch.logspace(0, -2, width, dtype=torch.float64) @ draw(
        width, width
    )


def output_error(x_NI: Tensor, weight_OI: Tensor, other_OI: Tensor) -> float:
    return float((x_NI @ (weight_OI - other_OI).mT).norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_errs_by_the_singular_values_left_out(shape: tuple[int, int]) -> None:
    weight, _ = problem(*shape)
    values = torch.linalg.svdvals(weight)
    for rank, f in zip(RANKS, svd(weight, torch.eye(shape[1]), RANKS), strict=True):
        assert f.left_OR.shape == (shape[0], rank) and f.right_RI.shape == (rank, shape[1])
        torch.testing.assert_close((weight - f.dense_OI()).norm(), values[rank:].square().sum().sqrt())


@pytest.mark.parametrize("shape", [*SHAPES, (8, 3)])
def test_left_vectors_are_those_of_an_svd_but_for_their_signs(shape: tuple[int, int]) -> None:
    weight, _ = problem(*shape)
    found, wanted = factors.left_vectors(weight), torch.linalg.svd(weight, full_matrices=False).U
    torch.testing.assert_close((found.mT @ wanted).abs(), torch.eye(min(shape), dtype=torch.float64))
    assert svd(weight * 0, weight, [2])[0].dense_OI().eq(0).all()


@pytest.mark.parametrize("shape", [(9, 9), (12, 7), (6, 10), (64, 16)])
def test_a_matrix_of_less_rank_is_found_whole_at_any_rank_above(shape: tuple[int, int]) -> None:
    left, right = problem(shape[0], 3)[0], problem(3, shape[1], seed=1)[0]
    weight, x = left @ right, problem(1, shape[1], seed=2)[1]
    for method in (svd, data_aware):
        for f in method(weight, x.mT @ x, (3, 4, min(shape))):
            torch.testing.assert_close(f.dense_OI(), weight, rtol=1e-9, atol=1e-9)
    # Singular values over fourteen decades: no rank errs by more than those that are left out, but for rounding.
    steep = torch.linalg.svd(problem(*shape)[0], full_matrices=False)
    weight = steep.U * torch.logspace(0, -14, min(shape), dtype=torch.float64) @ steep.Vh
    for rank, f in enumerate(svd(weight, x, range(1, min(shape) + 1)), 1):
        left_out = torch.logspace(0, -14, min(shape), dtype=torch.float64)[rank:].square().sum().sqrt()
        assert (weight - f.dense_OI()).norm() <= left_out + 1e-7


@pytest.mark.parametrize("shape", SHAPES)
def test_data_aware_is_the_closed_form_with_explicit_inverses(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors, "DAMPING", 0.0)
    weight, x = problem(*shape)
    gram = x.mT @ x
    # As in the literature for y = x A, A = W^T: A' = L^-T [L^T A]_r with C = L L^T.
    cholesky = torch.linalg.cholesky(gram)
    u, s, vh = torch.linalg.svd(cholesky.mT @ weight.mT, full_matrices=False)
    for rank, f in zip(RANKS, data_aware(weight, gram, RANKS), strict=True):
        truncated = (u[:, :rank] * s[:rank]) @ vh[:rank]
        wanted = torch.linalg.solve_triangular(cholesky.mT, truncated, upper=True).mT
        torch.testing.assert_close(f.dense_OI(), wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_near_data_aware_does_better_and_svd_does_worse(shape: tuple[int, int]) -> None:
    weight, x = problem(*shape)
    gram = x.mT @ x
    g = torch.Generator().manual_seed(1)
    for plain, f in zip(svd(weight, gram, RANKS), data_aware(weight, gram, RANKS), strict=True):
        best = output_error(x, weight, f.dense_OI())
        assert best < output_error(x, weight, plain.dense_OI())
        for size in (1e-3, 1e-2, 1e-1, 1.0):
            for _ in range(50):
                left = f.left_OR + size * torch.randn(f.left_OR.shape, generator=g, dtype=torch.float64)
                right = f.right_RI + size * torch.randn(f.right_RI.shape, generator=g, dtype=torch.float64)
                assert output_error(x, weight, left @ right) > best * (1 - 1e-9)


def test_gradient_descent_from_chance_ends_where_data_aware_is() -> None:
    weight, x = problem(6, 5)
    best = output_error(x, weight, data_aware(weight, x.mT @ x, [2])[0].dense_OI())
    g = torch.Generator().manual_seed(2)
    left, right = (torch.randn(size, generator=g, dtype=torch.float64, requires_grad=True) for size in ((6, 2), (2, 5)))
    optimizer = torch.optim.LBFGS([left, right], max_iter=2000, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x @ (weight - left @ right).mT).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert output_error(x, weight, (left @ right).detach()) == pytest.approx(best, rel=1e-4)


def test_inputs_that_were_never_seen_break_nothing() -> None:
    weight, x = problem(7, 8)
    x[:, 3:] = 0
    gram = x.mT @ x
    for method in (data_aware, plus_diag):
        found = method(weight, gram, [3])[0].dense_OI()
        assert found.isfinite().all() and output_error(x, weight, found) < 1e-4 * float((x @ weight.mT).norm())


def test_a_diagonal_beside_low_rank_never_hurts_and_finds_what_was_planted() -> None:
    weight, x = problem(9, 9)
    gram = x.mT @ x
    for rank, f in zip(RANKS, data_aware(weight, gram, RANKS), strict=True):
        beside = plus_diag(weight, gram, [rank])[0]
        assert output_error(x, weight, beside.dense_OI()) < output_error(x, weight, f.dense_OI())
    # Rank 1 and a diagonal, which rank 2 alone cannot express.
    planted = weight[:, :1] @ weight[:1] * 0.1 + torch.linspace(1, 2, 9, dtype=torch.float64).diag()
    isotropic = torch.eye(9, dtype=torch.float64)
    with_diagonal, alone = plus_diag(planted, isotropic, [1])[0], data_aware(planted, isotropic, [1])[0]
    assert (planted - with_diagonal.dense_OI()).norm() < 0.3 * (planted - alone.dense_OI()).norm()


def test_the_diagonal_is_least_squares_channel_by_channel() -> None:
    residual, x = problem(8, 8)
    found = channel_diagonal(residual, x.mT @ x)
    outputs = x @ residual.mT
    for j in range(8):
        alone = torch.linalg.lstsq(x[:, j : j + 1], outputs[:, j : j + 1]).solution
        torch.testing.assert_close(found[j], alone[0, 0])


def test_a_scale_of_output_channels_adds_nothing_to_the_optimum() -> None:
    weight, x = problem(12, 7)
    gram = x.mT @ x
    for scaled, f in zip(plus_diag(weight, gram, RANKS), data_aware(weight, gram, RANKS), strict=True):
        torch.testing.assert_close(scaled.dense_OI(), f.dense_OI(), rtol=1e-6, atol=1e-6)
    halved = factors.channel_scale(weight, weight / 2, damped(gram))
    torch.testing.assert_close(halved, torch.full((12,), 2.0, dtype=torch.float64))
    assert factors.channel_scale(weight, weight * 0, damped(gram)).eq(1).all()


def test_ranks_and_break_even_by_hand() -> None:
    assert [factors.rank_of(f, 128, 384) for f in (1 / 16, 0.5, 1.0, 1e-6)] == [8, 64, 128, 1]
    assert break_even_rank(128, 384) == 96 and break_even_rank(10, 10) == 5
    f = Factors(torch.zeros(128, 96), torch.zeros(96, 384))
    assert f.left_OR.numel() + f.right_RI.numel() == 128 * 384
