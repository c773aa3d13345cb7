"""Orthogonalising against the polar factor of a float64 singular value decomposition, and the published polynomials."""

import math

import pytest
import torch
from polar_oracle import cosine, published, with_spectrum

from cggr_ray.optim import polar
from cggr_ray.optim.polar import NEWTON_SCHULZ, orthogonalise, polynomials

METHODS = ["newton_schulz", "polar_express"]
SHAPES = [(1, 1), (1, 17), (17, 1), (7, 7), (33, 65), (65, 33), (16, 128), (128, 16), (64, 64)]
# Smallest singular value over the Frobenius norm from which on the bounds hold, lowest and highest singular value of
# the result. Newton-Schulz grows a value of 0.001 by 3.4445^5 only, to 0.47; it needs a little more to start with.
BOUNDS = {"newton_schulz": (5e-3, 0.68, 1.2), "polar_express": (1e-3, 0.8, 1.2)}
LEAST_COSINE = {"newton_schulz": 0.98, "polar_express": 0.99}


def spread(count, smallest):
    """`count` singular values from 1 down, evenly in logarithms, the least `smallest` times the Frobenius norm."""
    low, high = math.log(smallest) - 3, 0.0
    for _ in range(100):
        middle = (low + high) / 2
        values = torch.logspace(0, middle / math.log(10), count, dtype=torch.float64)
        low, high = (middle, high) if values[-1] / values.norm() < smallest else (low, middle)
    return values


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_singular_values_land_near_one(rows, columns, method):
    smallest, low, high = BOUNDS[method]
    count = min(rows, columns)
    spectrum = spread(count, min(smallest, 0.9 / math.sqrt(count)))
    matrix, _ = with_spectrum(rows, columns, spectrum, seed=rows + columns)
    found = torch.linalg.svdvals(orthogonalise(matrix[None].float(), method)[0].double())
    assert low <= found.min() and found.max() <= high, found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_direction_is_the_polar_factor(rows, columns, method):
    # A spectrum as wide as that of a random rectangular matrix.
    spectrum = torch.linspace(1, 0.1, min(rows, columns), dtype=torch.float64)
    matrix, polar = with_spectrum(rows, columns, spectrum, seed=3 * rows + columns)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(left @ right, polar, atol=1e-10, rtol=0)
    result = orthogonalise(matrix[None].float(), method)
    assert result.shape == (1, rows, columns) and result.dtype == torch.float32
    assert cosine(result[0], polar) > LEAST_COSINE[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_all_of_a_direction_is_that_of_the_published_polynomials(rows, columns, method):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    expected = published(matrix, method)
    assert (orthogonalise(matrix[None], method)[0] - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize("at_once", [1, 2, 3, 5])
def test_a_stack_is_worked_through_some_matrices_at_a_time(monkeypatch, at_once):
    monkeypatch.setattr(polar, "LARGEST_PRODUCT", 7 * 11 * at_once)
    stack = torch.randn(5, 11, 7, generator=torch.Generator().manual_seed(at_once))
    for matrix, found in zip(stack, orthogonalise(stack, "polar_express"), strict=True):
        torch.testing.assert_close(found.double(), published(matrix, "polar_express"), atol=1e-4, rtol=0)


def test_what_a_compiler_is_told_of_the_polynomials_is_true():
    start = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    for z in (start, start.mT.contiguous().mT):
        torch.library.opcheck(polynomials, (z, NEWTON_SCHULZ[1]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows, columns, rank", [(20, 20, 3), (31, 12, 5), (12, 31, 1)])
def test_rank_deficient_matrices_gain_no_direction(rows, columns, rank, method):
    matrix, polar = with_spectrum(rows, columns, torch.linspace(1, 0.3, rank, dtype=torch.float64), seed=rank)
    result = orthogonalise(matrix[None].float(), method)[0]
    values = torch.linalg.svdvals(result.double())
    # With three singular values the cosine is at worst that of (0.68, 1.2) with ones.
    assert result.isfinite().all() and cosine(result, polar) > 0.96
    assert values[rank - 1] > 0.68 and values[rank:].max() < 2e-3, values


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stays_zero_and_leaves_its_neighbours_alone(method, dtype):
    stack = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    stack[1] = 0
    result = orthogonalise(stack, method)
    assert result.isfinite().all() and (result[1] == 0).all()
    for i in (0, 2):
        torch.testing.assert_close(result[i], orthogonalise(stack[i : i + 1], method)[0], atol=2e-2, rtol=0)
        assert result[i].norm() > 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1e-4, 1e6])
def test_length_of_the_gradient_does_not_matter(method, factor):
    matrix = torch.randn(2, 12, 30, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalise(matrix * factor, method), orthogonalise(matrix, method), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_input_gives_nearly_the_same_direction(method):
    matrix = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(2))
    assert cosine(orthogonalise(matrix.bfloat16(), method), orthogonalise(matrix, method)) > 0.999
