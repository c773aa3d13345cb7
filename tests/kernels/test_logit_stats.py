"""`logit_stats`, reference and Triton kernel, against float64 brute force and against `chunk_stats` in float64."""

import pytest
import torch
from test_head_stats import as_columns, assert_near, expected_stats

from cggr_ray.kernels.head_stats.reference import chunk_stats
from cggr_ray.kernels.logit_stats import reference
from cggr_ray.kernels.logit_stats.op import logit_stats

FINITE = slice(0, 6)
# A row of -inf, and dead lanes.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(params=["reference", "kernel", "kernel, split"])
def found_of(request, kernel_device, monkeypatch):
    """Statistics as float64 columns on the CPU. Without a GPU the kernel runs in the interpreter on narrow tiles."""
    if request.param == "reference":
        monkeypatch.setattr(reference, "CHUNK_BYTES", 4 * 3 * 70)
        return lambda logits, labels: as_columns(logit_stats(logits.cpu(), labels.cpu()))
    from cggr_ray.kernels.logit_stats.kernel import launch_logit_stats

    lanes, vector = (8, 4) if kernel_device == "cpu" else (128, None)
    splits = 3 if "split" in request.param else 1

    def run(logits, labels):
        return as_columns(
            launch_logit_stats(logits.to(kernel_device), labels.to(kernel_device), lanes, 4, splits, vector)
        ).cpu()

    return run


def random_case(rows, vocabulary, dtype=torch.float32, scale=3.0):
    g = torch.Generator().manual_seed(rows + vocabulary)
    logits = (torch.randn(rows, vocabulary, generator=g) * scale).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=g)
    labels[1::4] = -100
    return logits, labels


CASES = [((n, v), torch.float32) for n, v in [(1, 1), (1, 2), (3, 31), (4, 32), (5, 33), (4, 100), (1, 257)]]
CASES += [((3, 70), torch.bfloat16), ((3, 70), torch.float16)]


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_all_statistics(shape, dtype, found_of):
    logits, labels = random_case(*shape, dtype)
    assert_near(found_of(logits, labels), expected_stats(logits, labels), 3e-6)


@pytest.mark.parametrize("tied", [(0, 1), (3, 4), (31, 32), (2, 40, 66), tuple(range(70))])
def test_ties_have_margin_zero_and_the_first_of_them_is_the_argmax(tied, found_of):
    logits = torch.linspace(-3, 1, 70).repeat(3, 1)
    logits[:, list(tied)] = 2.5
    labels = torch.tensor([tied[0], tied[-1], 68])
    found, expected = found_of(logits, labels), expected_stats(logits, labels)
    assert (found[:, 3] == 0).all()
    assert_near(found, expected, 2e-6)


@pytest.mark.parametrize("offset", [-1e4, 1e6])
def test_a_common_offset_costs_no_accuracy(offset, found_of):
    logits, labels = random_case(3, 90)
    logits = logits + offset
    assert_near(found_of(logits, labels), expected_stats(logits, labels), 1e-5)


@pytest.mark.parametrize("lead", [12.0, 40.0, 1e4])
def test_a_certain_label_neither_cancels_nor_fails(lead, found_of):
    logits, labels = random_case(4, 83, scale=1.0)
    labels = labels.clamp_min(5)
    logits[torch.arange(4), labels] = lead
    found, expected = found_of(logits, labels), expected_stats(logits, labels)
    for column in (0, 4):
        torch.testing.assert_close(found[:, column], expected[:, column], rtol=2e-5, atol=1e-20)
    assert_near(found, expected, 1e-6)


def test_tokens_that_cannot_come(found_of):
    logits, labels = random_case(6, 100)
    logits[:, 40:] = -torch.inf
    logits[3:, :20] = -torch.inf
    labels[:] = torch.tensor([7, 3, -100, 25, 39, 5])
    expected = as_columns(chunk_stats(logits.double(), labels))
    found = found_of(logits, labels)
    assert found[5, 0] == torch.inf and expected[5, 0] == torch.inf
    assert_near(found, expected, 2e-6)


def test_a_nan_shows(found_of):
    logits, labels = random_case(4, 70)
    logits[2, 69] = torch.nan
    found = found_of(logits, labels)
    assert found[2, FINITE].isnan().all() and found[[0, 3]].isfinite().all()


def test_a_row_without_a_distribution_is_nan(found_of):
    """Nothing can come, or a logit has no end: no statistic of such a row is a number, whatever its label."""
    logits, labels = random_case(6, 70)
    logits[0], logits[2, 5], logits[3, 69] = -torch.inf, torch.inf, torch.inf
    labels[:] = torch.tensor([7, 3, 5, 7, 3, -100])
    found = found_of(logits, labels)
    assert found[[0, 2, 3], FINITE].isnan().all() and found[[1, 4]].isfinite().all()


def test_strided_rows_and_columns(found_of):
    wide, labels = random_case(12, 97)
    for logits in (wide[::2, 11:80], wide[:6, 3:75:2]):
        label = labels[:6].clamp_max(30)
        assert_near(found_of(logits, label), expected_stats(logits, label), 3e-6)


@pytest.mark.parametrize("label", [-100, -1])
def test_nothing_labelled_is_all_nan(label, found_of):
    logits, _ = random_case(3, 40)
    found = found_of(logits, torch.full((3,), label))
    assert found[:, FINITE].isnan().all() and not found[:, 6].any()


def test_no_rows():
    assert as_columns(logit_stats(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))).shape == (0, 7)


@pytest.mark.parametrize(("logits", "labels"), [((3, 5), (4,)), ((2, 3, 5), (2,)), ((3, 5), (3, 1))])
def test_what_does_not_fit_is_named(logits, labels):
    with pytest.raises(ValueError, match="accepted"):
        logit_stats(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_named(dtype):
    with pytest.raises(ValueError, match=f"{dtype} on 'cpu'; accepted: "):
        logit_stats(torch.zeros(2, 5).to(dtype), torch.zeros(2).long())


def test_float64_is_for_the_cpu_alone():
    logits, labels = random_case(5, 60, torch.float64)
    stats = logit_stats(logits, labels)
    assert {x.dtype for x in stats[:6]} == {torch.float64}
    assert_near(as_columns(stats), expected_stats(logits, labels), 1e-12)
    with pytest.raises(ValueError, match=r"torch\.float64 on 'meta'; accepted: "):
        logit_stats(logits.to("meta"), labels.to("meta"))


@pytest.mark.parametrize("vocabulary", [32000, 50257, 128256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 700])
def test_real_sizes(vocabulary, dtype, rows, kernel_device):
    if kernel_device == "cpu":
        pytest.skip("too large for the interpreter")
    logits, labels = (x.cuda() for x in random_case(rows, vocabulary, dtype))
    found = as_columns(logit_stats(logits, labels))
    expected = as_columns(chunk_stats(logits.double(), labels))
    assert_near(found[:, FINITE], expected[:, FINITE], 1e-5)
    assert torch.equal(found[:, 6], expected[:, 6])
