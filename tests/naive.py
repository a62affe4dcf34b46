"""The mixture as the paper's equations say it, with the family's own dense modules in a loop: slow, plain, independent.

Shares no code with the widened model: every expert is a dense transformers module of its own, and the sum over experts
is written out (BAM sections 3.3 and 4.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class NaiveAttention(nn.Module):
    """``sum_i g_i(x) Attn_i(x)``."""

    def __init__(self, experts: list[nn.Module], router: torch.Tensor, top_k: int | None):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = nn.Parameter(router.clone())
        self.top_k = top_k

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        gates = torch.softmax(hidden_states @ self.router.T, dim=-1)
        if self.top_k is not None:
            kept = gates.topk(self.top_k, dim=-1).indices
            gates = gates * torch.zeros_like(gates).scatter(-1, kept, 1.0)
        outputs = [expert(hidden_states, *args, **kwargs)[0] for expert in self.experts]
        return sum(gates[..., i : i + 1] * output for i, output in enumerate(outputs)), None


class NaiveFFN(nn.Module):
    """``sum over the top k of p_i(x) FFN_i(x)``."""

    def __init__(self, experts: list[nn.Module], router: torch.Tensor, config: Any):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = nn.Parameter(router.clone())
        self.top_k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.scaling, self.is_sigmoid = config.routed_scaling_factor, config.scoring_func == "sigmoid"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = hidden_states @ self.router.T
        gates = 1 / (1 + torch.exp(-logits)) if self.is_sigmoid else torch.softmax(logits, dim=-1)
        mask = torch.zeros_like(gates).scatter(-1, gates.topk(self.top_k, dim=-1).indices, 1.0)
        gates = gates * mask
        if self.normalize:
            gates = gates / gates.sum(-1, keepdim=True)
        outputs = [expert(hidden_states) for expert in self.experts]
        return self.scaling * sum(gates[..., i : i + 1] * output for i, output in enumerate(outputs))


class _Inlined(nn.Module):
    """OPT's FFN, which stands in the block itself."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.fc1, self.act, self.fc2 = block.fc1, block.activation_fn, block.fc2

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


def build_naive(mixture: nn.Module, dense_on_trunk: list[nn.Module]) -> nn.Module:
    """A naive mixture with the weights of ``mixture``.

    Args:
        mixture: a BranchMixForCausalLM; its routers are taken.
        dense_on_trunk: dense causal LMs in the experts' order, which share the mixture's trunk (and, for Shared KV,
            its keys and values). The first becomes the frame.
    """
    config, layout = mixture.config, mixture.config.layout
    frame = dense_on_trunk[0]
    wide_blocks = mixture.model.get_submodule(layout["layers"])
    all_blocks = [list(model.get_submodule(layout["layers"])) for model in dense_on_trunk]
    for layer, wide in enumerate(wide_blocks):
        blocks = [blocks[layer] for blocks in all_blocks]
        if config.has_attention_experts:
            gate = getattr(wide, layout["attention"]).expert_gate.weight.detach()
            experts = [getattr(block, layout["attention"]) for block in blocks]
            naive = NaiveAttention(experts, gate, config.attention_num_experts_per_tok)
            setattr(blocks[0], layout["attention"], naive)
        if config.has_ffn_experts:
            inlined = layout["ffn"] == layout["up"]
            ffns = [_Inlined(block) if inlined else getattr(block, layout["ffn"]) for block in blocks]
            router = getattr(wide, layout["ffn"]).gate.weight.detach()
            setattr(blocks[0], layout["ffn"], NaiveFFN(ffns, router, config))
            if inlined:
                blocks[0].activation_fn = nn.Identity()
                blocks[0].fc2 = nn.Identity()
    return frame


@torch.no_grad()
def token_by_token(model: Any, tokens: list[int], max_length: int, stride: int) -> list[float]:
    """Log-probability of every token but the first, each from a forward pass of its own."""
    found = []
    for target in range(1, len(tokens)):
        end = min(max_length, len(tokens) - 1)  # inputs of the window that predicts it end here
        while end < target:
            end = min(end + stride, len(tokens) - 1)
        context = torch.tensor([tokens[max(0, end - max_length) : target]])
        found.append(float(model(context).logits[0, -1].double().log_softmax(-1)[tokens[target]]))
    return found
