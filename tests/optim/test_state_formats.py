"""Averages kept in 8 bits: against tables of every code in float64, and at the ends of the range."""

import math

import pytest
import torch
from small_optimizers import assert_same

from cggr_ray.optim.adamw import AdamW
from cggr_ray.optim.muon import Muon
from cggr_ray.optim.state_formats import BFloat16, Float32, Int8Blockwise, block_of, decode, encode

EVERY = ["linear", "geometric", "squares"]
ONE = torch.ones(())


def values(codes, rows=48, columns=256, seed=0):
    """Magnitudes over many octaves within a block, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    found = (
        torch.randn(rows, columns, generator=generator) * torch.randn(rows, columns, generator=generator).mul(3).exp()
    )
    found *= torch.rand(rows, columns, generator=generator) > 0.05
    return found.abs() if codes == "squares" else found


def per_value(scales, columns):
    return scales.double().repeat_interleave(columns // scales.shape[-1], -1)


def table(codes):
    """What a code can stand for, as a part of the scale."""
    if codes == "linear":
        return torch.arange(-127, 128, dtype=torch.float64) / 127
    top, octave = {"geometric": (127, 8), "squares": (255, 12)}[codes]
    sizes = torch.tensor([2.0 ** ((c - top) / octave) for c in range(1, top + 1)], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([zero, sizes] if codes == "squares" else [-sizes, zero, sizes])


def stored(codes, value):
    state = Int8Blockwise().zeros("x", value, codes)
    Int8Blockwise().write(state, "x", value, codes, ONE)
    return state


@pytest.mark.parametrize("codes", EVERY)
def test_scale_is_the_largest_of_its_block_in_bf16(codes):
    x = values(codes)
    packed, scales = encode(x, 4, codes)
    assert scales.dtype == torch.bfloat16 and scales.shape == (48, 4)
    assert packed.dtype == (torch.uint8 if codes == "squares" else torch.int8) and packed.shape == x.shape
    largest = torch.tensor([[x[i, j : j + 64].abs().max() for j in range(0, 256, 64)] for i in range(48)])
    assert torch.equal(scales, largest.bfloat16()) and ((scales - largest).abs() <= largest * 2**-8).all()


@pytest.mark.parametrize("codes", EVERY)
def test_every_value_becomes_a_code_of_the_table(codes):
    x = values(codes, rows=8)
    packed, scales = encode(x, 2, codes)
    unit = decode(packed, scales, codes).double() / per_value(scales, 256)
    assert ((unit[..., None] - table(codes)).abs().amin(-1) <= 1e-6 * unit.abs()).all()


def test_linear_codes_are_off_by_half_a_step_at_most():
    x = torch.cat([values("linear"), torch.randn(48, 256, generator=torch.Generator().manual_seed(1))])
    packed, scales = encode(x, 2, "linear")
    step = per_value(scales, 256) / 127
    off = (x.double() - decode(packed, scales, "linear").double()).abs()
    assert (off <= step * (0.5 + 1e-4)).all() and off.max() > 0.3 * step[off == off.max()].max()


@pytest.mark.parametrize("codes, ratio, octaves", [("geometric", 2 ** (1 / 16), 15.75), ("squares", 2 ** (1 / 24), 21)])
def test_ratio_codes_are_off_by_half_a_ratio_over_the_range(codes, ratio, octaves):
    x = values(codes)
    packed, scales = encode(x, 2, codes)
    found, part = decode(packed, scales, codes).double(), x.double().abs() / per_value(scales, 256)
    inside = part >= 2.0**-octaves
    assert 0.5 < inside.double().mean() < 0.96
    quotient = found[inside] / x.double()[inside]
    assert ((quotient <= ratio * (1 + 1e-4)) & (quotient >= (1 - 1e-4) / ratio)).all()
    # Below, nothing becomes more than the smallest code stands for, and nothing changes its sign.
    least = per_value(scales, 256) * 2.0**-octaves * ratio**2
    assert (found[~inside].abs() <= least[~inside]).all()
    assert (found * x.double() >= 0).all() and (found[x == 0] == 0).all()


def test_a_square_that_is_not_zero_never_becomes_zero():
    x = torch.logspace(-37, 30, 256).flip(0).view(2, 128)
    x = torch.cat([x, torch.tensor([1e30, 1e-38]).repeat(2, 64)])
    found = decode(*encode(x, 1, "squares"), "squares")
    assert (found > 0).all()
    assert (decode(*encode(torch.zeros(4, 128), 1, "squares"), "squares") == 0).all()


@pytest.mark.parametrize("codes", EVERY)
def test_block_of_zeros_stays_zero_beside_others(codes):
    x = values(codes, rows=3)
    x[1, :128] = 0
    packed, scales = encode(x, 2, codes)
    found = decode(packed, scales, codes)
    assert scales[1, 0] == 0 and (found[1, :128] == 0).all() and found.isfinite().all()
    assert (found[1, 128:] != 0).any() and (found[0] != 0).any()


@pytest.mark.parametrize("codes", EVERY)
@pytest.mark.parametrize("size", [1e-42, 1e-40, 1.29e-40, 1e-38, 1e-30, 1e30, 1e38])
def test_tiny_and_huge_values_keep_sign_and_size(codes, size):
    x = torch.full((2, 64), size)
    x[1, ::2] *= 0.5 if codes == "squares" else -0.5
    found = decode(*encode(x, 1, codes), codes)
    assert found.isfinite().all() and (found.double() * x.double() >= 0).all()
    # A scale below the least positive bf16, 9e-41, is 0; up to 1e-38 bf16 has fewer digits than usual.
    assert (found.double() - x.double()).abs().max() <= (9.2e-41 if size < 1e-38 else 0.05 * size)


@pytest.mark.parametrize("codes", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3.4e38])
def test_a_bad_value_spoils_its_own_block_alone(codes, bad):
    x = values(codes, rows=2)
    hurt = x.clone()
    hurt[0, 200] = abs(bad) if codes == "squares" else bad
    (packed, scales), (clean, clean_scales) = encode(hurt, 4, codes), encode(x, 4, codes)
    others = torch.arange(256) // 64 != 3
    assert torch.equal(packed[0, others], clean[0, others]) and torch.equal(packed[1], clean[1])
    assert torch.equal(scales.flatten()[[0, 1, 2, 4, 5, 6, 7]], clean_scales.flatten()[[0, 1, 2, 4, 5, 6, 7]])


@pytest.mark.parametrize("codes", EVERY)
def test_a_row_that_shrinks_as_a_whole_keeps_its_codes(codes):
    x = values(codes)
    x[:, ::128] = 1e6
    packed, scales = encode(x, 2, codes)
    half, half_scales = encode(x * 0.5, 2, codes)
    assert torch.equal(half, packed) and torch.equal(half_scales.float() * 2, scales.float())


@pytest.mark.parametrize("codes", ["geometric", "squares"])
def test_ratio_codes_survive_any_number_of_round_trips(codes):
    state = stored(codes, values(codes)[None])
    first = {key: value.clone() for key, value in state.items()}
    for _ in range(4):
        Int8Blockwise().write(state, "x", Int8Blockwise().read(state, "x", codes), codes, ONE)
        assert_same(state, first)


def test_linear_codes_move_by_half_a_step_a_round_trip_at_most():
    state = stored("linear", values("linear")[None])
    for _ in range(4):
        before = Int8Blockwise().read(state, "x", "linear")
        Int8Blockwise().write(state, "x", before, "linear", ONE)
        off = (Int8Blockwise().read(state, "x", "linear") - before).abs()
        assert (off <= per_value(state["x.scales"], 256) / 127 * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("columns, block", [(576, 96), (100, 100), (2560, 128), (960, 120), (128, 128), (32, 32),
                                            (50257, None), (131, None), (31, None), (1, None), (127, 127)])  # fmt: skip
def test_block_is_the_largest_divisor_of_a_row(columns, block):
    assert block_of(columns) == block


@pytest.mark.parametrize(
    "shape, eight",
    [((1, 64, 64), True), ((3, 32, 128), True), ((1, 63, 64), False), ((1, 32, 127), False), ((9, 8, 128), False),
     ((2, 200, 131), False), ((2, 4096), True), ((2, 4095), False), ((5000,), False), ((1, 4, 32, 33), True)],
)  # fmt: skip
def test_small_and_indivisible_tensors_stay_float32(shape, eight):
    state = Int8Blockwise().zeros("x", torch.zeros(shape, dtype=torch.bfloat16), "linear")
    if not eight:
        assert state["x"].dtype == torch.float32 and state["x"].shape == shape and state.keys() == {"x"}
        x = torch.randn(shape)
        Int8Blockwise().write(state, "x", x, "linear", ONE)
        assert torch.equal(Int8Blockwise().read(state, "x", "linear"), x)
    else:
        assert state.keys() == {"x.codes", "x.scales"} and state["x.codes"].shape == shape
        assert (Int8Blockwise().read(state, "x", "linear") == 0).all()


def test_bytes_of_the_live_tensors():
    def bytes_of(rule):
        return sum(t.numel() * t.element_size() for t in rule.init_state(torch.zeros(1, 2048, 2560)).values())

    size, eight = 2048 * 2560, Int8Blockwise()
    assert bytes_of(Muon(state=eight)) == size * (1 + 2 / 128)
    # And four bytes that count steps.
    assert bytes_of(AdamW(state=eight)) == 2 * size * (1 + 2 / 128) + 4
    assert bytes_of(Muon()) == 4 * size and bytes_of(AdamW()) == 8 * size + 4
    assert bytes_of(Muon(state=BFloat16())) == 2 * size and bytes_of(AdamW(state=BFloat16())) == 6 * size + 4


@pytest.mark.parametrize("codes", EVERY)
@pytest.mark.parametrize(
    "kept, columns", [(Float32(), 128), (BFloat16(), 128), (Int8Blockwise(), 128), (Int8Blockwise(), 131)]
)
def test_a_write_that_is_not_kept_changes_no_bit(kept, columns, codes):
    state = kept.zeros("x", torch.zeros(2, 64, columns), codes)
    kept.write(state, "x", values(codes, 128, columns).view(2, 64, columns), codes, ONE)
    before = {key: value.clone() for key, value in state.items()}
    other = values(codes, 128, columns, seed=1).view(2, 64, columns)
    kept.write(state, "x", other, codes, torch.zeros(()))
    assert_same(state, before)
    kept.write(state, "x", other, codes, ONE)
    assert not any(torch.equal(state[key], before[key]) for key in state)
    assert (kept.read(state, "x", codes) - other).norm() < 0.1 * other.norm()


# bf16


def nearest_bf16(value):
    """Of a float64, ties to even: eight bits of a fraction between 1/2 and 1."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(fraction, 8)), exponent - 8)


def test_a_momentum_in_bf16_is_rounded_once_a_step():
    rule, generator = Muon(momentum=0.95, state=BFloat16()), torch.Generator().manual_seed(5)
    state, expected = rule.init_state(torch.zeros(1, 4, 6)), [0.0] * 24
    assert state["momentum"].dtype == torch.bfloat16
    for _ in range(30):
        gradient = torch.randn(1, 4, 6, generator=generator)
        rule.direction(gradient, state, ONE)
        exact = [0.95 * m + 0.05 * g for m, g in zip(expected, gradient.flatten().double().tolist(), strict=True)]
        found = state["momentum"].flatten().double().tolist()
        for m, f in zip(exact, found, strict=True):
            # A sum in float32 may fall on the other side of the middle between two values.
            assert f == nearest_bf16(m) or abs(abs(f - m) - abs(nearest_bf16(m) - m)) < 1e-6 * abs(m)
        expected = found


def test_with_bf16_adamw_keeps_its_second_moment_exactly():
    rules = [AdamW(beta2=0.999), AdamW(beta2=0.999, state=BFloat16())]
    states = [rule.init_state(torch.zeros(1, 16, 24)) for rule in rules]
    generator = torch.Generator().manual_seed(6)
    for _ in range(50):
        gradient = torch.randn(1, 16, 24, generator=generator) + 0.3
        found = [rule.direction(gradient, state, ONE) for rule, state in zip(rules, states, strict=True)]
        assert (found[0] - found[1]).norm() < 0.01 * found[0].norm()
    assert torch.equal(states[0]["second"], states[1]["second"])
    assert states[1]["first"].dtype == torch.bfloat16
    assert not torch.equal(states[0]["first"], states[1]["first"].float())


@pytest.mark.parametrize("start", [1.0, 1 + 2**-7, 1.5, 2 - 2**-7, -1.25])
def test_the_longest_average_in_bf16_still_decays(start):
    state = BFloat16().zeros("x", torch.zeros(1, 1, 1), "linear")
    BFloat16().write(state, "x", torch.full((1, 1, 1), start), "linear", ONE)
    before, longest = abs(start), BFloat16().longest("linear")
    for _ in range(2000):
        BFloat16().write(state, "x", BFloat16().read(state, "x", "linear") * longest, "linear", ONE)
        now = state["x"].item()
        assert abs(now) < before and now * start > 0
        before = abs(now)


def test_averages_too_long_for_bf16_are_refused():
    with pytest.raises(ValueError, match=r"momentum = 0.995 with bfloat16 state; accepted: at most 0.99"):
        Muon(momentum=0.995, state=BFloat16())
    with pytest.raises(ValueError, match=r"beta1 = 0.995, beta2 = 0.999 with bfloat16 state; accepted: at most 0.99"):
        AdamW(beta1=0.995, beta2=0.999, state=BFloat16())
    AdamW(beta1=0.99, beta2=0.9999, state=BFloat16())
