"""Experts of the trunk: every model's embeddings, norms and head, chosen by the document.

Document gates need only token ids, so they are known before the first layer, and not even the trunk has to be averaged.

Saved with every checkpoint, so it imports only torch and its neighbours.
Shapes: B batch, T tokens, S = B * T, D model width, E experts.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

from .documents_branchmix import document_logits, narrow_head


class BranchMixTrunkExperts(nn.ModuleList):
    """A module of a dense family, once for each expert. With one expert it is the dense module."""

    kind = "trunk"
    only: int | None = None
    """The expert that all tokens get, whatever the document says."""

    def __init__(self, module: nn.Module, num_experts: int):
        super().__init__([module, *(copy.deepcopy(module) for _ in range(num_experts - 1))])
        if num_experts == 1:
            self.only = 0

    def logits(self) -> torch.Tensor:
        """Log shares of the experts, [B, T, E]. Raises ValueError where there are none."""
        of_document = document_logits(self.kind)
        if of_document is None:
            raise ValueError(
                "the trunk of this mixture has experts, which document gates choose: call the whole mixture, with the "
                "gates that branchmix calibrate fits"
            )
        return of_document


class BranchMixTrunkMix(BranchMixTrunkExperts):
    """Embeddings, positions or a norm: the experts' outputs, mixed by the gates' shares."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Takes and returns what the family's module does."""
        if self.only is not None:
            return self[self.only](*args, **kwargs)
        shares_BTE = self.logits().softmax(-1)
        mixed: Any = 0
        for number, module in enumerate(self):
            part = module(*args, **kwargs)
            share = shares_BTE[..., number].to(part)
            mixed = mixed + (share.flatten() if part.dim() == 2 else share)[..., None] * part  # OPT flattens tokens
        return mixed

    @property
    def weight(self) -> torch.Tensor:
        """The first expert's, for those who want to know its size, dtype or device."""
        return self[0].weight  # type: ignore[return-value]

    @property
    def num_embeddings(self) -> int:
        """Rows of token embeddings."""
        return len(self.weight)


class BranchMixTrunkHead(BranchMixTrunkExperts):
    """The output layer, once for each expert: a token's logits are those of the expert with the largest share."""

    kind = "head"

    def see_only(self, rows_N: torch.Tensor, places_N: torch.Tensor) -> None:
        """Choose for these tokens only, [1, N], in the forward pass that runs."""
        if self.only is None:
            narrow_head(rows_N, places_N)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, vocabulary]."""
        if self.only is not None:
            return self[self.only](hidden_BTD)
        choice_BT = self.logits().argmax(-1).to(hidden_BTD.device)
        if torch.compiler.is_compiling():  # grouping depends on the values
            out = self[0](hidden_BTD)
            for number in range(1, len(self)):
                out = torch.where((choice_BT == number)[..., None], self[number](hidden_BTD), out)
            return out
        hidden_SD, choice_S = hidden_BTD.flatten(0, -2), choice_BT.flatten()
        logits: torch.Tensor | None = None
        for number, head in enumerate(self):
            tokens = (choice_S == number).nonzero().flatten()
            if len(tokens) == len(hidden_SD) and not self.training:
                return head(hidden_BTD)
            if len(tokens) or self.training:  # in training no expert is without a gradient, be it zero
                part = head(hidden_SD[tokens])
                logits = part.new_empty(len(hidden_SD), part.shape[-1]) if logits is None else logits
                logits[tokens] = part
        assert logits is not None, "a token has an expert"
        return logits.unflatten(0, hidden_BTD.shape[:-1])


def widen_trunk(family: Any, config: Any) -> None:
    """Give a family's model every expert's own trunk, in place: all modules with parameters outside attention and FFNs,
    but for norms whose gains were folded.

    Args:
        family: causal LM or base model.
        config: of the mixture.
    """
    layout = config.layout
    own = [layout[name] for name in ("attention", "ffn", "gate", "up", "down", "fused_gate_up", "activation")]
    names = "|".join(re.escape(name) for name in [*own, *(config.folded_norms or ())] if name)
    elsewhere = re.compile(rf"(?:.+\.)?{re.escape(layout['layers'].rpartition('.')[2])}\.\d+\.(?:{names})(?:\.|$)")
    head = family.get_output_embeddings()
    for name, module in list(family.named_modules()):
        if any(True for _ in module.parameters(recurse=False)) and not elsewhere.match(name):
            kind = BranchMixTrunkHead if module is head else BranchMixTrunkMix
            parent, _, child = name.rpartition(".")
            setattr(family.get_submodule(parent), child, kind(module, config.num_experts))
    if family._tied_weights_keys:
        family._tied_weights_keys = {
            _numbered(one, number): _numbered(other, number)
            for one, other in family._tied_weights_keys.items()
            for number in range(config.num_experts)
        }
        family.all_tied_weights_keys = family.get_expanded_tied_weights_keys()


def _numbered(name: str, number: int) -> str:
    """A tensor's name with its module's number among the experts."""
    module, _, tensor = name.rpartition(".")
    return f"{module}.{number}.{tensor}"
