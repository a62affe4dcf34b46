"""How training balances the load of a mixture's experts: over which tokens the balance loss counts it.

A trainer sets ``model.balance``; it is not saved. Saved with every checkpoint, so it imports only torch and its
neighbours.
Shapes: B sequences, T tokens of each, S = B * T, L layers, E experts, k experts chosen for a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

from .routing_branchmix import choices, router_losses, token_mask

Scope = Literal["micro_batch", "sequence", "global_batch", "last_batch"]


class Routed(NamedTuple):
    """What one router said in a forward pass."""

    logits_SE: torch.Tensor


class RouterLosses(NamedTuple):
    """Of a forward pass; the losses of the FFN routers are summed over layers and not weighted."""

    weighted: torch.Tensor | None
    """Balance losses and z-losses of all routers, weighted; None if no router has any."""
    balance: torch.Tensor | None
    z: torch.Tensor | None
    num_tokens: torch.Tensor | int
    """Tokens that are not padding."""


class BranchMixBalance:
    """The balance loss ``E * sum_i f_i P_i`` of each layer, with the load ``f_i`` counted over a scope.

    ``micro_batch``: over the tokens of a forward pass (BAM eq. 2). ``sequence``: over each sequence, then averaged.
    ``global_batch``: over all forward passes and processes of an optimizer step (arXiv 2501.11873), so that experts may
    specialise in a domain. ``last_batch``: over those of the optimizer step before, at no cost; the first step has no
    balance loss. ``P_i`` is the mean gate of the forward pass's own tokens; weighted by their number, these add up to
    the mean over the step.

    For ``global_batch``, a step of several forward passes has to count ahead: run them all inside ``counting`` first.
    A step of one forward pass in each process only adds up the counts of all processes. For ``last_batch``, call
    ``end_step`` after each step.

    Args:
        scope: one of the four.
        tokens_per_step: tokens of an optimizer step over all processes. Router losses are then weighted by a forward
            pass's share of these. None: by its share of the labels (``num_items_in_batch``).
    """

    def __init__(self, scope: Scope = "micro_batch", *, tokens_per_step: int | None = None):
        self.scope = scope
        self.tokens_per_step = tokens_per_step
        self.is_counting = False
        self._step: dict[str, torch.Tensor] = {}  # [L, E] choices by kind of router, of this process and step so far
        self._ahead: dict[str, torch.Tensor] = {}  # of all processes, in the whole step
        self._last: dict[str, torch.Tensor] = {}  # of all processes, in the step before

    # ---- In a forward pass ----

    def losses(
        self,
        config: Any,
        routed: dict[str, list[Routed]],
        attention_mask: torch.Tensor | None,
        *,
        num_sequences: int,
        in_step: bool,
    ) -> RouterLosses:
        """Losses of a forward pass. A top-k attention router has them too; soft routing balances itself (section 4.1).

        Args:
            config: of the mixture.
            routed: by kind of router, layer by layer.
            attention_mask: [B, T], 0 for padding.
            num_sequences: B.
            in_step: whether it is part of an optimizer step. Other passes balance their own tokens.
        """
        weighted = aux_loss = z_loss = None
        num_tokens: torch.Tensor | int = 0
        groups = num_sequences if self.scope == "sequence" else 1
        for kind, top_k in _routers(config):
            layers = routed[kind]
            if not layers or top_k is None:
                continue
            logits = [layer.logits_SE for layer in layers]
            mask_S = token_mask(attention_mask, logits[0])
            num_tokens = len(logits[0]) if mask_S is None else mask_S.sum()
            loads_LE = None
            if in_step and top_k < config.num_experts and self.scope in ("global_batch", "last_batch"):
                loads_LE = self._loads(kind, _count(layers, top_k, mask_S))
            balance, z = router_losses(logits, top_k, attention_mask, loads_LE=loads_LE, groups=groups)
            own = config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
            weighted = own if weighted is None else weighted + own.to(weighted.device)
            if kind == "ffn":
                aux_loss, z_loss = balance, z
        return RouterLosses(weighted, aux_loss, z_loss, num_tokens)

    def share(
        self, losses: RouterLosses, labels: torch.Tensor, shift_labels: torch.Tensor | None, num_items_in_batch: Any
    ) -> Any:
        """The share of a forward pass in its optimizer step: ``Trainer`` divides no term by the accumulation steps.

        Without ``tokens_per_step`` it counts what ``Trainer`` counts: labels that are predicted, so not each row's
        first.
        """
        if num_items_in_batch is None:
            return 1.0
        if self.tokens_per_step is not None:
            return losses.num_tokens / self.tokens_per_step
        predicted = labels[:, 1:] if shift_labels is None else shift_labels
        return (predicted != -100).sum() / num_items_in_batch

    def add_ahead(self, config: Any, routed: dict[str, list[Routed]], attention_mask: torch.Tensor | None) -> None:
        """Count a forward pass inside ``counting``."""
        for kind, top_k in _routers(config):
            if routed[kind] and top_k is not None and top_k < config.num_experts:
                mask_S = token_mask(attention_mask, routed[kind][0].logits_SE)
                _add(self._ahead, kind, _count(routed[kind], top_k, mask_S))

    def _loads(self, kind: str, counts_LE: torch.Tensor) -> torch.Tensor:
        """Load of each expert [L, E] over the scope, each layer summing to 1."""
        _add(self._step, kind, counts_LE)
        if self.scope == "last_batch":
            counts_LE = self._last.get(kind, torch.ones_like(counts_LE)).to(counts_LE.device)
        else:
            counts_LE = self._ahead[kind] if kind in self._ahead else _of_all_processes(counts_LE)
        return counts_LE / counts_LE.sum(-1, keepdim=True)

    # ---- Around a step ----

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Forward passes inside only count the load, for the training passes of this step. A collective call."""
        self._ahead = {}
        self.is_counting = True
        try:
            yield
        finally:
            self.is_counting = False
        self._ahead = {kind: _of_all_processes(counts_LE) for kind, counts_LE in self._ahead.items()}

    def end_step(self) -> None:
        """Forget the counts of a step, but for what the next one needs. A collective call after each step."""
        if self.scope == "last_batch":
            self._last = {kind: _of_all_processes(counts_LE) for kind, counts_LE in self._step.items()}
        self._step, self._ahead = {}, {}

    def state(self) -> dict[str, torch.Tensor]:
        """What a run that resumes after ``end_step`` needs."""
        return {kind: counts_LE.cpu() for kind, counts_LE in self._last.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore ``state``."""
        self._last = dict(state)


def _routers(config: Any) -> tuple[tuple[str, int | None], ...]:
    """Kinds of routers, and k of each; None for soft attention gates."""
    return ("ffn", config.num_experts_per_tok), ("attention", config.attention_num_experts_per_tok)


@torch.no_grad()
def _count(layers: list[Routed], top_k: int, mask_S: torch.Tensor | None) -> torch.Tensor:
    """How often each expert was chosen, [L, E], on the first layer's device."""
    counts = []
    for layer in layers:
        chosen_SE = choices(layer.logits_SE.float().softmax(-1), top_k)
        if mask_S is not None:
            chosen_SE = chosen_SE * mask_S.to(chosen_SE).unsqueeze(-1)
        counts.append(chosen_SE.sum(0).to(layers[0].logits_SE.device))
    return torch.stack(counts).round().long()


def _add(counts: dict[str, torch.Tensor], kind: str, more_LE: torch.Tensor) -> None:
    counts[kind] = counts[kind] + more_LE if kind in counts else more_LE


def _of_all_processes(counts_LE: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        counts_LE = counts_LE.clone()
        torch.distributed.all_reduce(counts_LE)
    return counts_LE
