"""Trains a tokenizer on generated problems, in place of the shipped one: `make tokenizer`. The result is reproducible.

The one that is committed was trained on an earlier wording of the problems: what was prepared or trained with it does
not fit another.
"""

from __future__ import annotations

from cggr_ray.data.problems import problems
from cggr_ray.data.tokenizer import SHIPPED, SHIPPED_VOCABULARY, train_bpe

DOCUMENTS, SEED = 40_000, 1


def main() -> None:
    texts = (f"{p.question}\n{p.solution}" for p in problems(SEED, DOCUMENTS))
    train_bpe(texts, SHIPPED_VOCABULARY, SHIPPED)


if __name__ == "__main__":
    main()
