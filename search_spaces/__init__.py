"""Search spaces: one function a recipe family, from dotted recipe keys to domains."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from search_spaces.baseline import baseline
from search_spaces.cggr import cggr
from search_spaces.domains import Domains
from search_spaces.e3 import e3
from search_spaces.suffix import suffix


class Space(NamedTuple):
    """The recipe that a space varies, and the function that gives its domains."""

    recipe: str
    domains: Callable[[], Domains]


SPACES: dict[str, Space] = {
    "baseline": Space("baseline", baseline),
    "cggr": Space("cggr_loss", cggr),
    "e3": Space("e3/full", e3),
    "suffix": Space("dynamic_suffix", suffix),
}
