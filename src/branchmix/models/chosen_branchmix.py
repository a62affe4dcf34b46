"""Projections of the chosen experts only: rows sorted by expert, one matrix product for each expert.

Top-k routing of attention needs, of each token, the queries and the outputs of k experts' heads. ``project`` and
``combine`` compute these from the wide matrices as they are stored: views, no copies of weights, forward and backward.

Saved with every checkpoint, so it imports only torch.
Shapes: B batch, T tokens, S = B * T, k experts chosen for a token, P = S * k pairs of a token and a slot, E experts;
weights [J, E, O, I]: an expert's matrix [J * O, I] is in J pieces (``HeadOrder.pieces``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class Chosen:
    """The experts that each token chose, and all pairs of a token and a slot in the order of their experts.

    Args:
        index_BTk: numbers of the experts.
        num_experts: E.
    """

    def __init__(self, index_BTk: torch.Tensor, num_experts: int):
        self.index_BTk = index_BTk
        self.num_experts = num_experts
        pairs_P = index_BTk.flatten()
        self.experts_P, self.order_P = pairs_P.sort(stable=True)
        """Expert and number of each pair, sorted by expert and then by number."""
        self.ranks_P = self.order_P.argsort() if len(pairs_P) > 1 else self.order_P
        """Where each pair is in that order."""
        self.tokens_P = self.order_P // self.top_k if self.top_k > 1 else self.order_P
        self.counts: list[int] = torch.bincount(pairs_P, minlength=num_experts).tolist()
        """Pairs of each expert."""

    @property
    def top_k(self) -> int:
        return self.index_BTk.shape[-1]

    def groups(self) -> Iterator[tuple[int, slice]]:
        """Experts that were chosen, and their pairs in the sorted order."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count

    def of_chosen(self, values_BEX: torch.Tensor) -> torch.Tensor:
        """Values [B, E, T, ...] of each expert as those of the chosen experts, [B, k, T, ...]."""
        index_BkT = self.index_BTk.transpose(1, 2)
        return torch.take_along_dim(values_BEX, index_BkT[(...,) + (None,) * (values_BEX.dim() - 3)], 1)

    def sorted(self, rows: torch.Tensor) -> torch.Tensor:
        """[P, ...], a row for each pair, in the order of experts."""
        return _Permuted.apply(rows, self.order_P, self.ranks_P)

    def unsorted(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of ``sorted``."""
        return _Permuted.apply(rows, self.ranks_P, self.order_P)


class _Permuted(torch.autograd.Function):
    """``rows[order]``, whose backward takes rows too: that of indexing would add them up."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def project(
    x_SI: torch.Tensor, weight_JEOI: torch.Tensor, bias_JEO: torch.Tensor | None, chosen: Chosen
) -> torch.Tensor:
    """Each token times the matrices of its experts: ``y[s, slot, j] = W[j, e(s, slot)] x[s]``, [S, k, J, O]."""
    x_SI, weight_JEOI, bias_JEO = in_autocast_dtype(x_SI, weight_JEOI, bias_JEO)
    return _Project.apply(x_SI, weight_JEOI, bias_JEO, chosen)


def combine(y_SkJO: torch.Tensor, weight_JEOI: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    """The transpose of ``project``: ``x[s] = sum over slots and j of W[j, e(s, slot)]^T y[s, slot, j]``, [S, I]."""
    y_SkJO, weight_JEOI = in_autocast_dtype(y_SkJO, weight_JEOI)
    return _Combine.apply(y_SkJO, weight_JEOI, chosen)


def in_autocast_dtype(*tensors: Any) -> Any:
    """Operands as autocast casts them for a product."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_SI: torch.Tensor, weight_JEOI: torch.Tensor, bias_JEO: torch.Tensor | None, chosen: Chosen
    ) -> torch.Tensor:
        ctx.save_for_backward(x_SI, weight_JEOI)
        ctx.chosen = chosen
        y_PJO = _project(x_SI.index_select(0, chosen.tokens_P), weight_JEOI, chosen)
        if bias_JEO is not None:
            for expert, rows in chosen.groups():
                y_PJO[rows] += bias_JEO[:, expert]
        return y_PJO.index_select(0, chosen.ranks_P).unflatten(0, (-1, chosen.top_k))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SkJO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x_SI, weight_JEOI), chosen = ctx.saved_tensors, ctx.chosen
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_PJO = grad_SkJO.flatten(0, 1).index_select(0, chosen.order_P)
        d_x = d_weight = d_bias = None
        if wants_x:
            d_x = _combine(grad_PJO, weight_JEOI, chosen)
        if wants_weight:
            d_weight = _outer(grad_PJO, x_SI.index_select(0, chosen.tokens_P), weight_JEOI, chosen)
        if wants_bias:
            d_bias = grad_PJO.new_zeros(weight_JEOI.shape[:3])
            for expert, rows in chosen.groups():
                d_bias[:, expert] = grad_PJO[rows].sum(0)
        return d_x, d_weight, d_bias, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SkJO: torch.Tensor, weight_JEOI: torch.Tensor, chosen: Chosen) -> torch.Tensor:
        ctx.save_for_backward(y_SkJO, weight_JEOI)
        ctx.chosen = chosen
        return _combine(y_SkJO.flatten(0, 1).index_select(0, chosen.order_P), weight_JEOI, chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SI: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (y_SkJO, weight_JEOI), chosen = ctx.saved_tensors, ctx.chosen
        grad_PI = grad_SI.index_select(0, chosen.tokens_P)
        d_y = d_weight = None
        if ctx.needs_input_grad[0]:
            d_y = _project(grad_PI, weight_JEOI, chosen).index_select(0, chosen.ranks_P).view(y_SkJO.shape)
        if ctx.needs_input_grad[1]:
            y_PJO = y_SkJO.flatten(0, 1).index_select(0, chosen.order_P)
            d_weight = _outer(y_PJO, grad_PI, weight_JEOI, chosen)
        return d_y, d_weight, None


def _project(x_PI: torch.Tensor, weight_JEOI: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    """Sorted rows [P, I] to [P, J, O]."""
    num_pieces, _, outer, _ = weight_JEOI.shape
    y_PJO = x_PI.new_empty(len(x_PI), num_pieces, outer)
    for expert, rows in chosen.groups():
        for piece in range(num_pieces):
            torch.mm(x_PI[rows], weight_JEOI[piece, expert].T, out=y_PJO[rows, piece])
    return y_PJO


def _combine(y_PJO: torch.Tensor, weight_JEOI: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    """Sorted rows [P, J, O] to sums over the slots of a token, [S, I]."""
    num_pieces, _, _, inner = weight_JEOI.shape
    # Sums over pieces and slots at least in fp32: 16 bits would lose a bit with each.
    wide = torch.promote_types(y_PJO.dtype, torch.float32) if num_pieces * chosen.top_k > 1 else y_PJO.dtype
    x_PI = y_PJO.new_empty(len(y_PJO), inner, dtype=wide)
    for expert, rows in chosen.groups():
        out = x_PI[rows]
        for piece in range(num_pieces):
            y, weight = y_PJO[rows, piece], weight_JEOI[piece, expert]
            if y.dtype != wide:
                out.copy_(torch.mm(y, weight)) if piece == 0 else out.add_(torch.mm(y, weight))
            elif piece == 0:
                torch.mm(y, weight, out=out)
            else:
                torch.addmm(out, y, weight, out=out)
    x_SkI = x_PI.index_select(0, chosen.ranks_P).unflatten(0, (-1, chosen.top_k))
    return (x_SkI.squeeze(1) if chosen.top_k == 1 else x_SkI.sum(1)).to(y_PJO.dtype)


def _outer(y_PJO: torch.Tensor, x_PI: torch.Tensor, weight_JEOI: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    """``sum over an expert's rows of y x^T``: gradients of the weights, laid out as these are."""
    d_weight_JEOI = torch.empty_like(weight_JEOI)
    for expert, count in enumerate(chosen.counts):
        if not count:
            d_weight_JEOI[:, expert] = 0
    for expert, rows in chosen.groups():
        for piece in range(len(weight_JEOI)):
            torch.mm(y_PJO[rows, piece].T, x_PI[rows], out=d_weight_JEOI[piece, expert])
    return d_weight_JEOI
