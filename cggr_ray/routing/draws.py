"""Random draws that depend on where they are made, and on nothing that came before them."""

from __future__ import annotations

import numpy as np


def seed_of(*words: int) -> int:
    """A seed of 63 bits from non-negative words: a seed of the run, what draws, the step, the micro-batch."""
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


# What draws, so that two parts of one recipe draw apart.
ROWS, TOKENS, OBJECTIVE, UPDATES = 0, 1, 2, 3
