"""BAM Adapters (BTS, arXiv 2502.00075): everything frozen but the routers and a D x D linear after each expert.

``y_e -> A_e y_e`` on what attention expert or FFN expert e computes, before the gated sum. As ``A_e (W_e x + b_e)`` is
``(A_e W_e) x + A_e b_e``, the adapters are parametrizations (``torch.nn.utils.parametrize``) of the experts' last
weights and biases. So every kernel works unchanged, and a folder written during training holds the products: an
ordinary mixture. ``model_files`` saves the A_e themselves next to it, for a run that resumes.
Shapes: D model width, E experts, I inner width of an FFN, X the input width of an expert's last matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from branchmix.errors import RecipeError
from branchmix.models.attention_branchmix import BranchMixAttention, HeadOrder
from branchmix.models.documents_branchmix import BranchMixDocumentGate
from branchmix.models.experts_branchmix import BranchMixSparseMoeBlock
from branchmix.models.routing_branchmix import BranchMixRouter


def add(model: Any) -> None:
    """Put an adapter after each attention and FFN expert, and freeze everything else except the routers, in place.

    They start as the exact identity. They cost E * D * D * X multiplications per matrix and forward pass, independently
    of the number of tokens.

    Raises:
        RecipeError: the model has no experts, or they are spread over processes.
    """
    places = list(_places(model))
    if not places:
        name = f"the {model.config.model_type} model {model.config.name_or_path}".rstrip()
        raise RecipeError(f"adapters: {name} has no experts: give a mixture, or use lora")
    if any(isinstance(getattr(module, name), DTensor) for matrices in places for module, name, _ in matrices):
        raise RecipeError("adapters: do not work with experts that are spread over processes: remove expert_parallel")
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (BranchMixRouter, BranchMixDocumentGate)):
            module.requires_grad_(True)
    for matrices in places:
        adapter = ExpertAdapter(model.config.num_experts, model.config.hidden_size, like=getattr(*matrices[0][:2]))
        for module, name, order in matrices:
            parametrize.register_parametrization(module, name, _AfterExpert(adapter, order))


def fold(model: Any) -> None:
    """Multiply the adapters into the experts, which gives an ordinary mixture with the same function; unfreeze it."""
    for matrices in _places(model):
        for module, name, _ in matrices:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    model.requires_grad_(True)


class ExpertAdapter(nn.Module):
    """``A_e = 1 + delta_e`` for all experts of one attention or one FFN.

    Only the difference is stored: zero reproduces the weights bit for bit, bf16 rounds the difference and not the sum,
    and weight decay pulls towards the identity, not towards zero output.
    """

    def __init__(self, num_experts: int, width: int, *, like: torch.Tensor):
        super().__init__()
        self.delta = nn.Parameter(like.new_zeros(num_experts, width, width))

    def forward(self, matrix_EDX: torch.Tensor) -> torch.Tensor:
        """``A_e M_e`` for each expert's matrix."""
        return matrix_EDX + torch.bmm(self.delta, matrix_EDX)


class _AfterExpert(nn.Module):
    """An adapter as the parametrization of one tensor; weight and bias share one adapter.

    Args:
        adapter: of these experts.
        order: order of the columns of a wide ``o_proj`` [D, X of all experts]; None for stacks [E, D, X] and biases
            [E, D].
    """

    def __init__(self, adapter: ExpertAdapter, order: HeadOrder | None):
        super().__init__()
        self.adapter = adapter
        self.order = order

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.order is None:
            return self.adapter(tensor) if tensor.dim() == 3 else self.adapter(tensor.unsqueeze(-1)).squeeze(-1)
        # Columns are ordered (expert, head, C), or for Shared KV (kv head, expert, group, C).
        axis = 1 + self.order.expert_axis
        by_expert = tensor.unflatten(1, (*self.order.sizes, self.order.head_dim)).movedim(axis, 0)
        adapted = self.adapter(by_expert.flatten(2)).view(by_expert.shape)
        return adapted.movedim(0, axis).flatten(1)


def _places(model: nn.Module) -> Iterator[list[tuple[Any, str, HeadOrder | None]]]:
    """For each attention and each FFN with experts: the last matrix, then its bias if it has one."""
    for module in list(model.modules()):
        if isinstance(module, BranchMixAttention):
            weight: tuple[Any, str, HeadOrder | None] = (module.o_proj, "weight", module.order)
            yield [weight] if module.o_bias is None else [weight, (module, "o_bias", None)]
        elif isinstance(module, BranchMixSparseMoeBlock):
            weight = (module.experts, "down_proj", None)
            yield [weight, (module.experts, "down_proj_bias", None)] if module.experts.has_bias else [weight]
