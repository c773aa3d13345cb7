"""Order statistics of rows by stable sort: the definition, in plain PyTorch.

    order:   groups ascending, then keys descending (NaN as -inf, -0 as +0), then the lower index
    rank_t = number of positions before t in that order
    class_t = number of given ranks r_j with rank_t >= r_j

So with one rank k, class 0 is the top k; with several ascending ones, class j holds the ranks from r_{j-1} to r_j - 1.
Shapes: B rows, T positions, J ranks, K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rank(keys_BT: Tensor, groups_BT: Tensor | None = None) -> Tensor:
    """Rank of every position in its row, int64."""
    keys = torch.where(keys_BT.isnan(), -torch.inf, keys_BT + 0.0)
    order = keys.sort(dim=1, descending=True, stable=True).indices
    if groups_BT is not None:
        order = order.gather(1, groups_BT.gather(1, order).sort(dim=1, stable=True).indices)
    places = torch.arange(keys.shape[1], device=keys.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def rank_classes(keys_BT: Tensor, ranks_BJ: Tensor, groups_BT: Tensor | None, num_groups: int) -> Tensor:
    """The class of every position, int32."""
    reached = rank(keys_BT, groups_BT).unsqueeze(2) >= ranks_BJ.unsqueeze(1)
    return reached.sum(dim=2, dtype=torch.int32)


def compact(mask_BT: Tensor, slots: int, fill: int) -> Tensor:
    """Positions of the first `slots` true entries of each row, ascending, int64; slots left over hold `fill`."""
    rows, width = mask_BT.shape
    positions = torch.where(mask_BT, torch.arange(width, device=mask_BT.device), width).sort(dim=1).values[:, :slots]
    index_BK = torch.full((rows, slots), fill, device=mask_BT.device)
    index_BK[:, :width] = torch.where(positions < width, positions, fill)
    return index_BK
