"""Finds the routers of any mixture, branchmix's or transformers' own, and interprets their outputs.

Model classes declare their routers in ``_can_record_outputs``. What a router returns differs: raw logits or
probabilities, from a softmax or sigmoids, chosen with a bias or within groups. So the chosen experts are read from the
router's output if it has them, and the function from logits to weights is found by trying (``Rule.found_in``), not by
the model's name.
Shapes: S tokens (batch times length), E experts, k experts chosen for a token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from branchmix.errors import CheckpointError
from branchmix.models.experts_branchmix import BranchMixSparseMoeBlock
from branchmix.models.routing_branchmix import BranchMixAttentionRouter
from branchmix.models.trunk_branchmix import BranchMixTrunkExperts

KINDS = ("ffn", "attention")

_SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt(softplus)": lambda logits: F.softplus(logits).sqrt(),
    "probabilities": lambda probabilities: probabilities,
}
"""What makes scores of a router's output; ``probabilities``: it gives back softmax's result itself."""
_TOLERANCE = 0.03
"""Relative: bf16 rounds to 0.4 %, and the wrong function is off by far more."""


@dataclass(frozen=True)
class RouterPlace:
    """One router of a model."""

    kind: str
    """``ffn`` or ``attention``."""
    layer: int
    """Number of its block, from 0, as in the names of tensors."""
    name: str
    """Name of the module."""
    module: nn.Module
    logits_index: int
    """Where in the module's output the logits are."""
    top_k: int | None
    """Experts chosen for a token, as far as module or config say."""

    def read(self, output: Any) -> RouterOutput:
        """The parts of the module's output; raises CheckpointError if it is not one logit for each token and expert."""
        parts = output if isinstance(output, (tuple, list)) else (output,)
        logits = parts[self.logits_index]
        if not isinstance(logits, torch.Tensor) or logits.dim() < 2:
            raise CheckpointError(f"the router {self.name} does not give one logit for each token and expert")
        logits_SE = logits.detach().float().flatten(0, -2)
        tokens, experts = logits_SE.shape
        others = [part for place, part in enumerate(parts) if place != self.logits_index]
        rows = [part.detach().flatten(0, -2) for part in others if isinstance(part, torch.Tensor) and part.dim() >= 2]
        rows = [row for row in rows if len(row) == tokens and row.shape[1] <= experts]
        weights_Sk = next((row.float() for row in rows if row.is_floating_point()), None)
        index_Sk = next((row.long() for row in rows if row.dtype in (torch.int64, torch.int32)), None)
        if index_Sk is None:
            top_k = min(self.top_k or experts, experts)
            if weights_Sk is not None and weights_Sk.shape[1] == experts:  # one for each, 0 for those not chosen
                index_Sk = weights_Sk.topk(top_k, dim=-1).indices
                weights_Sk = weights_Sk.gather(1, index_Sk)
            else:
                index_Sk, weights_Sk = logits_SE.topk(top_k, dim=-1).indices, None
        if weights_Sk is not None and weights_Sk.shape != index_Sk.shape:
            weights_Sk = None
        return RouterOutput(logits_SE, index_Sk, weights_Sk)


@dataclass(frozen=True)
class RouterOutput:
    """What a router says of S tokens."""

    logits_SE: torch.Tensor
    """fp32; probabilities where the rule says so."""
    index_Sk: torch.Tensor
    """Chosen experts."""
    weights_Sk: torch.Tensor | None
    """What their outputs are multiplied by, if the router says it."""


@dataclass(frozen=True)
class Rule:
    """How a router makes weights of its logits."""

    score: str
    """A key of ``_SCORES``."""
    weights: str
    """How the chosen experts' scores become weights: ``raw`` (times a constant), ``normalised``, or ``unknown``."""
    found: bool
    """Whether the router's weights confirm it; if not, softmax is assumed."""

    def probabilities(self, logits_SE: torch.Tensor) -> torch.Tensor:
        """Scores before top-k, divided by their sum over all experts where they don't sum to 1: [S, E]."""
        scores_SE = _SCORES[self.score](logits_SE)
        return scores_SE / scores_SE.sum(-1, keepdim=True).clamp(min=1e-20)

    @classmethod
    def found_in(cls, output: RouterOutput) -> Rule:
        """The function under which the weights of a token's chosen experts are in proportion to their scores.

        With one expert a token there is no proportion within it: then the weights are compared over tokens.
        """
        logits_SE, weights_Sk = output.logits_SE, output.weights_Sk
        sums_S = logits_SE.sum(-1)
        if bool((logits_SE >= 0).all()) and bool(((sums_S - 1).abs() < _TOLERANCE).all()):
            return cls("probabilities", _kind_of_weights(weights_Sk, logits_SE, output.index_Sk), True)
        if weights_Sk is None or not bool((weights_Sk > 0).all()):
            return cls("softmax", "unknown", False)
        best, least = "softmax", float("inf")
        for name in ("softmax", "sigmoid", "sqrt(softplus)"):
            ratio_Sk = weights_Sk / _SCORES[name](logits_SE).gather(1, output.index_Sk).clamp(min=1e-20)
            spread = _spread(ratio_Sk if ratio_Sk.shape[1] > 1 else ratio_Sk.T)
            if spread < 0.5 * least:  # softmax if there is nothing to choose between
                best, least = name, spread
        if least > _TOLERANCE:
            return cls("softmax", "normalised" if _spread(weights_Sk.sum(-1)[None]) < _TOLERANCE else "unknown", False)
        return cls(best, _kind_of_weights(weights_Sk, _SCORES[best](logits_SE), output.index_Sk), True)


def _kind_of_weights(weights_Sk: torch.Tensor | None, scores_SE: torch.Tensor, index_Sk: torch.Tensor) -> str:
    if weights_Sk is None:
        return "unknown"
    if _spread((weights_Sk / scores_SE.gather(1, index_Sk).clamp(min=1e-20)).flatten()[None]) < _TOLERANCE:
        return "raw"
    return "normalised" if _spread(weights_Sk.sum(-1)[None]) < _TOLERANCE else "unknown"


def _spread(values_SX: torch.Tensor) -> float:
    """Greatest less least within a row, relative to their mean; the median over rows."""
    spread_S = (values_SX.amax(-1) - values_SX.amin(-1)) / values_SX.mean(-1).abs().clamp(min=1e-20)
    return float(spread_S.median())


# ---- Finding them ----


def find_routers(model: nn.Module) -> list[RouterPlace]:
    """All routers of a mixture, ours or one of transformers', by layer; none for a dense model.

    A router within attention (its module's name says so) is of kind ``attention``, any other one ``ffn``.
    """
    recorded = dict(_recorded(model))
    chosen = [(name, module) for name, module in model.named_modules() if id(module) in recorded]
    places = []
    for name, module in chosen:
        # Of a router within a recorded block, such as JetMoe's, only the inner one.
        if any(other.startswith(f"{name}.") for other, _ in chosen):
            continue
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        kind = "attention" if re.search(r"attn|attention", name) else "ffn"
        layer = int(number[1]) if number else 0
        top_k = getattr(module, "top_k", None)
        top_k = top_k if isinstance(top_k, int) else _configured_top_k(getattr(model, "config", None))
        places.append(RouterPlace(kind, layer, name, module, recorded[id(module)], top_k))
    return sorted(places, key=lambda place: (KINDS.index(place.kind), place.layer))


def _recorded(model: nn.Module) -> Iterator[tuple[int, int]]:
    """id of each module that transformers records router logits of, and their place in its output."""
    for owner in model.modules():
        recorders = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits", [])
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            target = getattr(recorder, "target_class", recorder)
            path = getattr(recorder, "layer_name", None)
            for name, module in owner.named_modules():
                if isinstance(target, type) and isinstance(module, target) and (path is None or path in name):
                    yield id(module), getattr(recorder, "index", 0)


def _configured_top_k(config: Any) -> int | None:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for holder in (config, getattr(config, "ffn_config", None)):
        for name in ("num_experts_per_tok", "moe_top_k", "top_k_experts", "moe_topk", "moe_k"):
            if isinstance(value := getattr(holder, name, None), int):
                return value
    return None


# ---- Forcing them ----


@contextmanager
def one_hot_gates(mixture: Any, number: int) -> Iterator[None]:
    """Every router of a mixture sends everything to one expert, with a gate of 1, and the trunk is that expert's.

    A shared expert is silent meanwhile, so that the mixture is that expert.

    Args:
        mixture: a BranchMix model.
        number: the expert's row.
    """

    def force_attention(module: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
        gates = torch.zeros_like(output[1])
        gates[..., number] = 1.0
        return output[0], gates

    def force_ffn(scaling: float, module: Any, args: Any, output: tuple[torch.Tensor, ...]) -> Any:
        gates, index = torch.zeros_like(output[1]), torch.full_like(output[2], number)
        gates[..., 0] = 1.0 / scaling
        return output[0], gates, index

    with ExitStack() as hooks:
        for module in mixture.modules():
            if isinstance(module, BranchMixAttentionRouter):
                hooks.enter_context(module.register_forward_hook(force_attention))
            elif isinstance(module, BranchMixSparseMoeBlock):
                hooks.enter_context(module.gate.register_forward_hook(partial(force_ffn, module.scaling)))
                hooks.callback(setattr, module, "shared_weight", module.shared_weight)
                module.shared_weight = 0.0
            elif isinstance(module, BranchMixTrunkExperts):
                hooks.callback(setattr, module, "only", module.only)
                module.only = number
        yield


# ---- Counting ----


def load_of(gates: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """What each token gives to each expert, [..., E] summing to 1: 1/k for each of the k chosen, or its gates.

    ``gates`` are [..., E] before top-k; ``index`` is [..., k] of the chosen experts, None or all of them for soft
    routing.
    """
    if index is None or index.shape[-1] == gates.shape[-1]:
        return gates
    return torch.zeros_like(gates).scatter_(-1, index, 1 / index.shape[-1])


STARVED = 0.01
"""An expert with less than this fraction of its share of the load counts as dead."""


def max_violation(load: Sequence[float], target: Sequence[float] | None = None) -> float:
    """``max_i f_i / t_i - 1``, how far the busiest expert is above its share (MaxVio of arXiv 2408.15664).

    ``load`` sums to 1 over experts, and so does ``target``, which is equal shares if not given.
    """
    shares = target or [1 / len(load)] * len(load)
    return max(own / share for own, share in zip(load, shares, strict=True)) - 1


def dead_experts(load: Sequence[float], target: Sequence[float] | None = None) -> int:
    """Experts with less than ``STARVED`` of their share of the load; arguments as for ``max_violation``."""
    shares = target or [1 / len(load)] * len(load)
    return sum(own < STARVED * share for own, share in zip(load, shares, strict=True))


def bias_spread(router: Any) -> float | None:
    """The largest bias of a router less the smallest, how far biases have drifted apart; None if it has none.

    A difference, because equal biases change nothing.
    """
    bias_E = getattr(router, "expert_bias", None)
    return None if bias_E is None else float(bias_E.max() - bias_E.min())


def entropy_of(gates: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last axis, which goes."""
    return torch.special.entr(gates).sum(-1)
