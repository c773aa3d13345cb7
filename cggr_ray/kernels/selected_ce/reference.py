"""Weighted cross-entropy of kept rows from hidden states, in chunks: the definition, in plain PyTorch.

    total = sum_i w_i nll_i,   nll_i = lse(z_i) - z_i[y_i],   z_i = W h_i
    dtotal/dz_i = w_i (softmax(z_i) - e_{y_i})

With several targets j a row, smoothing e and entropy bonus b (of the first target; H the entropy of p = softmax(z)):

    total = sum_i [ sum_j w_ij nll_ij + w_i0 (e (mean_v(-log p_iv) - nll_i0) - b H_i) ]
    dtotal/dlog p_iv = -sum_j w'_ij [v = y_ij] - w_i0 e / V + w_i0 b p_iv log p_iv,   w'_i0 = (1 - e) w_i0

up to multiples of p_i, which the softmax takes to 0.

Where there are several chunks, the gradients for hidden states and head are formed chunk by chunk in the forward; a
single chunk waits for the backward. At most one chunk of logits exists at a time.
Shapes: K kept rows, J targets of each, D width, V vocabulary.
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


def chunk_losses(
    logits_KV: Tensor, labels_KJ: Tensor, weights_KJ: Tensor, smoothing: float = 0.0, bonus: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(nll_KJ in float32, dtotal/dlogits in the dtype of the logits, what total has beyond the weighted NLL, by row).

    Unlabelled targets count for nothing; the two terms beyond the NLL are those of rows whose first target counts.
    """
    labelled = labels_KJ >= 0
    targets = labels_KJ.clamp_min(0)
    log_p = torch.log_softmax(logits_KV.float(), dim=-1)
    nll = torch.where(labelled, -log_p.gather(-1, targets), 0.0)
    weights = torch.where(labelled, weights_KJ, 0.0)
    places = torch.arange(log_p.shape[-1], device=log_p.device)
    down, beyond = torch.zeros_like(log_p), torch.zeros_like(nll[:, 0])
    first = weights[:, 0]
    for j, weight in enumerate(weights.unbind(-1)):
        kept = weight * (1 - smoothing) if j == 0 else weight
        down = torch.where(places == targets[:, j, None], down - kept[:, None], down)
    if smoothing:
        down = down - (first * (smoothing / log_p.shape[-1])).unsqueeze(-1)
        beyond = beyond + first * smoothing * (-log_p.mean(-1) - nll[:, 0])
    if bonus:
        p_log_p = log_p.exp() * log_p
        down = down + (first * bonus).unsqueeze(-1) * p_log_p
        beyond = beyond + first * bonus * p_log_p.sum(-1)
    slope = torch.ops.aten._log_softmax_backward_data(down, log_p, -1, torch.float32)
    return nll, slope.to(logits_KV.dtype), beyond


def chunk_nll(logits_KV: Tensor, labels_K: Tensor) -> Tensor:
    """nll_K in float32, 0 where unlabelled."""
    logits = logits_KV.float()
    picked = logits.gather(-1, labels_K.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels_K >= 0, logits.logsumexp(-1) - picked, 0.0)
