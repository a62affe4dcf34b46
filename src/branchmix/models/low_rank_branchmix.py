"""Experts as small changes of the seed: its matrices once, and each expert's change of them as two factors.

``y_i = W x + B_i A_i x``. What all experts have in common is computed once for a token, however many experts it goes
to: ``W x`` of queries, keys, values and an FFN's first matrices, and ``W sum_i x_i`` of output and down projections.

Saved with every checkpoint, so it imports only torch, transformers and its neighbours.
Shapes: B batch, T tokens, S = B * T, E experts, k experts chosen for a token, P = S * k pairs of a token and a slot,
I inputs and O outputs of a matrix, R the sum of its experts' ranks, D model width, J pieces of an expert's heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .chosen_branchmix import Chosen
from .linear_branchmix import linear


class BranchMixLowRank(nn.Module):
    """A matrix [O, I] of every expert: the seed's ``weight``, and the factors of each expert's change of it.

    The factors lie below each other, expert by expert: ``low_rank_A`` [R, I] is A of LoRA (arXiv 2106.09685), and
    ``low_rank_B`` [R, O] the transpose of its B, scaled. An expert of rank 0 has the seed's matrix. Biases [E * O] are
    the experts' own.
    """

    def __init__(self, inputs: int, outputs: int, ranks: Sequence[int], bias: bool = False):
        super().__init__()
        self.ranks = list(ranks)
        total = sum(self.ranks)
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.low_rank_A = nn.Parameter(torch.empty(total, inputs)) if total else None
        self.low_rank_B = nn.Parameter(torch.empty(total, outputs)) if total else None
        self.bias = nn.Parameter(torch.empty(len(self.ranks) * outputs)) if bias else None

    @property
    def biases(self) -> torch.Tensor:
        """[E, O]."""
        assert self.bias is not None
        return self.bias.view(len(self.ranks), -1)

    def of_one(self, x: torch.Tensor) -> torch.Tensor:
        """The only expert's output, [..., I] to [..., O]: as few and as small steps as there can be."""
        y = linear(x, self.weight, self.bias)
        if self.low_rank_A is None or self.low_rank_B is None:
            return y
        return y + linear(x, self.low_rank_A) @ self.low_rank_B

    def of_all(self, x: torch.Tensor) -> torch.Tensor:
        """Every expert's output, [..., I] to [..., E, O]."""
        base = linear(x, self.weight).unsqueeze(-2)
        if self.low_rank_A is None or self.low_rank_B is None:
            y = base.expand(*base.shape[:-2], len(self.ranks), -1)
        else:
            lows = linear(x, self.low_rank_A).split(self.ranks, -1)
            changes = [low @ B for low, B in zip(lows, self.low_rank_B.split(self.ranks), strict=True)]
            y = base + torch.stack(changes, -2)
        return y if self.bias is None else y + self.biases

    def of_chosen(self, x_SI: torch.Tensor, index_Sk: torch.Tensor, chosen: Chosen | None) -> torch.Tensor:
        """The outputs of each token's chosen experts, [S, k, O]."""
        y_S1O = linear(x_SI, self.weight).unsqueeze(1)
        change_SkO = self._change(x_SI, index_Sk, chosen)
        y_SkO = y_S1O.expand(-1, index_Sk.shape[1], -1) if change_SkO is None else y_S1O + change_SkO
        return y_SkO if self.bias is None else y_SkO + self.biases[index_Sk]

    def sum_of_all(self, x_SEI: torch.Tensor) -> torch.Tensor:
        """The sum of every expert's output for an input of its own, without biases, [S, O]."""
        y_SO = linear(x_SEI.sum(1), self.weight)
        if self.low_rank_A is None or self.low_rank_B is None:
            return y_SO
        lows = [x_SI @ A.T for x_SI, A in zip(x_SEI.unbind(1), self.low_rank_A.split(self.ranks), strict=True)]
        return y_SO + torch.cat(lows, -1) @ self.low_rank_B

    def sum_of_chosen(self, x_SkI: torch.Tensor, index_Sk: torch.Tensor, chosen: Chosen | None) -> torch.Tensor:
        """The sum of the chosen experts' outputs for an input of their own, without biases, [S, O]."""
        y_SO, change_SkO = linear(x_SkI.sum(1), self.weight), self._change(x_SkI, index_Sk, chosen)
        return y_SO if change_SkO is None else y_SO + change_SkO.sum(1)

    def _change(self, x: torch.Tensor, index_Sk: torch.Tensor, chosen: Chosen | None) -> torch.Tensor | None:
        """``B_e A_e x`` for every token and slot, [S, k, O]; None if no expert differs from the seed.

        Args:
            x: [S, I], or [S, k, I] if each slot has an input of its own.
            index_Sk: the experts.
            chosen: the same, sorted. None where shapes have to be static: then all experts' A are computed, and what
                was not chosen is masked before B.
        """
        if self.low_rank_A is None or self.low_rank_B is None:
            return None
        if chosen is None:
            experts_R = torch.tensor([e for e, rank in enumerate(self.ranks) for _ in range(rank)], device=x.device)
            low = linear(x, self.low_rank_A)
            low_SkR = low.unsqueeze(1) if x.dim() == 2 else low
            return (low_SkR * (index_Sk.unsqueeze(-1) == experts_R)) @ self.low_rank_B
        x_PI = x.index_select(0, chosen.tokens_P) if x.dim() == 2 else chosen.sorted(x.flatten(0, 1))
        pairs = zip(
            x_PI.split(chosen.counts),
            self.low_rank_A.split(self.ranks),
            self.low_rank_B.split(self.ranks),
            strict=True,
        )
        change_PO = torch.cat([x_nI @ A.T @ B for x_nI, A, B in pairs])
        return chosen.unsorted(change_PO).unflatten(0, index_Sk.shape)


class BranchMixLowRankHeads(BranchMixLowRank):
    """Queries, keys or values of all experts' heads; of the chosen experts' only, while ``chosen`` is given.

    Args:
        order: of the heads (``HeadOrder``).
    """

    chosen: Chosen | None = None

    def __init__(self, inputs: int, order: Any, ranks: Sequence[int], bias: bool):
        super().__init__(inputs, order.num_heads * order.head_dim, ranks, bias)
        self.order = order

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, E * O], or [B, T, k * O] ordered (piece, slot, channel)."""
        num_pieces = self.order.pieces[0]
        if len(self.ranks) == 1:
            return self.of_one(x_BTD)
        if self.chosen is None:
            y_BTEO = self.of_all(x_BTD)
        else:
            index_Sk = self.chosen.index_BTk.flatten(0, -2)
            y_BTEO = self.of_chosen(x_BTD.flatten(0, -2), index_Sk, self.chosen).unflatten(0, x_BTD.shape[:-1])
        y_BTEJO = y_BTEO.unflatten(-1, (num_pieces, -1))
        return y_BTEJO.transpose(-3, -2).flatten(-3)


class BranchMixLowRankOutputs(BranchMixLowRank):
    """Output projections of all experts' heads, summed; of the chosen experts' only, if ``chosen`` is given.

    Args:
        order: of the heads (``HeadOrder``).
    """

    def __init__(self, outputs: int, order: Any, ranks: Sequence[int]):
        super().__init__(order.num_heads * order.head_dim, outputs, ranks)
        self.order = order

    def forward(self, x: torch.Tensor, chosen: Chosen | None = None) -> torch.Tensor:
        """[..., E * I] to [..., D]; or [S, k, J, I / J] to [S, D]."""
        if len(self.ranks) == 1:
            return self.of_one(x)
        if chosen is not None:
            return self.sum_of_chosen(x.flatten(2), chosen.index_BTk.flatten(0, -2), chosen)
        x_SJEI = x.flatten(0, -2).unflatten(-1, self.order.pieces)
        return self.sum_of_all(x_SJEI.transpose(1, 2).flatten(2)).unflatten(0, x.shape[:-1])


class BranchMixLowRankUp(BranchMixLowRank):
    """A first matrix of the FFN experts."""

    def forward(
        self, x: torch.Tensor, index_Sk: torch.Tensor | None = None, chosen: Chosen | None = None
    ) -> torch.Tensor:
        """[S, D] to the chosen experts' outputs [S, k, I]; without ``index_Sk`` to the only expert's."""
        return self.of_one(x) if index_Sk is None else self.of_chosen(x, index_Sk, chosen)


class BranchMixLowRankDown(BranchMixLowRank):
    """The down projections of the FFN experts, gated and summed."""

    def forward(
        self,
        x: torch.Tensor,
        index_Sk: torch.Tensor | None = None,
        chosen: Chosen | None = None,
        gates_Sk: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[S, k, I] to [S, D]; without ``index_Sk`` and ``gates_Sk`` the only expert's output for x."""
        if index_Sk is None or gates_Sk is None:
            return self.of_one(x)
        gates_Sk1 = gates_Sk.unsqueeze(-1)
        out_SD = self.sum_of_chosen((x * gates_Sk1).to(x.dtype), index_Sk, chosen)
        return out_SD if self.bias is None else out_SD + (self.biases[index_Sk] * gates_Sk1).sum(1).to(out_SD.dtype)


class BranchMixLowRankExperts(nn.Module):
    """All FFN experts of a layer: the seed's matrices, and each expert's changes of them."""

    def __init__(
        self,
        width: int,
        inner: int,
        activation: nn.Module,
        ranks: dict[str, list[int]],
        *,
        gated: bool,
        bias: bool,
    ):
        super().__init__()
        self.num_experts = len(ranks["down"])
        if any(True for _ in activation.parameters()):
            self.__dict__["act_fn"] = activation  # not registered: its tensors are the block's
        else:
            self.act_fn = activation
        self.gate = BranchMixLowRankUp(width, inner, ranks["gate"], bias) if gated else None
        self.up = BranchMixLowRankUp(width, inner, ranks["up"], bias)
        self.down = BranchMixLowRankDown(inner, width, ranks["down"], bias)

    def forward(self, hidden_SD: torch.Tensor, index_Sk: torch.Tensor, gates_Sk: torch.Tensor) -> torch.Tensor:
        """The gated sum of the chosen experts' outputs, [S, D]."""
        chosen = None if torch.compiler.is_compiling() else Chosen(index_Sk, self.num_experts)
        return self.down(self._inner(hidden_SD, index_Sk, chosen), index_Sk, chosen, gates_Sk)

    def of_one(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output of the only expert, [..., D] to [..., D]."""
        return self.down(self._inner(hidden))

    def _inner(self, *inputs: Any) -> torch.Tensor:
        up = self.up(*inputs)
        return self.act_fn(up) if self.gate is None else self.act_fn(self.gate(*inputs)) * up


__all__ = ["BranchMixLowRank", "BranchMixLowRankExperts", "BranchMixLowRankHeads", "BranchMixLowRankOutputs"]
