"""The two routers of a BranchMix block, and their losses (BAM, arXiv 2408.08274, eq. 2). Saved with every checkpoint.

transformers' ``load_balancing_loss_func`` pools all layers and so scores a total collapse in every layer, each onto
another expert, as perfect balance. Here each layer counts for itself, and padding never counts.
Shapes: B batch, T tokens, S = B * T, D model width, E experts, k experts chosen for a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class BranchMixRouter(nn.Module):
    """Linear router without bias; its logits and gates are fp32 whatever the model's dtype."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, normalize: bool):
        super().__init__()
        self.top_k = top_k
        self.normalize = normalize
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    document_logits: torch.Tensor | None = None
    """[B, T, E]: what the document so far adds, while its block runs (``documents_branchmix``)."""

    def route(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Softmax first, then top-k, raw unless ``normalize`` (BAM section 3.3).

        Args:
            hidden_states: [..., D].

        Returns:
            logits [..., E], chosen gates [..., k], chosen experts [..., k].
        """
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
            if self.document_logits is not None:
                logits = logits + self.document_logits.to(logits).view(logits.shape)
        gates, index = logits.softmax(-1).topk(self.top_k, dim=-1)
        if self.normalize:
            gates = gates / gates.sum(-1, keepdim=True)
        return logits, gates, index


class BranchMixFFNRouter(BranchMixRouter):
    """``mlp.gate``: which FFN experts a token goes to."""

    def forward(self, hidden_SD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.route(hidden_SD)


class BranchMixAttentionRouter(BranchMixRouter):
    """``self_attn.expert_gate``: one gate for each attention expert, soft unless top-k was asked for (section 4.1)."""

    def forward(self, hidden_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits [B, T, E] and gates [B, T, E], zero for experts that were not chosen."""
        logits_BTE, gates, index = self.route(hidden_BTD)
        return logits_BTE, torch.zeros_like(logits_BTE).scatter(-1, index, gates)


class BranchMixSharedRouter(BranchMixAttentionRouter):
    """An attention router that uses the weights of the block's FFN router (``shared_router``).

    In a parallel block both see the same input, and so have the same logits. The paper has two routers.
    """

    _is_hf_initialized = True  # together with the router whose weights these are

    def __init__(self, owner: BranchMixFFNRouter, top_k: int, normalize: bool):
        nn.Module.__init__(self)
        self.top_k = top_k
        self.normalize = normalize
        self._owner = (owner,)  # a tuple, so that the weights have one name

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return self._owner[0].weight


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
