"""What a step costs in arithmetic, per token: the limit of a plan's speed-up, whatever the kernels.

    X = 2 L P   matrices of the layers, P = 2 d a + 2 d kv + 3 d f weights a layer
    A = 4 a sum_layers(mean keys seen)   attention          H = 2 d V   head
    full = 3 X + 3.5 A + 3 H   (FlashAttention's backward is 2.5 times its forward)
    own scores (`after`)     X + A + H + 2 r X + 2.5 r A + 2 r H
    known mask (`before`)    X + A - dead + 2 r X + 2.5 r A + 3 r H
    live constants add kappa (1 - r) X, kappa = 2 d kv / P
    the last k of L layers   X + A + 3 H + (k / L) (2 X + 2.5 A)

`dead` is what dropped positions would do in the last layer after their keys and values. Here r is the kept ratio, a the
width of all heads, kv that of all key-value heads. A probe's own products are left out: they are thousandths.
With `const` constants attention counts as with live ones, (r - r r) A too much: gradients of dropped keys and values
are never formed there, which would raise the limits of the default shapes by 0.3 to 1.7 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from cggr_ray.models.families import BlockShape


@dataclass(frozen=True)
class Costs:
    """FLOPs of a forward, per token."""

    layers: int
    matrices: float
    attention: float
    head: float
    kv_share: float

    @property
    def full(self) -> float:
        return 3 * self.matrices + 3.5 * self.attention + 3 * self.head

    def limit(self, ratio: float, own: bool, live: bool) -> float:
        """Speed-up over full training."""
        forward = self.matrices + self.attention
        kept = 2 * ratio * self.matrices + 2.5 * ratio * self.attention
        if own:
            cost = forward + self.head + kept + 2 * ratio * self.head
        else:
            cost = forward - self.dead(ratio) + kept + 3 * ratio * self.head
        return self.full / (cost + live * self.kv_share * (1 - ratio) * self.matrices)

    def suffix(self, share: float) -> float:
        """FLOPs of a step in which a share of the layers learns, over those of full training."""
        below = self.matrices + self.attention + 3 * self.head
        return (below + share * (2 * self.matrices + 2.5 * self.attention)) / self.full

    def dead(self, ratio: float) -> float:
        rest = (1 - ratio) * (1 - self.kv_share) * self.matrices
        return (rest + (1 - ratio) * self.attention) / self.layers


def costs_of(shapes: list[BlockShape], width: int, inner: int, vocabulary: int, positions: int) -> Costs:
    """Costs of a gated model on rows of one document of `positions`."""
    heads = shapes[0].heads * shapes[0].head_dim
    kv = shapes[0].kv_heads * shapes[0].head_dim
    weights = 2 * width * heads + 2 * width * kv + 3 * width * inner
    keys = sum(mean_keys(positions, shape.window) for shape in shapes)
    return Costs(
        layers=len(shapes),
        matrices=2.0 * len(shapes) * weights,
        attention=4.0 * heads * keys,
        head=2.0 * width * vocabulary,
        kv_share=2 * width * kv / weights,
    )


def mean_keys(positions: int, window: int | None) -> float:
    """Keys that a query sees in the mean, causal, within its window."""
    if window is None or window >= positions:
        return (positions + 1) / 2
    return window - window * (window - 1) / (2 * positions)
