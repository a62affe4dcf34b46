"""What is counted in forward passes: the loss of each domain, and the choices of the routers.

transformers lets a model's ``loss_function`` be set. This one computes what ``ForCausalLMLoss`` does, but keeps the
negative log-likelihood of every token long enough to sum it by domain. There is no second pass over the logits, and no
wait for the device: the sums stay there until they are read.
Shapes: B sequences, T tokens, V vocabulary, N domains, L layers, E experts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from branchmix.data.sequences import IGNORED
from branchmix.models.routers import STARVED, bias_spread, dead_experts, entropy_of, load_of, max_violation
from branchmix.models.routing_branchmix import BranchMixFFNRouter, BranchMixRouter, chosen, scores, shares

DOMINANT = 0.95
"""An expert with more than this share of the load leaves the others almost no tokens."""
PATIENCE = 5
"""Consecutive readings before a collapse is reported, since a single batch may have no tokens for an expert."""


class DomainSums:
    """Sums by domain of numbers of sequences, in fp64 where the device has it, as fp32 cannot count beyond 2^24.

    They stay on the device until they are read. ``shape`` is that of a sequence's numbers.
    """

    def __init__(self, num_domains: int, *shape: int):
        self.shape = (num_domains, *shape)
        self.local: torch.Tensor | None = None
        """[N, *shape], of this process since the last reading; None if there was nothing."""

    def add(self, domain_B: torch.Tensor, values: torch.Tensor) -> None:
        """Add the numbers [B, *shape] of sequences of these domains."""
        if self.local is None or self.local.device != values.device:
            self.local = self._zeros(values.device)
        self.local.index_add_(0, domain_B.to(values.device, non_blocking=True), values.to(self.local.dtype))

    def read(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the sums [N, *shape] since the last reading, over all processes, and reset them. A collective call.

        It needs the process's device if this process may not have added anything yet.
        """
        sums = self._zeros(device) if self.local is None else self.local
        self.local = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return sums.cpu().double()

    def _zeros(self, device: torch.device | None) -> torch.Tensor:
        exact = torch.float32 if device is not None and device.type == "mps" else torch.float64
        return torch.zeros(self.shape, dtype=exact, device=device)


class DomainLoss:
    """A ``loss_function`` for causal LMs that also adds up the loss by domain.

    Args:
        domains: names, in the order of the numbers that batches hold.

    Example:
        >>> loss = DomainLoss(["code", "law"])
        >>> with loss.counting(model, batch["domain"]):
        ...     model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
        >>> mean, by_domain = loss.read()
    """

    def __init__(self, domains: Sequence[str]):
        self.domains = list(domains)
        self._last_B = torch.zeros(0, dtype=torch.long)
        self._sums = DomainSums(len(self.domains), 2)  # of losses and of predicted tokens

    @contextmanager
    def counting(self, model: nn.Module, domain_B: torch.Tensor) -> Iterator[None]:
        """Compute the loss of ``model`` with this function inside the block, and count it for the batch's domains.

        A mixture still adds its router losses. The model may be wrapped by DDP or PEFT.
        """
        models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
        family: Any = next(module for module in models if module.config.model_type != "branchmix")
        before, family.loss_function = family.loss_function, partial(self, domain_B=domain_B)
        try:
            yield
        finally:
            family.loss_function = before

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        *,
        domain_B: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As transformers' ``ForCausalLMLoss``, of logits [B, T, V] and labels [B, T], which are shifted here: the
        mean, or the sum divided by ``num_items_in_batch``."""
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target_BT = shift_labels.to(logits.device)
        nll = F.cross_entropy(
            logits.float().view(-1, vocab_size), target_BT.reshape(-1), ignore_index=ignore_index, reduction="none"
        )
        total = nll.sum()
        counted_BT = target_BT != ignore_index
        sum_B = nll.detach().view(target_BT.shape).sum(-1, dtype=torch.float32 if nll.is_mps else torch.float64)
        self._sums.add(domain_B, torch.stack((sum_B, counted_BT.sum(-1).to(sum_B)), dim=-1))
        self._last_B = domain_B
        count = counted_BT.sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if torch.is_tensor(count) else count)

    def blamed(self) -> list[str]:
        """Names of the domains whose sum is not finite on this process, or else of those in its last batch."""
        sums_N = [] if self._sums.local is None else self._sums.local[:, 0].tolist()
        not_finite = [number for number, total in enumerate(sums_N) if not math.isfinite(total)]
        return [self.domains[number] for number in not_finite or self._last_B.unique().tolist()]

    def read(self, device: torch.device | None = None) -> tuple[float, dict[str, float]]:
        """Return and reset the mean loss over all tokens since the last reading, and that of each domain that occurred.

        In nats per predicted token, which a document's first in a sequence is not; NaN if there was none. A collective
        call, as ``DomainSums.read``.
        """
        losses, counts = self._sums.read(device).T.tolist()
        by_domain = zip(self.domains, losses, counts, strict=True)
        mean = sum(losses) / sum(counts) if any(counts) else math.nan
        return mean, {name: loss / count for name, loss, count in by_domain if count}


class RouterMonitor:
    """Accumulates the choices of all routers of a mixture, of both kinds, from the logits that the model returns.

    Call ``add`` with the output of each forward pass, and ``read`` every few steps. ``add`` does not wait for the
    device. A dense model has no routers: ``add`` does nothing then, and readings are empty.

    Args:
        model: the model whose outputs are counted.
        domains: names, in the order of the numbers that batches hold.

    Attributes:
        options: keyword arguments for the model's forward pass, so that it returns what ``add`` needs.
    """

    def __init__(self, model: Any, domains: Sequence[str]):
        config = model.config
        self._model = model
        self.domains = list(domains)
        self._routers: dict[str, list[BranchMixRouter]] = {"ffn": [], "attention": []}  # layer by layer
        for module in model.modules():
            if isinstance(module, BranchMixRouter):
                self._routers["ffn" if isinstance(module, BranchMixFFNRouter) else "attention"].append(module)
        self._experts: list[str] = []
        self._top_k: dict[str, int] = {}  # by kind of router
        self._streaks = Counter[tuple[str, int, str]]()
        if config.model_type == "branchmix":
            self._experts = list(config.expert_names or map(str, range(config.num_experts)))
            if config.has_attention_experts:
                self._top_k["attention"] = config.attention_num_experts_per_tok or config.num_experts
            if config.has_ffn_experts:
                self._top_k["ffn"] = config.num_experts_per_tok
        # For each layer: the load of each expert, the entropy, and the number of tokens.
        size = (config.num_hidden_layers, len(self._experts) + 2) if self._top_k else ()
        self._sums = {kind: DomainSums(len(self.domains), *size) for kind in self._top_k}
        self.options = {"output_router_logits": True} if self._top_k else {}

    @torch.no_grad()
    def add(self, output: Any, domain_B: torch.Tensor, mask_BT: torch.Tensor | None = None) -> None:
        """Count a forward pass by the output of the model, called with ``options``: tokens with 1 in the mask."""
        for kind, top_k in self._top_k.items():
            logits = output["router_logits" if kind == "ffn" else f"{kind}_router_logits"]
            logits_LBTE = torch.stack([of_layer.detach() for of_layer in logits]).unflatten(1, (len(domain_B), -1))
            # Computed from the logits rather than from the router's gates, which may be normalised.
            score = self._routers[kind][0].score
            gates_LBTE, all_LBTE = shares(logits_LBTE, score), scores(logits_LBTE, score)
            index_LBTk = chosen(all_LBTE, top_k, self._biases(kind)) if self._is_hard(kind) else None
            load_LBTE = load_of(gates_LBTE, index_LBTk)
            entropy_LBT1 = entropy_of(gates_LBTE).unsqueeze(-1)
            values_LBTX = torch.cat((load_LBTE, entropy_LBT1, torch.ones_like(entropy_LBT1)), dim=-1)
            if mask_BT is not None:
                values_LBTX = values_LBTX * mask_BT.to(values_LBTX).unsqueeze(-1)
            self._sums[kind].add(domain_B, values_LBTX.sum(2).transpose(0, 1))

    def _biases(self, kind: str) -> torch.Tensor | None:
        """What the routers of a kind add to their gates when they choose, [L, 1, 1, E]."""
        biases = [router.expert_bias for router in self._routers[kind] if router.expert_bias is not None]
        return torch.stack(biases)[:, None, None] if biases else None

    def _is_hard(self, kind: str) -> bool:
        """Whether routers choose some of the experts. A loss balances those; soft routers have none."""
        return self._top_k[kind] < len(self._experts)

    def read(self, device: torch.device | None = None) -> RouterReading:
        """Return everything counted since the last reading, by all processes, and reset it.

        With more than one process all have to call it. Sums are added over all processes and divided afterwards. If
        several processes see the same tokens (expert parallelism), these are counted several times in numerator and
        denominator, which does not change shares and means.
        """
        routers = [
            self._shares(kind, layer, sums_NX)
            for kind, sums in self._sums.items()
            for layer, sums_NX in enumerate(sums.read(device).unbind(1))
            if sums_NX[:, -1].any()
        ]
        return RouterReading(self._experts if self._top_k else [], routers, self._collapsed(routers))

    def _shares(self, kind: str, layer: int, sums_NX: torch.Tensor) -> RouterShares:
        by_domain = {
            name: (sums_X[:-2] / sums_X[-1]).tolist()
            for name, sums_X in zip(self.domains, sums_NX, strict=True)
            if sums_X[-1] > 0
        }
        total_X = sums_NX.sum(0)
        *load, entropy, _ = (total_X / total_X[-1]).tolist()
        share, target = entropy / math.log(len(load)) if len(load) > 1 else 1.0, self._target
        violation, dead = max_violation(load, target), dead_experts(load, target)
        spread = bias_spread(self._routers[kind][layer])
        return RouterShares(kind, layer, load, entropy, by_domain, share, violation, dead, spread)

    @property
    def _target(self) -> list[float] | None:
        """The share of the load that training gives each expert, if it is not the same for all."""
        target = self._model.balance.target
        return None if target is None else target.tolist()

    def _collapsed(self, routers: list[RouterShares]) -> list[str]:
        """A line for each router of which an expert has got nearly no tokens, or all, for the last few readings."""
        count, lines = len(self._experts), []
        shares = (self._target or [1 / count] * count) if routers else []
        for router in routers:
            found = []
            for expert, load, fair in zip(self._experts, router.load, shares, strict=True):
                key = (router.kind, router.layer, expert)
                collapsed = fair < DOMINANT and (load < STARVED * fair or load > DOMINANT)
                self._streaks[key] = self._streaks[key] + 1 if collapsed else 0
                if self._streaks[key] == PATIENCE:
                    found.append(f"expert {expert} gets {100 * load:.1f} % (fair: {100 * fair:.0f} %)")
            if found:
                advice = "raise router_aux_loss_coef or lower" if self._is_hard(router.kind) else "lower"
                lines.append(
                    f"layer {router.layer} {router.kind} router: {', '.join(found)} of the load, for {PATIENCE} "
                    f"readings: {advice} the learning rate"
                )
        return lines


@dataclass(frozen=True)
class RouterReading:
    """The choices of all routers since the last reading; empty if there are no routers or nothing was counted."""

    experts: list[str]
    routers: list[RouterShares]
    collapsed: list[str]
    """One line for each router that has now been collapsed for ``PATIENCE`` consecutive readings: each collapse is
    reported once, and again only if the expert recovered in between."""

    def scalars(self) -> dict[str, float]:
        """For loggers: ``router/ffn/03/entropy`` and the like."""
        values = {}
        for router in self.routers:
            name = f"router/{router.kind}/{router.layer:02d}"
            for measure in ("entropy", "entropy_share", "max_violation", "dead_experts", "bias_spread"):
                if (value := getattr(router, measure)) is not None:
                    values[f"{name}/{measure}"] = value
            values |= {f"{name}/load/{expert}": load for expert, load in zip(self.experts, router.load, strict=True)}
        return values

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``{"experts": [...], "ffn": [a dictionary for each layer], "attention": [...]}``."""
        layers: dict[str, Any] = {"experts": self.experts}
        for router in self.routers:
            shares = asdict(router)
            layers.setdefault(shares.pop("kind"), []).append(shares)
        return layers


@dataclass(frozen=True)
class RouterShares:
    """The choices of one router."""

    kind: str
    """``attention`` or ``ffn``."""
    layer: int
    load: list[float]
    """Share of each expert, summing to 1: of the top-k choices, or of the gates where all experts are chosen."""
    entropy: float
    """Entropy of the gates before top-k, averaged over tokens, in nats: log E if uniform, 0 for a single expert."""
    by_domain: dict[str, list[float]]
    """``load`` within each domain that occurred."""
    entropy_share: float
    """``entropy`` as a share of its maximum, log E."""
    max_violation: float
    """How far the busiest expert is above its share, relative to this share: 0 for perfect balance, E - 1 for a single
    expert."""
    dead_experts: int
    """Experts with less than 1 % of their share."""
    bias_spread: float | None
    """The largest of the router's biases less the smallest; None if it has none."""
