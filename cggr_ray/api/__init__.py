"""For other people's training loops: selective losses and models around an ordinary causal LM.

    CGGRLoss                  the loss of the hardest positions, from logits or from hidden states
    CGGRScorer                how hard each position is
    CGGRModel                 a causal LM whose backward pass runs on the hardest positions alone
    create_truncated_router   decides which, by the model's own first layers
    CGGRWrapper               the easier a position, the fewer layers learn from it
    MatrixOptimizer           Muon or GaLore for hidden matrices, AdamW for the rest, state in float32 or 8 bits

Schedules count steps here, as such loops do; `step()` is to be called once an optimizer step. Losses and entropies are
in nats. Upstream, where names, defaults and formulas come from, is github.com/MinimaML/CGGR, on PyPI as `cggr`.
"""

from cggr_ray.api.loss import CGGRLoss, CGGRScorer
from cggr_ray.api.model import CGGRModel
from cggr_ray.api.optimizer import MatrixOptimizer
from cggr_ray.api.router import TruncatedModel, create_truncated_router
from cggr_ray.api.wrapper import CGGRWrapper

__all__ = [
    "CGGRLoss",
    "CGGRModel",
    "CGGRScorer",
    "CGGRWrapper",
    "MatrixOptimizer",
    "TruncatedModel",
    "create_truncated_router",
]
