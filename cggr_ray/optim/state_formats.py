"""How an optimizer keeps a moving average between steps: in float32, in bf16, or in 8 bits and a bf16 scale a block.

Codes of 8 bits:

    linear      x = q s / 127,             q in [-127, 127]: equal steps, for momentum that is orthogonalised
    geometric   x = sign(c) s 2^((|c| - 127) / 8), 0 for c = 0: equal ratios over 16 octaves, for what is divided
    squares     x = s 2^((c - 255) / 12),  0 for c = 0: the same for what is never negative, over 21 octaves; a value
                that is not 0 never becomes 0, as one divides by its root

with s the largest magnitude of the block in bf16, to the nearest: a scale that is rounded up every step makes a noisy
average grow. A block lies within one row (the last dimension): a row that steps do not touch decays as a whole, codes
unchanged. Linear codes keep the polar factor of a momentum better than non-uniform ones (arXiv:2509.23106 finds both
good enough; block size and bf16 scales are ours). Moments of Adam want ratios: with equal steps a small first moment
cannot decay, while the second moment under it does.

An average moves by a part of itself a step, and what moves by less than half a code stands still. Hence `LONGEST`; a
block's largest value itself may lag by half a step of bf16 over 1 - beta, 4 % at .95, and so may every value in bf16.
Differs from bitsandbytes and torchao: closed formulas, no table; bf16 scales; blocks of at most 128 values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

Codes = Literal["linear", "geometric", "squares"]
State = dict[str, Tensor]

# Rows without a divisor between these are kept in float32, and so are tensors of fewer values in all.
LARGEST_BLOCK, SMALLEST_BLOCK, SMALLEST_TENSOR = 128, 32, 4096
# Highest code, and codes an octave.
GEOMETRIC, SQUARES = (127, 8), (255, 12)
# The longest average, as its beta, of which a value without gradients still decays: half a step between geometric codes
# is a factor of 2^(-1/16) = .957, between those of squares 2^(-1/24) = .971. Equal steps hold values that are small in
# their block whatever the beta; that of momentum is bounded so that most still move.
LONGEST: dict[Codes, float] = {"linear": 0.98, "geometric": 0.95, "squares": 0.97}
# The same of bf16, whose half steps are up to 1/256 of a value: with 1 - 1/256 a part of them would not decay.
LONGEST_BFLOAT16 = 0.99


class StateFormat(Protocol):
    """How averages are kept. `name` is the average's own within the state of its rule."""

    NAME: ClassVar[str]

    def longest(self, codes: Codes) -> float:
        """The longest average, as its beta, that does not stand still."""
        ...

    def zeros(self, name: str, like: Tensor, codes: Codes) -> State: ...
    def read(self, state: State, name: str, codes: Codes) -> Tensor: ...
    def write(self, state: State, name: str, value: Tensor, codes: Codes, keep: Tensor) -> None: ...


@dataclass(frozen=True)
class Float32:
    """Four bytes a value."""

    IS_PART: ClassVar[bool] = True
    KIND: ClassVar[str] = "float32"
    NAME: ClassVar[str] = "float32"

    def longest(self, codes: Codes) -> float:
        return 1.0

    def zeros(self, name: str, like: Tensor, codes: Codes) -> State:
        """The state of an average of zeros in the shape of `like`."""
        return {name: torch.zeros_like(like, dtype=torch.float32)}

    def read(self, state: State, name: str, codes: Codes) -> Tensor:
        """The average, float32; the stored tensor itself."""
        return state[name]

    def write(self, state: State, name: str, value: Tensor, codes: Codes, keep: Tensor) -> None:
        """Stores `value` where `keep` (0-d, or one a matrix) is 1; where it is 0 no bit changes."""
        state[name].copy_(torch.where(keep > 0, value, state[name]))


@dataclass(frozen=True)
class BFloat16:
    """Two bytes a value, rounded to the nearest; averages of squares, which are long, in float32."""

    IS_PART: ClassVar[bool] = True
    KIND: ClassVar[str] = "bfloat16"
    NAME: ClassVar[str] = "bfloat16"

    def longest(self, codes: Codes) -> float:
        return 1.0 if codes == "squares" else LONGEST_BFLOAT16

    def zeros(self, name: str, like: Tensor, codes: Codes) -> State:
        """As `Float32.zeros`."""
        return {name: torch.zeros_like(like, dtype=torch.float32 if codes == "squares" else torch.bfloat16)}

    def read(self, state: State, name: str, codes: Codes) -> Tensor:
        """The average, float32."""
        return state[name].float()

    def write(self, state: State, name: str, value: Tensor, codes: Codes, keep: Tensor) -> None:
        """As `Float32.write`."""
        Float32().write(state, name, value, codes, keep)


@dataclass(frozen=True)
class Int8Blockwise:
    """One byte a value and two a block of up to 128: 1.016 bytes a value."""

    IS_PART: ClassVar[bool] = True
    KIND: ClassVar[str] = "int8_blockwise"
    NAME: ClassVar[str] = "8-bit"

    def longest(self, codes: Codes) -> float:
        return LONGEST[codes]

    def zeros(self, name: str, like: Tensor, codes: Codes) -> State:
        """As `Float32.zeros`; small tensors, and rows that do not divide into blocks, are kept in float32."""
        block = block_of(like.shape[-1]) if like.ndim > 1 else None
        if block is None or like[0].numel() < SMALLEST_TENSOR:
            return Float32().zeros(name, like, codes)
        shape = (*like.shape[:-1], like.shape[-1] // block)
        return {
            f"{name}.codes": torch.zeros_like(like, dtype=dtype_of(codes)),
            f"{name}.scales": torch.zeros(shape, dtype=torch.bfloat16, device=like.device),
        }

    def read(self, state: State, name: str, codes: Codes) -> Tensor:
        """The average, float32."""
        if name in state:
            return Float32().read(state, name, codes)
        return decode(state[f"{name}.codes"], state[f"{name}.scales"], codes)

    def write(self, state: State, name: str, value: Tensor, codes: Codes, keep: Tensor) -> None:
        """As `Float32.write`, rounded to the nearest code."""
        if name in state:
            Float32().write(state, name, value, codes, keep)
            return
        packed = (state[f"{name}.codes"], state[f"{name}.scales"])
        for old, new in zip(packed, encode(value, packed[1].shape[-1], codes), strict=True):
            old.copy_(torch.where(keep > 0, new, old))


def average_of(state: State, name: str, which: slice = slice(None)) -> State:
    """What a rule's state holds of one average, of some matrices of the stack: views, empty where there is none."""
    return {key: value[which] for key, value in state.items() if key.split(".")[0] == name}


def turn_rows(
    kept: StateFormat, state: State, name: str, codes: Codes, which: slice, turn_nRR: Tensor, keep_n11: Tensor
) -> None:
    """x[i] <- turn_i x[i] for some matrices i of a stacked average (N, R, K), where `keep_n11` is 1."""
    some = average_of(state, name, which)
    kept.write(some, name, turn_nRR @ kept.read(some, name, codes), codes, keep_n11)


def block_of(columns: int) -> int | None:
    """The largest divisor of a row that a block may have, or None."""
    sizes = range(min(LARGEST_BLOCK, columns), SMALLEST_BLOCK - 1, -1)
    return next((size for size in sizes if columns % size == 0), None)


def encode(value: Tensor, blocks: int, codes: Codes) -> tuple[Tensor, Tensor]:
    """(codes in the shape of `value`, bf16 scales with `blocks` a row). A block of zeros has scale 0."""
    wide = value.unflatten(-1, (blocks, -1))
    scale = to_bf16(wide.abs().amax(-1, keepdim=True))
    unit = torch.where(scale > 0, wide / scale, 0.0)
    if codes == "linear":
        # Where the scale is rounded down, the largest would be past the last code.
        packed = (unit * 127).round().clamp(-127, 127)
    elif codes == "geometric":
        packed = _levels(unit, *GEOMETRIC).clamp_min(0) * unit.sign()
    else:
        packed = torch.where(wide > 0, _levels(unit, *SQUARES).clamp_min(1), 0.0)
    return packed.to(dtype_of(codes)).flatten(-2), scale.squeeze(-1).bfloat16()


def decode(packed: Tensor, scales: Tensor, codes: Codes) -> Tensor:
    """The values, float32."""
    wide = packed.unflatten(-1, (scales.shape[-1], -1)).float()
    scale = scales.float().unsqueeze(-1)
    if codes == "linear":
        return (wide * (scale / 127)).flatten(-2)
    top, octave = GEOMETRIC if codes == "geometric" else SQUARES
    size = torch.exp2((wide.abs() - top) / octave) * scale
    return torch.where(wide == 0, 0.0, size * wide.sign()).flatten(-2)


def to_bf16(positive: Tensor) -> Tensor:
    """Rounded to the nearest bf16 (ties to even), in float32. By bits: a compiler takes a cast there and back away."""
    bits = positive.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


def dtype_of(codes: Codes) -> torch.dtype:
    return torch.uint8 if codes == "squares" else torch.int8


def _levels(unit: Tensor, top: int, octave: int) -> Tensor:
    """Codes of magnitudes up to 1 and a rounding, not above `top`; of 0 it is -inf."""
    return (unit.abs().log2() * octave + top).round().clamp_max(top)
