"""The two routers of a BranchMix block, and their losses (BAM, arXiv 2408.08274, eq. 2). Saved with every checkpoint.

transformers' ``load_balancing_loss_func`` pools all layers and so scores a total collapse in every layer, each onto
another expert, as perfect balance. Here each layer counts for itself, and padding never counts.
Shapes: B batch, T tokens, S = B * T, D model width, E experts, k experts chosen for a token, C width of a domain's
embedding, I inner width of a projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from .documents_branchmix import document_logits


class BranchMixRouterDomains(nn.Module):
    """``router_domains``: an embedding of each expert's domain, which all routers read. Not trained.

    They are differences from ``centre``, of unit mean square. ``centre`` is for experts that join, and not used here.
    """

    embeddings: torch.Tensor
    centre: torch.Tensor

    def __init__(self, num_experts: int, width: int):
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(num_experts, width))
        self.register_buffer("centre", torch.zeros(width))


class _Float32Linear(nn.Linear):
    """Computes in fp32 whatever the dtype of its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.weight.device), self.weight.float())


class BranchMixRouterRows(nn.Module):
    """A router's rows as a learned projection of the domains' embeddings: ``W_2 SwiGLU(W_1 c)`` (Nexus, arXiv
    2408.15901, section 2), with W_1 as ``gate_proj`` and ``up_proj``."""

    domains: tuple[BranchMixRouterDomains]
    """The mixture's, once it is built: in a tuple, so that its tensors have one name."""

    def __init__(self, width: int, inner: int, hidden_size: int):
        super().__init__()
        # Called, and never read by their weights: offloading and LoRA act on calls.
        self.gate_proj = _Float32Linear(width, inner, bias=False)
        self.up_proj = _Float32Linear(width, inner, bias=False)
        self.down_proj = _Float32Linear(inner, hidden_size, bias=False)

    def forward(self) -> torch.Tensor:
        """[E, D], fp32."""
        domains_EC = self.domains[0].embeddings.float()
        return self.down_proj(F.silu(self.gate_proj(domains_EC)) * self.up_proj(domains_EC))


class BranchMixRouter(nn.Module):
    """Linear router without bias; its logits and gates are fp32 whatever the model's dtype.

    Its rows are ``weight`` [E, D], or with ``domain_router`` (of the config) what ``router_rows`` computes. How logits
    become gates is its ``score`` (see ``scores``).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        normalize: bool,
        domain_router: dict[str, Any] | None = None,
        score: str = "softmax",
    ):
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.normalize = normalize
        self.score = score
        own = None if domain_router else nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_parameter("weight", own)
        if domain_router:
            self.router_rows = BranchMixRouterRows(domain_router["width"], domain_router["inner"], hidden_size)
        self.register_buffer("expert_bias", None)

    weight: nn.Parameter
    """[E, D]; None where ``router_rows`` computes the rows."""
    expert_bias: torch.Tensor | None
    """[E], fp32: added to the gates when experts are chosen, and never to the gates themselves (arXiv 2408.15664)."""
    kind: ClassVar[str]
    """``attention`` or ``ffn``."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def rows(self) -> torch.Tensor:
        """[E, D], fp32.

        Raises:
            ValueError: they are offloaded, and another module's than the one that runs.
        """
        if self.weight is None:
            return self.router_rows()
        if self.weight.is_meta:
            raise ValueError("a mixture with shared_router cannot be offloaded: load it without device_map")
        return self.weight.float()

    def route(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores first, then top-k, raw unless ``normalize`` (BAM section 3.3). A bias changes the choice only.

        Args:
            hidden_states: [..., D].

        Returns:
            logits [..., E], chosen gates [..., k], chosen experts [..., k].
        """
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.rows())
            if (of_document := document_logits(self.kind)) is not None:
                logits = logits + of_document.to(logits).view(logits.shape)
        gates = scores(logits, self.score)
        index = chosen(gates, self.top_k, self.expert_bias)
        gates = gates.gather(-1, index)
        if self.normalize:
            gates = gates / gates.sum(-1, keepdim=True)
        return logits, gates, index

    def add_bias(self) -> None:
        """Choose by a bias from now on, which starts at zero; unless there is one, or all experts are chosen."""
        if self.expert_bias is None and self.top_k < self.num_experts:
            self.expert_bias = torch.zeros(self.num_experts, dtype=torch.float32, device=self.device)


class BranchMixFFNRouter(BranchMixRouter):
    """``mlp.gate``: which FFN experts a token goes to."""

    kind = "ffn"

    def forward(self, hidden_SD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.route(hidden_SD)


class BranchMixAttentionRouter(BranchMixRouter):
    """``self_attn.expert_gate``: one gate for each attention expert, soft unless top-k was asked for (section 4.1)."""

    kind = "attention"

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
        self.num_experts = owner.num_experts
        self.top_k = top_k
        self.normalize = normalize
        self.score = owner.score
        self.register_buffer("expert_bias", None)  # of its own, since k and so the load may differ
        self._owner = (owner,)  # a tuple, so that the weights have one name

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return self._owner[0].weight

    @property
    def device(self) -> torch.device:
        return self._owner[0].device

    def rows(self) -> torch.Tensor:
        return self._owner[0].rows()


def scores(logits: torch.Tensor, score: str = "softmax") -> torch.Tensor:
    """Gates of all experts [..., E] from a router's logits.

    ``softmax``: they sum to 1. ``sigmoid``: each expert's own, as in DeepSeek-V3 (arXiv 2412.19437, eq. 15).
    """
    return logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)


def shares(logits: torch.Tensor, score: str = "softmax") -> torch.Tensor:
    """Gates of all experts divided by their sum, [..., E]."""
    gates = scores(logits, score)
    return gates / gates.sum(-1, keepdim=True).clamp(min=1e-20) if score == "sigmoid" else gates


def chosen(gates: torch.Tensor, top_k: int, bias_E: torch.Tensor | None = None) -> torch.Tensor:
    """The k experts that a token goes to, [..., k], by gates [..., E] of all experts and the router's bias."""
    biased = gates if bias_E is None else gates + bias_E.float()
    return biased.topk(top_k, dim=-1).indices


def choices(gates_SE: torch.Tensor, top_k: int, bias_E: torch.Tensor | None = None) -> torch.Tensor:
    """1 for the k experts that a token goes to, 0 for the others: [S, E]."""
    return torch.zeros_like(gates_SE).scatter_(1, chosen(gates_SE, top_k, bias_E), 1.0)


def load_balancing_loss(
    logits_SE: torch.Tensor,
    top_k: int,
    mask_S: torch.Tensor | None = None,
    *,
    bias_E: torch.Tensor | None = None,
    load_E: torch.Tensor | None = None,
    target_E: torch.Tensor | None = None,
    groups: int = 1,
    score: str = "softmax",
) -> torch.Tensor:
    """``sum_i f_i P_i / t_i`` of one layer's router logits: 1 at perfect balance.

    ``f_i`` is the share of all top-k choices that fall on expert i, ``P_i`` its mean gate (of sigmoid gates its mean
    share of a token's gates: DeepSeek-V3, arXiv 2412.19437, eq. 19), and ``t_i`` the share that it should get: 1 / E in
    Switch and in BAM eq. 2. Where the load follows the gates, the least value is at ``P = t``.

    Args:
        logits_SE: of the tokens.
        top_k: experts chosen for a token.
        mask_S: 1 for real tokens, 0 for padding.
        bias_E: of the router.
        load_E: ``f_i`` if it is counted over other tokens than these.
        target_E: ``t_i``, summing to 1; 1 / E if not given.
        groups: G stretches of S / G tokens, such as sequences: the loss of each is computed, and their mean by the
            number of tokens is returned.
        score: of the router.
    """
    gates_SE = scores(logits_SE.float(), score)
    mask_S = gates_SE.new_ones(len(gates_SE)) if mask_S is None else mask_S.to(gates_SE.dtype)
    weights_GS1 = mask_S.view(groups, -1, 1)
    tokens_G1 = weights_GS1.sum(1)

    def mean(values_SE: torch.Tensor) -> torch.Tensor:
        return (values_SE.unflatten(0, (groups, -1)) * weights_GS1).sum(1) / tokens_G1.clamp(min=1)

    load_GE = mean(choices(gates_SE, top_k, bias_E)) / top_k if load_E is None else load_E
    if target_E is None:
        target_E = gates_SE.new_full(gates_SE.shape[1:], 1 / gates_SE.shape[1])
    loss_G = (load_GE * mean(shares(logits_SE.float(), score)) / target_E.to(load_GE)).sum(-1)
    return (loss_G * tokens_G1[:, 0]).sum() / tokens_G1.sum().clamp(min=1)


def z_loss(logits_SE: torch.Tensor, mask_S: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens of ``logsumexp(logits)^2`` of one layer (ST-MoE; BAM eq. 2), whatever the gates are made by."""
    values_S = logits_SE.float().logsumexp(-1).square()
    if mask_S is None:
        return values_S.mean()
    weights_S = mask_S.to(values_S.dtype)
    return (values_S * weights_S).sum() / weights_S.sum().clamp(min=1)


def router_losses(
    logits: Sequence[torch.Tensor],
    top_k: int,
    attention_mask: torch.Tensor | None = None,
    *,
    biases: Sequence[torch.Tensor | None] | None = None,
    loads_LE: torch.Tensor | None = None,
    target_E: torch.Tensor | None = None,
    groups: int = 1,
    score: str = "softmax",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Load-balancing loss and z-loss of router logits [S, E], each summed over layers.

    With all experts chosen (soft routing) the balance is 0. The mask is as for ``token_mask``; ``biases`` and
    ``loads_LE``, with one for each layer, ``target_E``, ``groups`` and ``score`` are as for
    ``load_balancing_loss``.
    """
    mask_S = token_mask(attention_mask, logits[0])
    balance = torch.zeros((), device=logits[0].device)
    z = torch.zeros((), device=logits[0].device)
    for layer, layer_SE in enumerate(logits):
        own_S = None if mask_S is None else mask_S.to(layer_SE.device)
        if top_k < layer_SE.shape[-1]:
            load_E = None if loads_LE is None else loads_LE[layer].to(layer_SE.device)
            bias_E = None if biases is None else biases[layer]
            own = load_balancing_loss(
                layer_SE, top_k, own_S, bias_E=bias_E, load_E=load_E, target_E=target_E, groups=groups, score=score
            )
            balance = balance + own.to(balance.device)
        z = z + z_loss(layer_SE, own_S).to(z.device)
    return balance, z


def token_mask(attention_mask: torch.Tensor | None, logits_SE: torch.Tensor) -> torch.Tensor | None:
    """[S], 0 for padding; None if all tokens are real.

    The mask is [B, T]; of one that is longer than the tokens (a cache), its last T count. The 4-D masks of packing and
    of ``generate`` with static caches say nothing about padding, and are ignored.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    num_tokens = logits_SE.shape[0] // attention_mask.shape[0]
    return attention_mask[:, -num_tokens:].reshape(-1).to(logits_SE.device)
