"""How training balances the load of a mixture's experts: the scope of the balance loss, and biases of the choice.

A trainer sets ``model.balance``; it is not saved. Saved with every checkpoint, so it imports only torch and its
neighbours.
Shapes: B sequences, T tokens of each, S = B * T, L layers, E experts, k experts chosen for a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

from .routing_branchmix import BranchMixRouter, choices, router_losses, scores, token_mask

Scope = Literal["micro_batch", "sequence", "global_batch", "last_batch"]
Bias = Literal["sign", "quantile"]
HALVINGS = 40
"""Steps of a search for a quantile of numbers between about -2 and 2: exact to fp32."""


class Routed(NamedTuple):
    """What one router said in a forward pass."""

    logits_SE: torch.Tensor
    router: BranchMixRouter


class RouterLosses(NamedTuple):
    """Losses of a forward pass; those of the FFN routers are summed over layers and not weighted."""

    weighted: torch.Tensor | None
    """Balance losses and z-losses of all routers, weighted; None if no router has any."""
    balance: torch.Tensor | None
    z: torch.Tensor | None
    num_tokens: torch.Tensor | int
    """Tokens that are not padding."""


class BranchMixBalance:
    """The balance loss ``sum_i f_i P_i / t_i`` of each layer, with the load ``f_i`` counted over a scope; and biases.

    ``micro_batch``: over the tokens of a forward pass (BAM eq. 2). ``sequence``: over each sequence, then averaged.
    ``global_batch``: over all forward passes and processes of an optimizer step (arXiv 2501.11873), so that experts may
    specialise in a domain. ``last_batch``: over those of the optimizer step before, at no cost; the first step has no
    balance loss. ``P_i`` is the mean gate of the forward pass's own tokens; weighted by their number, these add up to
    the mean over the step.

    For ``global_batch``, a step of several forward passes has to count ahead: run them all inside ``counting`` first.
    A step of one forward pass in each process only adds up the counts of all processes. For ``last_batch`` and for
    biases, call ``end_step`` after each step.

    A ``bias`` balances without a loss: top-k routers choose by gate plus bias (``BranchMixRouter.add_bias``), and each
    step moves the biases by the choices of all its tokens. ``sign``: by ``bias_rate``, up for experts with less than
    their share and down for the others (arXiv 2408.15664). ``quantile``: to where the step's tokens would have given
    each expert its share (kexue.fm 11619): with ``s`` the gates and ``beta`` the negative bias, ``alpha_t`` is token
    t's (k+1)-th largest ``s_te - beta_e``, and the new ``beta_e`` is the ``(S k t_e + 1)``-th largest
    ``s_te - alpha_t``. It holds the gates of all the process's tokens until the step ends, in fp32.

    Args:
        scope: one of the four.
        target: the share ``t_e`` of the load that each expert should get, summing to 1, at most 1 / k; None: equal.
        loss_coef: weight of the balance loss; None: the config's ``router_aux_loss_coef``.
        bias: how biases are moved; None: not at all.
        bias_rate: by how much, for ``sign``.
        tokens_per_step: tokens of an optimizer step over all processes. Router losses are then weighted by a forward
            pass's share of these. None: by its share of the labels (``num_items_in_batch``).
    """

    def __init__(
        self,
        scope: Scope = "micro_batch",
        *,
        target: Sequence[float] | None = None,
        loss_coef: float | None = None,
        bias: Bias | None = None,
        bias_rate: float = 1e-3,
        tokens_per_step: int | None = None,
    ):
        self.scope = scope
        self.target = None if target is None else torch.tensor(target)
        self.loss_coef = loss_coef
        self.bias = bias
        self.bias_rate = bias_rate
        self.tokens_per_step = tokens_per_step
        self.is_counting = False
        self._step: dict[str, torch.Tensor] = {}  # [L, E] choices by kind of router, of this process and step so far
        self._ahead: dict[str, torch.Tensor] = {}  # of all processes, in the whole step
        self._last: dict[str, torch.Tensor] = {}  # of all processes, in the step before
        self._gates: dict[str, list[torch.Tensor]] = {}  # [L, S, E] of each forward pass of the step, for quantiles
        self._routers: dict[str, list[BranchMixRouter]] = {}  # layer by layer

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
            if in_step and top_k < config.num_experts:
                loads_LE = self._observe(kind, layers, top_k, mask_S)
            biases = [layer.router.expert_bias for layer in layers]
            balance, z = router_losses(
                logits,
                top_k,
                attention_mask,
                biases=biases,
                loads_LE=loads_LE,
                target_E=self.target,
                groups=groups,
                score=layers[0].router.score,
            )
            coef = config.router_aux_loss_coef if self.loss_coef is None else self.loss_coef
            own = coef * balance + config.router_z_loss_coef * z
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

    def _observe(self, kind: str, layers: list[Routed], top_k: int, mask_S: torch.Tensor | None) -> torch.Tensor | None:
        """Remember what ``end_step`` needs. Returns the load of each expert [L, E] over the scope, each layer summing
        to 1, or None if it is that of these tokens."""
        across = self.scope in ("global_batch", "last_batch")
        if not across and self.bias is None:
            return None
        counts_LE = _count(layers, top_k, mask_S)
        _add(self._step, kind, counts_LE)
        self._routers[kind] = [layer.router for layer in layers]
        if self.bias == "quantile":
            self._gates.setdefault(kind, []).append(_gates(layers, mask_S))
        if not across:
            return None
        if self.scope == "last_batch":
            counts_LE = self._last.get(kind, self._shares(counts_LE)).to(counts_LE.device)
        else:
            counts_LE = self._ahead[kind] if kind in self._ahead else _of_all_processes(counts_LE)
        return counts_LE / counts_LE.sum(-1, keepdim=True).clamp(min=1)

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

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the biases by what the step's tokens chose, and forget it. A collective call after each step."""
        counts = {kind: _of_all_processes(counts_LE) for kind, counts_LE in self._step.items()}
        if self.scope == "last_batch":
            self._last = counts
        for kind, counts_LE in counts.items() if self.bias else ():
            for layer, bias_E in enumerate(self._moved(kind, counts_LE)):
                router = self._routers[kind][layer]
                assert router.expert_bias is not None, "add_bias comes before training"
                router.expert_bias.copy_(bias_E)
        self._step, self._ahead, self._gates = {}, {}, {}

    def _moved(self, kind: str, counts_LE: torch.Tensor) -> torch.Tensor:
        """The biases of all routers of a kind after a step, [L, E]."""
        routers, target_LE = self._routers[kind], self._shares(counts_LE)
        bias_LE = torch.stack([router.expert_bias.to(counts_LE.device) for router in routers])  # type: ignore[union-attr]
        if self.bias == "sign":
            load_LE = counts_LE / counts_LE.sum(-1, keepdim=True).clamp(min=1)
            return bias_LE + self.bias_rate * (target_LE - load_LE).sign()
        gates_LSE = torch.cat(self._gates[kind], dim=1)
        alpha_LS1 = (gates_LSE + bias_LE[:, None]).topk(routers[0].top_k + 1, dim=-1).values[..., -1:]
        most_LE = (counts_LE.sum(-1, keepdim=True) * target_LE + 1e-3).floor()  # 30 / 3 is 10, however it is rounded
        return -_thresholds(gates_LSE - alpha_LS1, most_LE)

    def _shares(self, counts_LE: torch.Tensor) -> torch.Tensor:
        """The share of the load that each expert should get, in every layer."""
        if self.target is None:
            return torch.full_like(counts_LE, 1 / counts_LE.shape[1], dtype=torch.float32)
        return self.target.to(counts_LE.device).expand(counts_LE.shape)

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
        chosen_SE = choices(scores(layer.logits_SE.float(), layer.router.score), top_k, layer.router.expert_bias)
        if mask_S is not None:
            chosen_SE = chosen_SE * mask_S.to(chosen_SE).unsqueeze(-1)
        counts.append(chosen_SE.sum(0).to(layers[0].logits_SE.device))
    return torch.stack(counts).round().long()


def _add(counts: dict[str, torch.Tensor], kind: str, more_LE: torch.Tensor) -> None:
    counts[kind] = counts[kind] + more_LE if kind in counts else more_LE


@torch.no_grad()
def _gates(layers: list[Routed], mask_S: torch.Tensor | None) -> torch.Tensor:
    """Gates of all experts, [L, S, E], without padding, on the first layer's device."""
    gates = [scores(layer.logits_SE.float(), layer.router.score) for layer in layers]
    gates_LSE = torch.stack([gates_SE.to(layers[0].logits_SE.device) for gates_SE in gates])
    return gates_LSE if mask_S is None else gates_LSE[:, mask_S.bool()]


def _thresholds(values_LSE: torch.Tensor, most_LE: torch.Tensor) -> torch.Tensor:
    """The smallest number that at most ``most`` of an expert's values exceed, [L, E], over the values of all processes.

    That is its (most + 1)-th largest value, found by halving an interval: processes exchange counts, not values.
    """
    high_LE = _of_all_processes(values_LSE.amax(1), "MAX")
    low_LE = -_of_all_processes((-values_LSE).amax(1), "MAX") - 1  # which all values exceed
    for _ in range(HALVINGS):
        middle_LE = (low_LE + high_LE) / 2
        enough_LE = _of_all_processes((values_LSE > middle_LE[:, None]).sum(1)) <= most_LE
        high_LE, low_LE = torch.where(enough_LE, middle_LE, high_LE), torch.where(enough_LE, low_LE, middle_LE)
    return high_LE


def _of_all_processes(values: torch.Tensor, how: str = "SUM") -> torch.Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        values = values.clone()
        torch.distributed.all_reduce(values, getattr(torch.distributed.ReduceOp, how))
    return values
