"""Router losses of BAM (arXiv 2408.08274, eq. 2), computed for each layer and summed over layers.

transformers' ``load_balancing_loss_func`` pools all layers and so scores a total collapse in every layer, each onto
another expert, as perfect balance. Here each layer counts for itself, and padding never counts.
Shapes: S tokens (batch times length), E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def load_balancing_loss(logits_SE: torch.Tensor, top_k: int, mask_S: torch.Tensor | None = None) -> torch.Tensor:
    """``E * sum_i f_i P_i`` of one layer's router logits: 1 at perfect balance.

    ``f_i`` is the share of all top-k choices that fall on expert i, ``P_i`` its mean gate (Switch; BAM eq. 2). The
    mask has 1 for real tokens, 0 for padding.
    """
    gates_SE = logits_SE.float().softmax(-1)
    chosen_SE = torch.zeros_like(gates_SE).scatter_(1, gates_SE.topk(top_k, dim=-1).indices, 1.0)
    load_E = _mean(chosen_SE, mask_S) / top_k
    return logits_SE.shape[-1] * (load_E * _mean(gates_SE, mask_S)).sum()


def z_loss(logits_SE: torch.Tensor, mask_S: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens of ``logsumexp(logits)^2`` of one layer (ST-MoE; BAM eq. 2)."""
    return _mean(logits_SE.float().logsumexp(-1).square().unsqueeze(-1), mask_S).squeeze(0)


def router_losses(
    logits: Sequence[torch.Tensor], top_k: int, attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Load-balancing loss and z-loss of router logits [S, E], each summed over layers.

    With all experts chosen (soft routing) the balance is 0. The mask is [B, T] with 0 for padding; of one that is
    longer than the tokens (a cache), its last T count. The 4-D masks that ``generate`` makes for static caches say
    nothing about padding, and are ignored.
    """
    mask_S = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        num_tokens = logits[0].shape[0] // attention_mask.shape[0]
        mask_S = attention_mask[:, -num_tokens:].reshape(-1).to(logits[0].device)
    balance = torch.zeros((), device=logits[0].device)
    z = torch.zeros((), device=logits[0].device)
    for layer_SE in logits:
        if top_k < layer_SE.shape[-1]:
            balance = balance + load_balancing_loss(layer_SE, top_k, mask_S).to(balance.device)
        z = z + z_loss(layer_SE, mask_S).to(z.device)
    return balance, z


def _mean(values_SX: torch.Tensor, mask_S: torch.Tensor | None) -> torch.Tensor:
    if mask_S is None:
        return values_SX.mean(0)
    weights_S1 = mask_S.to(values_SX.dtype).unsqueeze(-1)
    return (values_SX * weights_S1).sum(0) / weights_S1.sum().clamp(min=1)
