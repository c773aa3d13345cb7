"""What the GPU tests use of others: oracles of plans and Muon, pairs of workers; and rows of documents made by hand."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cggr_ray.data.packing import RowOrder
    from cggr_ray.data.store import TokenStore

for folder in ("sparse", "workers", "optim"):
    where = str(Path(__file__).parents[1] / folder)
    if where not in sys.path:
        sys.path.append(where)


@pytest.fixture
def order(make_store: Callable[..., TokenStore]) -> RowOrder:
    """Rows of a hundred documents, of the shapes that `on_gpu` names."""
    from on_gpu import POSITIONS, VOCABULARY, WIDTH

    from cggr_ray.data.packing import RowOrder

    rng = random.Random(0)
    store = make_store([rng.randint(3, 60) for _ in range(100)], vocabulary=VOCABULARY)
    assert len(store.tokens) <= POSITIONS
    return RowOrder([store], (1.0,), (None,), WIDTH, True, 2)
