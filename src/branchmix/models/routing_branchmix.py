"""The two routers of a BranchMix block. Saved with every checkpoint.

Shapes: B batch, T tokens, S = B * T, D model width, E experts, k experts chosen for a token.
"""

from __future__ import annotations

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
