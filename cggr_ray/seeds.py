"""Which numbers are seeds, wherever one is given: in a race, its tuning, its data and tasks, a sweep, a loss.

Within these bounds torch's generators take them, a signed column of 64 bits holds them, and no two of them are one
stream of generated problems, which counts modulo 2^64.
"""

from __future__ import annotations

ACCEPTED = "from 0 to 2^63 - 1"


def is_seed(seed: int) -> bool:
    return 0 <= seed < 2**63


def check_seed(name: str, seed: int, of: str = "") -> None:
    """Raises ValueError where a number is no seed; `of`: whose it is, in words."""
    if not is_seed(seed):
        raise ValueError(f"{name} = {seed}{of and f' of {of}'}; accepted: {ACCEPTED}")
