"""Gates on the gradient of any stack of layers, hung as hooks in a forward and opened before its backward.

    output of layer l     a position passes where its cut lies below l, else `leak_rate` of its gradient does
    input of layer 0      the same with l = 0; gates at every layer only

Shapes: B rows of T positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from cggr_ray.sparse.depth import Gates


class Hung(Gates):
    """The gates of one forward."""

    def __init__(self, leak_rate: float) -> None:
        super().__init__(leak_rate)
        self._shapes: set[tuple[int, ...]] = set()

    def hang(self, hidden_BTD: Tensor, layer: int) -> None:
        self._shapes.add(tuple(hidden_BTD.shape[:-1]))
        super().hang(hidden_BTD, layer)

    def check(self, logits: Tensor) -> None:
        """Raises ValueError where layers and logits do not agree on rows and positions."""
        if self._shapes != {tuple(logits.shape[:2])}:
            raise ValueError(
                f"layers on {sorted(self._shapes)}, logits {tuple(logits.shape)}; accepted: (B, T) for both"
            )

    def open_by(self, bucket_BT: Tensor, num_layers: int, num_buckets: int) -> None:
        """The cuts of `routing.depth`, without a table that would have to be copied to the device."""
        keep_BT = (num_layers * (num_buckets - bucket_BT)).div(num_buckets, rounding_mode="floor")
        self.cut_BT = num_layers - keep_BT - 1


class GatedLayers:
    """Hooks on a stack of layers, inside `hung` alone. `only`: the layers with a gate; None is all of them."""

    def __init__(self, layers: Sequence[nn.Module], leak_rate: float, only: set[int] | None) -> None:
        self.num_layers, self._leak_rate = len(layers), leak_rate
        self._first = layers[0] if only is None else None
        self._gated = {i: layer for i, layer in enumerate(layers) if only is None or i in only}

    @contextmanager
    def hung(self) -> Iterator[Hung]:
        """Gates for the forward inside."""
        hung = Hung(self._leak_rate)

        def before(module: nn.Module, args: Any, keywords: Any) -> None:
            hung.hang(args[0] if args else keywords["hidden_states"], 0)

        def after(module: nn.Module, args: Any, out: Any, index: int) -> None:
            hung.hang(out if isinstance(out, Tensor) else out[0], index)

        with ExitStack() as handles:
            if self._first is not None:
                handles.callback(self._first.register_forward_pre_hook(before, with_kwargs=True).remove)
            for i, layer in self._gated.items():
                handles.callback(layer.register_forward_hook(partial(after, index=i)).remove)
            yield hung


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The one stack of layers: a ModuleList as long as the configuration says, or of one kind of module without one.

    Raises:
        ValueError: there is none, or several.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and _is_stack(module, count):
            found[name] = module
    if len(found) != 1:
        names = ", ".join(sorted(found)) or "none"
        raise ValueError(f"stacks of layers in {type(model).__name__}: {names}; accepted: one, or layers=...")
    return list(next(iter(found.values())))


def _is_stack(modules: nn.ModuleList, count: int | None) -> bool:
    return len(modules) == count if count is not None else len(modules) > 1 and len({type(m) for m in modules}) == 1
