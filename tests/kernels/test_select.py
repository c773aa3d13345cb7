"""rank_classes and compact, reference and Triton kernel, against sorting in plain Python."""

import math
import random

import pytest
import torch

from cggr_ray.kernels.select import op, reference

WIDTHS = [1, 2, 7, 64, 201]
INF, NAN = math.inf, math.nan
SPECIAL = [0.0, -0.0, INF, -INF, NAN, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, -1.0, 1.0000001]


@pytest.fixture(params=["reference", "kernel"])
def select(request, kernel_device, monkeypatch):
    """The module under test, with tiles so small that rows span several, and the device it is tested on."""
    torch.use_deterministic_algorithms(True)  # also fills new memory, so that what is not written shows
    if request.param == "reference":
        yield reference, "cpu"
    else:
        from cggr_ray.kernels.select import kernel

        for name in ("SEARCH_TILE", "CLASS_TILE", "COMPACT_TILE"):
            monkeypatch.setattr(kernel, name, 128)
        yield kernel, kernel_device
    torch.use_deterministic_algorithms(False)


def brute_classes(keys, ranks, groups=None):
    value = [-INF if k != k else k for k in keys]
    group = groups or [0] * len(keys)
    order = sorted(range(len(keys)), key=lambda t: (group[t], -value[t], t))
    classes = [0] * len(keys)
    for place, t in enumerate(order):
        classes[t] = sum(place >= r for r in ranks)
    return classes


def check_classes(select, keys, ranks, groups=None, num_groups=1):
    module, device = select
    moved = None if groups is None else groups.to(device)
    found = module.rank_classes(keys.to(device), ranks.to(device), moved, num_groups)
    assert found.dtype == torch.int32 and found.shape == keys.shape
    rows = groups.tolist() if groups is not None else [None] * len(keys)
    expected = [brute_classes(*row) for row in zip(keys.tolist(), ranks.tolist(), rows, strict=True)]
    assert found.tolist() == expected


KINDS = {
    "normal": lambda rng: rng.gauss(0, 1),
    "few": lambda rng: float(rng.randrange(-1, 2)),
    "equal": lambda rng: 2.5,
    "special": lambda rng: rng.choice(SPECIAL),
    "unlabelled": lambda rng: rng.gauss(0, 1) if rng.random() < 0.3 else -INF,
    "rounded": lambda rng: torch.tensor(rng.gauss(0, 1)).bfloat16().item(),
}


def random_keys(rng, width, *kinds):
    """One row of each kind."""
    return torch.tensor([[KINDS[kind](rng) for _ in range(width)] for kind in kinds])


@pytest.mark.parametrize("width", WIDTHS)
def test_classes_against_brute_force(select, width):
    rng = random.Random(width)
    ranks = [sorted(rng.randint(0, width) for _ in range(3)) for _ in KINDS]
    check_classes(select, random_keys(rng, width, *KINDS), torch.tensor(ranks))


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_any_number_of_ranks(select, num_ranks):
    rng = random.Random(num_ranks)
    ranks = [[rng.randint(0, 37) for _ in range(num_ranks)]]
    check_classes(select, random_keys(rng, 37, "few"), torch.tensor(ranks))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("width, num_groups", [(1, 2), (7, 1), (7, 2), (40, 5), (40, 300), (130, 5)])
def test_groups_come_before_keys(select, width, num_groups, dtype):
    rng = random.Random(num_groups)
    groups = [[rng.randrange(num_groups) for _ in range(width)] for _ in range(3)]
    ranks = torch.tensor([[0, width // 3, width // 2]] * 3, dtype=dtype)
    keys = random_keys(rng, width, "normal", "few", "special")
    check_classes(select, keys, ranks, torch.tensor(groups, dtype=dtype), num_groups)


def test_by_hand(select):
    keys = torch.tensor([[2.0, 5.0, 2.0, -INF, 5.0, 9.0, NAN, -0.0, 0.0]])
    found = select[0].rank_classes(keys.to(select[1]), torch.arange(1, 9, device=select[1]).unsqueeze(0), None, 1)
    assert found.tolist() == [[3, 1, 4, 7, 2, 0, 8, 5, 6]]


def test_ranks_that_nobody_and_everybody_reaches(select):
    ranks = torch.tensor([[0, 0, 5, 6, 2**40], [5, 0, 0, 5, 1], [-3, 9, 4, 4, 4]])
    check_classes(select, torch.randn(3, 5, generator=torch.Generator().manual_seed(1)), ranks)
    check_classes(select, torch.randn(3, 5), torch.empty(3, 0, dtype=torch.int64))


def test_a_longer_row_of_many_ties(select):
    keys = (random_keys(random.Random(3), 555, "normal") * 4).round() / 4
    check_classes(select, keys, torch.tensor([[1, 277, 278, 554]]))


def test_inputs_need_not_be_contiguous(select):
    keys = random_keys(random.Random(4), 2, *["few"] * 9).T
    ranks = torch.tensor([[3, 1], [5, 4], [9, 9]]).T[:, :2]
    groups = torch.tensor([0, 1, 1, 0, 2, 0, 1, 2, 2]).expand(2, 9)
    assert not keys.is_contiguous() and not groups.is_contiguous()
    check_classes(select, keys, ranks, groups, 3)
    module, device = select
    mask = (keys == 1).to(device)
    assert module.compact(mask, 9, 9).tolist() == module.compact(mask.contiguous(), 9, 9).tolist()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_compact_against_brute_force(select, width, share):
    module, device = select
    mask = torch.rand(3, width, generator=torch.Generator().manual_seed(width)) < share
    for slots, fill in ((1, 0), (width, -1), (width // 3 + 1, width), (width + 200, 1), (0, 7)):
        found = module.compact(mask.to(device), slots, fill)
        assert found.dtype == torch.int64
        for row, index in zip(mask.tolist(), found.tolist(), strict=True):
            true = [t for t, kept in enumerate(row) if kept][:slots]
            assert index == true + [fill] * (slots - len(true))


def test_the_device_decides_and_no_other_is_accepted():
    assert op.implementation(torch.device("cpu")) is reference
    assert op.implementation(torch.device("cuda")).__name__ == "cggr_ray.kernels.select.kernel"
    with pytest.raises(ValueError, match="meta"):
        op.rank_classes(torch.empty(2, 3, device="meta"), torch.empty(2, 1, device="meta"))
    with pytest.raises(AssertionError, match="float64"):
        op.rank_classes(torch.zeros(2, 3).double(), torch.ones(2, 1).long())


def test_scores_that_carry_a_gradient_give_plain_classes():
    keys = torch.randn(2, 5, requires_grad=True)
    assert not op.rank_classes(keys, torch.tensor([[2], [2]])).requires_grad
