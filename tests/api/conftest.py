"""State in 8 bits also of models as small as the tests', whose tensors `Int8Blockwise` keeps in float32 otherwise."""

from __future__ import annotations

import pytest

from cggr_ray.optim import state_formats


@pytest.fixture
def small_tensors_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_formats, "SMALLEST_TENSOR", 1)
