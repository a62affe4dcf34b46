"""Which experts each domain wants, fitted by the likelihood of the mixture itself, without a gradient.

Gates are forced to each expert in turn, and the mixture's loss is measured on each domain: L [M, E]. The document gates
send domain d to the experts with probabilities ``softmax(-L[d] / tau_d)``; the sharpness tau_d is chosen by the loss of
the mixture with these gates. The label of a domain is not the target: the expert that is named after a domain is not
always the best one for it.

Shapes: V vocabulary, M domains, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from torch.nn.functional import logsigmoid

from branchmix.likelihood.forward import evaluating, log_probs, logits_at
from branchmix.models.documents_branchmix import KINDS, BranchMixDocumentGate
from branchmix.models.experts_branchmix import BranchMixSparseMoeBlock
from branchmix.models.kept_branchmix import keep_experts
from branchmix.models.modeling_branchmix import document_gate
from branchmix.models.routing_branchmix import BranchMixAttentionRouter, BranchMixRouter, BranchMixSharedRouter

SHARPNESS = (0.3, 0.1, 0.03)
"""Candidates for tau, in nats a token, the softest first."""
NEARLY = 0.002
"""Nats a token by which a softer choice may be worse: a difference of a few thousand tokens is no more certain."""
LEAST_LOG = -30.0
"""Smallest log of an expert's probability; about 1e-13 as a probability."""
BATCH_TOKENS = 1024
Text = Mapping[str, Sequence[np.ndarray]]
"""By domain, the tokens of its documents."""


@dataclass(frozen=True)
class TopK:
    """How the gates of chosen experts are used; fields of ``BranchMixConfig``."""

    num_experts_per_tok: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    attention_num_experts_per_tok: int | None
    attention_norm_topk_prob: bool
    scoring_func: str = "softmax"

    @classmethod
    def of(cls, config: Any) -> TopK:
        """What a mixture's config says."""
        return cls(*(getattr(config, name) for name in cls.__dataclass_fields__))

    def calibrated(self, num_experts: int, *, keep_top_k: bool = False) -> TopK:
        """Gates that sum to 1, of two experts or more: with one, a router would get no gradient.

        With ``keep_top_k`` the gates are chosen and used as they are now, but without a scale that made up for random
        ones: fitted scores are the experts' shares, which sum to 1.
        """
        if keep_top_k:
            return replace(self, routed_scaling_factor=1.0)
        least, attention = min(2, num_experts), self.attention_num_experts_per_tok
        attention = None if attention is None else max(attention, least)
        return TopK(max(self.num_experts_per_tok, least), True, 1.0, attention, True, self.scoring_func)

    def apply(self, model: Any) -> None:
        """Set a live model's routers, and its config."""
        for name in self.__dataclass_fields__:
            setattr(model.config, name, getattr(self, name))
        for module in model.modules():
            if isinstance(module, BranchMixAttentionRouter):
                module.top_k = self.attention_num_experts_per_tok or model.config.num_experts
                module.normalize = self.attention_norm_topk_prob
            elif isinstance(module, BranchMixRouter):
                module.top_k, module.normalize = self.num_experts_per_tok, self.norm_topk_prob
            elif isinstance(module, BranchMixSparseMoeBlock):
                module.scaling = self.routed_scaling_factor


class Gated:
    """A mixture in memory with document gates of its own, whatever it had, and no biases of its routers.

    The model is changed. ``evidence_VM`` is already divided by the temperature.
    """

    def __init__(self, model: Any, domains: Sequence[str], decay: float, evidence_VM: np.ndarray):
        self.model = model
        self.domains = list(domains)
        self.own_routing = TopK.of(model.config)
        model.config.document_gate = {"domains": self.domains, "decay": decay}
        gate = document_gate(model._family, model.config)
        assert gate is not None
        self.gate: BranchMixDocumentGate = gate.to(device=model.device, dtype=torch.float32)
        model.document_gate = self.gate
        self.routers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, BranchMixRouter) and not isinstance(module, BranchMixSharedRouter)
        }
        model.config.expert_bias = False
        for module in model.modules():
            if isinstance(module, BranchMixRouter):  # biases were moved for the gates as they were
                module.expert_bias = None
        self.weights = {name: router.weight.detach().clone() for name, router in self.routers.items()}
        with torch.no_grad():
            for parameter in self.gate.parameters():
                parameter.zero_()
            self.gate.evidence.copy_(torch.from_numpy(evidence_VM))

    @property
    def kinds(self) -> list[str]:
        """The kinds of routers that the gates have logits for: of ``attention``, ``ffn`` and ``trunk``."""
        return [kind for kind in KINDS if getattr(self.gate, kind) is not None]

    @torch.no_grad()
    def set_experts(self, log_ME: np.ndarray) -> None:
        """Let each domain want experts with these log probabilities."""
        for kind in self.kinds:
            getattr(self.gate, kind).copy_(torch.from_numpy(np.ascontiguousarray(log_ME.T)))

    @torch.no_grad()
    def set_routers(self, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Weights of the routers by name; zeros if None, so that tokens say nothing."""
        for name, router in self.routers.items():
            router.weight.zero_() if weights is None else router.weight.copy_(weights[name])


def losses(model: Any, text: Text) -> dict[str, float]:
    """Mean loss of each domain's tokens in nats, each document from its beginning.

    Raises:
        CheckpointError: the model's logits are not finite.
    """
    found = {}
    with evaluating(model):
        for name, documents in text.items():
            total, number = 0.0, 0
            for batch in batches(documents):
                rows = np.concatenate([np.full(len(tokens) - 1, row) for row, tokens in enumerate(batch)])
                places = np.concatenate([np.arange(len(tokens) - 1) for tokens in batch])
                targets = np.concatenate([tokens[1:] for tokens in batch])
                total -= float(log_probs(*logits_at(model, batch, rows, places, targets)).sum())
                number += len(targets)
            found[name] = total / number
    return found


def batches(documents: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Documents of similar length together, at most ``BATCH_TOKENS`` tokens of a pass with their padding."""
    batch: list[np.ndarray] = []
    for tokens in sorted(documents, key=len):
        if batch and (len(batch) + 1) * len(tokens) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(tokens)
    if batch:
        yield batch


def forced_losses(model: Any, text: Text, tell: Callable[[], None]) -> np.ndarray:
    """Loss of a mixture on each domain in ``text`` with all gates forced to each of E experts, [M, E] in nats.

    ``tell`` is called after each expert.
    """
    columns = []
    for expert in range(model.config.num_experts):
        columns.append(list(losses(keep_experts(model, [expert]), text).values()))  # without computing the others
        tell()
    return np.array(columns).T


def log_shares(losses_E: np.ndarray, tau: float) -> np.ndarray:
    """``log softmax(-L / tau)``, [..., E]."""
    return np.maximum(log_softmax(-losses_E / tau, axis=-1), LEAST_LOG)


def best_sharpness(gated: Gated, losses_ME: np.ndarray, text: Text, tell: Callable[[], None]) -> dict[str, float]:
    """tau of each domain in ``text``: the softest with which the mixture's loss on that domain is least, or nearly so.

    Domains hardly meet: each is chosen from passes in which all have the same tau.
    """
    found: dict[float, dict[str, float]] = {}
    for tau in SHARPNESS:
        gated.set_experts(log_shares(losses_ME, tau))
        found[tau] = losses(gated.model, text)
        tell()
    least = {name: min(of_tau[name] for of_tau in found.values()) for name in text}
    return {name: next(tau for tau in SHARPNESS if found[tau][name] <= least[name] + NEARLY) for name in text}


# ---- Gates that see one token ----

SAMPLED_TOKENS = 2000
"""Tokens of each domain whose router inputs the token gates are fitted on."""
PENALTIES = (0.001, 0.01, 0.1)
"""Candidates for the weight of the squared norm in the logistic regression."""


def fit_token_routers(
    gated: Gated, shares_ME: np.ndarray, fitted_on: Text, measured: Text, routing: TopK, tell: Callable[[], None]
) -> dict[str, torch.Tensor]:
    """Weights of every router: logistic regression from its own inputs to what the token's domain wants.

    Fitted twice, the second time on inputs that the mixture has with the routers of the first: under forced gates the
    inputs would betray the expert that was forced, and such routers are useless where their own choices count. The
    first time, all experts take part equally. The document gates are taken out of the model.

    ``shares_ME`` are the log probabilities of the experts that each domain wants, and ``routing`` is the mixture's. The
    penalty is chosen by the mixture's loss on the documents in ``measured``. ``tell`` is called after each pass.
    """
    sample = {name: _sample(documents) for name, documents in fitted_on.items()}
    targets_ME = dict(zip(gated.domains, torch.from_numpy(np.exp(shares_ME)).float(), strict=True))
    gated.model.document_gate = None
    gated.set_routers(None)
    everyone = TopK(gated.model.config.num_experts, True, 1.0, None, True, routing.scoring_func)
    everyone.apply(gated.model)
    weights = _regressions(gated, _inputs(gated, sample), targets_ME, PENALTIES[1])
    tell()
    routing.apply(gated.model)
    gated.set_routers(weights)
    inputs = _inputs(gated, sample)
    tell()
    found = []
    for penalty in PENALTIES:
        weights = _regressions(gated, inputs, targets_ME, penalty)
        gated.set_routers(weights)
        found.append((float(np.mean(list(losses(gated.model, measured).values()))), weights))
        tell()
    _, best = min(found, key=lambda tried: tried[0])
    gated.set_routers(best)
    return best


def _sample(documents: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The first documents, up to ``SAMPLED_TOKENS``."""
    chosen: list[np.ndarray] = []
    for tokens in documents:
        if (left := SAMPLED_TOKENS - sum(map(len, chosen))) > 0:
            chosen.append(tokens[: min(left, BATCH_TOKENS)])
    return chosen


def _regressions(
    gated: Gated,
    inputs: Mapping[str, Mapping[str, torch.Tensor]],
    targets_ME: Mapping[str, torch.Tensor],
    penalty: float,
) -> dict[str, torch.Tensor]:
    """Weights of every router, from its inputs by domain."""
    found = {}
    for name, by_domain in inputs.items():
        x_SD = torch.cat(list(by_domain.values())).float()
        target_SE = torch.cat([targets_ME[domain].expand(len(x), -1) for domain, x in by_domain.items()]).to(x_SD)
        weight_S = torch.cat([x.new_full((len(x),), 1 / len(x), dtype=torch.float32) for x in by_domain.values()])
        score = gated.routers[name].score
        found[name] = logistic_regression(x_SD, target_SE, weight_S / len(by_domain), penalty, score)
    return found


def logistic_regression(
    x_SD: torch.Tensor, target_SE: torch.Tensor, weight_S: torch.Tensor, penalty: float, score: str = "softmax"
) -> torch.Tensor:
    """W [E, D] of the least ``sum_s weight_s CE(softmax(W x_s), target_s) + penalty |W|^2 rms(x)^2 / 2``: convex.

    For ``sigmoid`` scores it is the sum of every expert's own cross-entropy, whose least is at ``target`` as well.
    """
    scale = x_SD.square().mean().sqrt().clamp_min(1e-12)
    x_SD = x_SD / scale
    w_ED = x_SD.new_zeros(target_SE.shape[1], x_SD.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([w_ED], max_iter=50, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits_SE = x_SD @ w_ED.T
        if score == "sigmoid":
            of_all_SE = target_SE * logsigmoid(logits_SE) + (1 - target_SE) * logsigmoid(-logits_SE)
        else:
            of_all_SE = target_SE * logits_SE.log_softmax(-1)
        loss = -(weight_S[:, None] * of_all_SE).sum() + penalty / 2 * w_ED.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return w_ED.detach() / scale


@torch.no_grad()
def _inputs(gated: Gated, sample: Text) -> dict[str, dict[str, torch.Tensor]]:
    """What each router sees of the sampled tokens, [S, D] by router and domain."""
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in gated.routers}
    for domain, documents in sample.items():
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in gated.routers}
        with ExitStack() as hooks:
            for name, router in gated.routers.items():
                hook = router.register_forward_pre_hook(lambda _, args, seen=parts[name]: seen.append(args[0].detach()))
                hooks.enter_context(hook)
            for tokens in documents:  # one by one, so that no padding is among the inputs
                ids = torch.from_numpy(tokens)[None].to(gated.model.device)
                gated.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        for name, seen in parts.items():
            found[name][domain] = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
    return found
