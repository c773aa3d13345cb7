"""`bench memory` where its search can be followed without a GPU."""

from __future__ import annotations

import pytest
from small_models import small_model

from cggr_ray.benchmarks import memory
from cggr_ray.benchmarks.rows import Shape
from cggr_ray.models.adapter import Adapter


@pytest.mark.parametrize("full", [0, 3])
def test_a_shape_of_which_no_row_fits_is_named(full: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([(full, 2.0), (0, 0.0), (5, 2.0), (6, 2.0)])
    monkeypatch.setattr(memory, "most_rows", lambda *_: next(found))
    adapter, shape = Adapter(small_model("llama")), Shape("tiny", 4, 64)
    if full:
        assert [rows for rows, _ in memory.rows_that_fit(adapter, shape, 9).values()] == [3, 0, 5, 6]
        return
    with pytest.raises(ValueError, match=r"shape 'tiny/4x64': not one row.*; accepted: "):
        memory.rows_that_fit(adapter, shape, 9)
    assert len(list(found)) == 3
