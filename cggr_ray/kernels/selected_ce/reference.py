"""Weighted cross-entropy of kept rows from hidden states, in chunks: the definition, in plain PyTorch.

    total = sum_i w_i nll_i,   nll_i = lse(z_i) - z_i[y_i],   z_i = W h_i
    dtotal/dz_i = w_i (softmax(z_i) - e_{y_i})

Where there are several chunks, the gradients for hidden states and head are formed chunk by chunk in the forward; a
single chunk waits for the backward. At most one chunk of logits exists at a time.
Shapes: K kept rows, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chunk_loss(logits_KV: Tensor, labels_K: Tensor, weights_K: Tensor) -> tuple[Tensor, Tensor]:
    """(nll_K in float32, dtotal/dlogits in the dtype of the logits). Unlabelled rows get 0 in both."""
    labelled = labels_K >= 0
    target = labels_K.clamp_min(0).unsqueeze(-1)
    log_p = torch.log_softmax(logits_KV.float(), dim=-1)
    nll = torch.where(labelled, -log_p.gather(-1, target).squeeze(-1), 0.0)
    weight = torch.where(labelled, weights_K, 0.0).unsqueeze(-1)
    # dtotal/dlog_p, then the backward that autograd itself would call, so that the bits are those of plain PyTorch.
    down = torch.where(torch.arange(log_p.shape[-1], device=log_p.device) == target, -weight, 0.0)
    slope = torch.ops.aten._log_softmax_backward_data(down, log_p, -1, torch.float32)
    return nll, slope.to(logits_KV.dtype)


def chunk_nll(logits_KV: Tensor, labels_K: Tensor) -> Tensor:
    """nll_K in float32, 0 where unlabelled."""
    logits = logits_KV.float()
    picked = logits.gather(-1, labels_K.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels_K >= 0, logits.logsumexp(-1) - picked, 0.0)
