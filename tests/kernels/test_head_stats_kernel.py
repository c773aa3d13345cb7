"""The Triton kernels of `head_stats` against float64 brute force, and against eager PyTorch in the same dtype.

Without a GPU they run in Triton's interpreter, on tiles so small that a case has several, and several splits; on a GPU
every case runs on those tiles and on the ones that the device gets.
"""

import pytest
import torch
from test_head_stats import NAMES, as_columns, assert_near, expected_stats

from cggr_ray.kernels.head_stats.reference import chunk_stats, soft_capped
from cggr_ray.kernels.head_stats.tiling import PARTS_BYTES, Tiling, pick_splits, pick_tiling

# Lanes past the rows take the logarithm of 0, and a row of NaN has no maximum; neither is stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
# What float32 sums in another order than eager PyTorch's may add to its error.
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-5, torch.bfloat16: 1e-5}
FINITE = slice(0, 6)


@pytest.fixture
def tiles(kernel_device):
    """(tiling, splits) of every launch of a case; None is what the launch picks by itself."""
    cut = (Tiling(rows=16, columns=16, depth=32, warps=1, stages=1), 3)
    return [cut] if kernel_device == "cpu" else [cut, (None, None)]


@pytest.fixture
def found_on(kernel_device, tiles):
    """Statistics of a case for every way to cut it, as float64 columns on the CPU."""
    from cggr_ray.kernels.head_stats.kernel import launch_head_stats

    def run(hidden, head, labels, softcap=None):
        operands = [x.to(kernel_device) for x in (hidden, head, labels)]
        return [as_columns(launch_head_stats(*operands, softcap, *cut)).cpu() for cut in tiles]

    return run


@pytest.fixture
def needs_gpu_for(kernel_device):
    """Skips bf16 in the interpreter, whose dot multiplies the bits of bf16 as integers."""

    def check(dtype):
        if dtype == torch.bfloat16 and kernel_device == "cpu":
            pytest.skip("Triton's interpreter has no bf16 dot")

    return check


def random_case(rows, width, vocabulary, dtype=torch.float32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed + rows + width + vocabulary)
    hidden = (torch.randn(rows, width, generator=g) * scale).to(dtype)
    head = torch.randn(vocabulary, width, generator=g).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=g)
    labels[1::5] = -100
    return hidden, head, labels


def assert_no_worse_than_eager(found, hidden, head, labels, softcap=None):
    exact = soft_capped_double(hidden.double() @ head.double().T, softcap)
    expected = expected_stats(exact, labels)
    eager = as_columns(chunk_stats(soft_capped(hidden @ head.T, softcap), labels))
    assert torch.equal(found.isnan(), expected.isnan())
    for i, name in enumerate(NAMES[FINITE]):
        error = (found - expected)[:, i].abs().nan_to_num()
        allowed = (eager - expected)[:, i].abs().max().nan_to_num() + FLOOR[hidden.dtype] * (
            1 + expected[:, i].abs().nan_to_num()
        )
        assert (error <= allowed).all(), f"{name}: {(error - allowed).max():.3g} over"
    # Rounding may pick either of two logits that are all but equal.
    top_two = exact.topk(min(2, exact.shape[1])).values
    clear = (top_two[:, 0] - top_two[:, -1] > 1e-4) | (labels < 0) | torch.tensor(exact.shape[1] == 1)
    assert torch.equal(found[clear, 6], expected[clear, 6])


def soft_capped_double(logits, softcap):
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


SHAPES = [(1, 1, 2), (1, 16, 1), (3, 5, 16), (17, 40, 33), (16, 16, 16), (35, 24, 100), (5, 7, 257), (2, 130, 50)]


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape, found_on):
    case = random_case(*shape)
    for found in found_on(*case):
        assert_no_worse_than_eager(found, *case)


@pytest.mark.parametrize(("splits", "blocks_together"), [(1, 1), (2, 2), (5, 1), (7, 2), (9, 3)])
def test_every_order_of_programs(splits, blocks_together, kernel_device):
    """Three blocks of rows and five tiles: groups that do not divide the blocks, splits that get no tile."""
    from cggr_ray.kernels.head_stats.kernel import launch_head_stats

    case = random_case(36, 16, 70)
    tiling = Tiling(rows=16, columns=16, depth=16, warps=1, stages=1, group_bytes=blocks_together * 16 * 16 * 4)
    found = launch_head_stats(*(x.to(kernel_device) for x in case), None, tiling, splits)
    assert_no_worse_than_eager(as_columns(found).cpu(), *case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dtypes_and_a_soft_cap(dtype, softcap, found_on, needs_gpu_for):
    needs_gpu_for(dtype)
    case = random_case(19, 33, 75, dtype)
    for found in found_on(*case, softcap):
        assert_no_worse_than_eager(found, *case, softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocabulary", [64, 100])
def test_the_copy_engine_reads_the_same(dtype, vocabulary, kernel_device, needs_gpu_for):
    needs_gpu_for(dtype)
    from cggr_ray.kernels.head_stats.kernel import launch_head_stats

    if kernel_device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no copy engine")
    hidden, head, labels = (x.to(kernel_device) for x in random_case(21, 40, vocabulary, dtype))
    cuts = [(Tiling(rows=16, columns=16, depth=16, warps=1, stages=1, tma=tma), 2) for tma in (False, True)]
    by_pointers, by_engine = (as_columns(launch_head_stats(hidden, head, labels, None, *cut)) for cut in cuts)
    torch.testing.assert_close(by_engine, by_pointers, rtol=0, atol=0, equal_nan=True)


def of_logits(found_on, logits, labels):
    """With the identity as head the logits are exactly these."""
    return found_on(logits, torch.eye(logits.shape[1]), labels)


# Columns of a tile are 16 wide: ties inside one tile, across tiles, across splits, at the edges of the vocabulary.
@pytest.mark.parametrize(
    "tied", [(0, 1), (3, 12), (15, 16), (2, 40, 66), (0, 69), (5, 21, 37, 53, 69), tuple(range(70))]
)
def test_ties_have_margin_zero_and_the_first_of_them_is_the_argmax(tied, found_on):
    logits = torch.linspace(-3, 1, 70).repeat(len(tied) + 1, 1)
    logits[:, list(tied)] = 2.5
    labels = torch.tensor([*tied, 1 if tied[0] != 1 else 3])
    expected = expected_stats(logits, labels)
    for found in of_logits(found_on, logits, labels):
        assert (found[:, 3] == 0).all()
        assert found[:, 6].tolist() == expected[:, 6].tolist()
        assert_near(found, expected, 2e-6)


@pytest.mark.parametrize("offset", [0.0, -1e4, 1e6])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_a_common_offset_costs_no_accuracy(offset, spread, found_on):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 90, generator=g) * spread + offset
    labels = torch.tensor([0, 17, 33, 64, 89, -100])
    for found in of_logits(found_on, logits, labels):
        assert_near(found, expected_stats(logits, labels), 1e-5)


@pytest.mark.parametrize("lead", [2.0, 12.0, 20.0, 40.0, 1e4])
def test_a_certain_label_neither_cancels_nor_fails(lead, found_on):
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(8, 83, generator=g)
    labels = torch.randint(83, (8,), generator=g)
    logits[torch.arange(8), labels] = lead
    expected = expected_stats(logits, labels)
    for found in of_logits(found_on, logits, labels):
        for column in (0, 4):
            torch.testing.assert_close(found[:, column], expected[:, column], rtol=2e-5, atol=1e-20)
        assert_near(found, expected, 1e-6)


def test_one_hot_logits(found_on):
    logits = torch.zeros(3, 36)
    logits[:, 20] = 1e4
    for found in of_logits(found_on, logits, torch.tensor([20, 4, -100])):
        assert found[0].tolist() == [0, 0, 1, 1, 0, 1e4, 1]
        assert found[1, :4].tolist() == [1e4, 0, 1, 1] and found[1, 6] == 0
        assert found[1, 4].item() == pytest.approx(2**0.5, rel=1e-6)
        assert found[2, FINITE].isnan().all() and found[2, 6] == 0


def test_a_tile_that_holds_nothing_but_the_label(found_on):
    """The last tile has one column, and it is the label's."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 33, generator=g)
    labels = torch.tensor([32, 32, 0, -100])
    for found in of_logits(found_on, logits, labels):
        assert_near(found, expected_stats(logits, labels), 1e-6)


@pytest.mark.parametrize("label", [-100, -1, 33, 10**6])
def test_a_label_outside_the_vocabulary_is_nan(label, found_on):
    logits = torch.randn(3, 33, generator=torch.Generator().manual_seed(4))
    for found in of_logits(found_on, logits, torch.full((3,), label)):
        assert found[:, FINITE].isnan().all() and not found[:, 6].any()


def test_a_nan_in_the_hidden_states_shows(found_on):
    hidden, head, labels = random_case(4, 16, 40)
    hidden[2, 3] = torch.nan
    for found in found_on(hidden, head, labels):
        assert found[2, [0, 1, 2, 3, 4, 5]].isnan().all() and found[0].isfinite().all()


def test_logits_without_end_have_no_statistics(found_on):
    hidden, head, _ = random_case(4, 16, 40)
    head[:, 3] = head[:, 3].abs()
    hidden[0, 3], hidden[2, 3] = -torch.inf, torch.inf
    for found in found_on(hidden, head, torch.tensor([7, 3, 5, 9])):
        assert found[[0, 2], FINITE].isnan().all() and found[[1, 3]].isfinite().all()


def test_operands_that_are_not_contiguous(found_on):
    g = torch.Generator().manual_seed(5)
    wide, tall = torch.randn(12, 60, generator=g), torch.randn(20, 50, generator=g)
    labels = torch.randint(50, (24,), generator=g)[::2]
    for hidden in (wide[:, 7:27], torch.randn(20, 12, generator=g).T):
        expected = expected_stats(hidden.double() @ tall.double(), labels)
        for found in found_on(hidden, tall.T, labels):
            assert_near(found, expected, 1e-5)


def test_every_output_is_written(found_on, monkeypatch):
    case = random_case(21, 16, 50)
    expected = found_on(*case)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(True if out.dtype == torch.bool else 1e9)

    monkeypatch.setattr(torch, "empty", poisoned)
    for found, clean in zip(found_on(*case), expected, strict=True):
        torch.testing.assert_close(found, clean, rtol=0, atol=0, equal_nan=True)


def test_the_splits_fill_whole_waves():
    for rows, tiles, slots in [(16384, 512, 132), (16384, 1024, 132), (512, 196, 132), (1, 1, 132), (40000, 126, 264)]:
        blocks = -(-rows // 128)
        splits = pick_splits(rows, blocks, tiles, slots)
        assert 1 <= splits <= tiles and 7 * 4 * splits * rows <= PARTS_BYTES
        programs = blocks * splits
        if blocks * tiles > 40 * slots:
            assert programs / (-(-programs // slots) * slots) > 0.9


@pytest.mark.parametrize(("shared", "columns"), [(227 << 10, 256), (163 << 10, 128), (99 << 10, 128)])
def test_the_tiling_fits_the_device(shared, columns):
    tiling = pick_tiling(torch.bfloat16, 2048, (8, 0), shared)
    assert tiling.shared_bytes(2) < shared and tiling.columns == columns and not tiling.tma


def test_inside_a_cuda_graph(kernel_device):
    if kernel_device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    from cggr_ray.kernels.head_stats.op import head_stats

    hidden, head, labels = (x.cuda() for x in random_case(300, 64, 1000, torch.bfloat16))
    expected = as_columns(head_stats(hidden, head, labels))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = head_stats(hidden, head, labels)
    graph.replay()
    torch.testing.assert_close(as_columns(stats), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(300, 576, 49152), (129, 2048, 32001), (1000, 200, 5000)])
def test_real_sizes(shape, kernel_device):
    if kernel_device == "cpu":
        pytest.skip("too large for the interpreter")
    from cggr_ray.kernels.head_stats.op import head_stats

    hidden, head, labels = random_case(*shape, torch.bfloat16, scale=shape[1] ** -0.5 * 4)
    found = as_columns(head_stats(hidden.cuda(), head.cuda(), labels.cuda())).cpu()
    exact = (hidden.cuda().double() @ head.cuda().double().T).cpu()
    assert_near(found[:, FINITE], as_columns(chunk_stats(exact, labels))[:, FINITE], 3e-5)
