"""The shared expert: one FFN that every token goes to, beside the routed experts. Saved with every checkpoint.

Shapes: D model width, I inner width of an FFN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .linear_branchmix import BranchMixLinear


class BranchMixSharedExpert(nn.Module):
    """An FFN under the names that Qwen2-MoE and others give it: ``mlp.shared_expert.gate_proj.weight`` and so on.

    As in a routed expert, the first matrix of a plain FFN is ``in_proj``.

    Args:
        hidden_size: D.
        inner: I.
        activation: the block's, whose weights it has if it has any.
        gated: whether there is a gate.
        bias: whether its projections have biases.
    """

    gate_proj: BranchMixLinear
    up_proj: BranchMixLinear
    in_proj: BranchMixLinear

    def __init__(
        self,
        hidden_size: int,
        inner: int,
        activation: Callable[[torch.Tensor], torch.Tensor],
        *,
        gated: bool,
        bias: bool,
    ):
        super().__init__()
        # In a tuple, and so not registered: its tensors, if it has any, are the block's.
        self._activation: tuple[Callable[[torch.Tensor], torch.Tensor]] = (activation,)
        self.gated = gated
        for name in ("gate_proj", "up_proj") if gated else ("in_proj",):
            setattr(self, name, BranchMixLinear(hidden_size, inner, bias=bias))
        self.down_proj = BranchMixLinear(inner, hidden_size, bias=bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D]."""
        (activation,) = self._activation
        if self.gated:
            return self.down_proj(activation(self.gate_proj(hidden)) * self.up_proj(hidden))
        return self.down_proj(activation(self.in_proj(hidden)))
