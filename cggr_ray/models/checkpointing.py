"""What a layer keeps for its backward pass, and what it computes again.

none        all that autograd saves
block       the layer's input: the whole layer is computed again
selective   the input, and the outputs of matrix products and of attention: what is computed again is pointwise
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Checkpointing = Literal["none", "block", "selective"]

# Operations whose outputs are kept, by name, as not every one of them exists on every machine.
EXPENSIVE = frozenset(
    {
        "aten.mm.default",
        "aten.addmm.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "torch_attn._varlen_attn.default",
    }
)


def keep_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a forward and of its repetition, for `torch.utils.checkpoint`."""
    found: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
    found = create_selective_checkpoint_contexts(_policy)
    return found


def _policy(context: Any, operation: Any, *args: Any, **keywords: Any) -> CheckpointPolicy:
    kept = str(operation) in EXPENSIVE
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
