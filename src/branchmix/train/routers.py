"""Router metrics during training: load, entropy, which expert serves which domain, and collapsed routers.

Shapes: L layers, B sequences, T tokens of each, D domains, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from branchmix.models.routers import entropy_of, load_of
from branchmix.train.losses import DomainSums

STARVED = 0.01
"""An expert with less than this fraction of its fair share 1 / E counts as unused."""

DOMINANT = 0.95
"""An expert with more than this share of the load leaves the others almost no tokens."""

PATIENCE = 5
"""Consecutive readings before a collapse is reported, since a single batch may have no tokens for an expert."""


class RouterMonitor:
    """Accumulates the choices of all routers of a mixture, of both kinds, from the logits that the model returns.

    Call ``add`` with the output of each forward pass, and ``read`` every few steps. ``add`` does not wait for the
    device. A dense model has no routers: ``add`` does nothing then, and readings are empty.

    Attributes:
        options: keyword arguments for the model's forward pass, so that it returns what ``add`` needs.
    """

    def __init__(self, config: Any, domains: Sequence[str]):
        self.domains = list(domains)
        self._kinds: list[_Kind] = []
        self._last = RouterReading([], [])
        self._streaks: dict[tuple[str, int, str], int] = {}
        self._reported: set[tuple[str, int, str]] = set()
        if config.model_type == "branchmix":
            self._experts = list(config.expert_names or map(str, range(config.num_experts)))
            size = (config.num_hidden_layers, len(self.domains), config.num_experts)
            if config.has_attention_experts:
                top_k = config.attention_num_experts_per_tok or config.num_experts
                self._kinds.append(_Kind("attention", "attention_router_logits", top_k, *size))
            if config.has_ffn_experts:
                self._kinds.append(_Kind("ffn", "router_logits", config.num_experts_per_tok, *size))
        self.options = {"output_router_logits": True} if self._kinds else {}

    def add(self, output: Any, domain_B: torch.Tensor, mask_BT: torch.Tensor | None = None) -> None:
        """Count a forward pass by the output of the model, called with ``options``.

        Tokens that count have 1 in the mask, padding has 0; without one, all count.
        """
        for kind in self._kinds:
            kind.add(output, domain_B, mask_BT)

    def read(self, device: torch.device | None = None) -> RouterReading:
        """Return everything counted since the last reading, by all processes, and reset it.

        With more than one process all have to call it. Sums are added over all processes and divided afterwards. If
        several processes see the same tokens (expert parallelism), these are counted several times in numerator and
        denominator, which does not change shares and means.
        """
        routers = [router for kind in self._kinds for router in kind.read(self.domains, device)]
        reading = RouterReading(self._experts if self._kinds else [], routers)
        for key, load, fair in reading.loads():
            if fair < 1 and (load < STARVED * fair or load > DOMINANT):
                self._streaks[key] = self._streaks.get(key, 0) + 1
            else:
                self._streaks.pop(key, None)
                self._reported.discard(key)
        self._last = reading
        return reading

    def collapsed(self) -> list[str]:
        """One line for each router that has been collapsed for ``PATIENCE`` consecutive readings.

        Each collapse is reported once, and again only if the expert recovered in between.
        """
        collapsed: dict[tuple[str, int], list[str]] = {}
        for key, load, _ in self._last.loads():
            if self._streaks.get(key, 0) >= PATIENCE and key not in self._reported:
                self._reported.add(key)
                kind, layer, expert = key
                collapsed.setdefault((kind, layer), []).append(f"expert {expert} gets {100 * load:.1f} %")
        fair = f"fair: {100 / max(1, len(self._last.experts)):.0f} %"
        balanced = {kind.name for kind in self._kinds if kind.balanced}
        return [
            f"layer {layer} {kind} router: {', '.join(experts)} of the load ({fair}), for {PATIENCE} readings: "
            + ("raise router_aux_loss_coef or " if kind in balanced else "")
            + "lower the learning rate"
            for (kind, layer), experts in collapsed.items()
        ]


@dataclass(frozen=True)
class RouterReading:
    """The choices of all routers since the last reading; empty if there are no routers or nothing was counted."""

    experts: list[str]
    routers: list[RouterShares]

    def loads(self) -> Iterator[tuple[tuple[str, int, str], float, float]]:
        """For each expert of each router: (kind, layer, name), its load, and the fair share 1 / E."""
        for router in self.routers:
            for expert, load in zip(self.experts, router.load, strict=True):
                yield (router.kind, router.layer, expert), load, 1 / len(self.experts)

    def scalars(self) -> dict[str, float]:
        """For loggers: ``router/ffn/03/entropy`` and the like."""
        values = {}
        for router in self.routers:
            name = f"router/{router.kind}/{router.layer:02d}"
            values[f"{name}/entropy"] = router.entropy
            values[f"{name}/entropy_share"] = router.entropy_share
            values[f"{name}/load_max_over_mean"] = router.max_over_mean
            values |= {f"{name}/load/{expert}": load for expert, load in zip(self.experts, router.load, strict=True)}
        return values

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``{"experts": [...], "ffn": [a dictionary for each layer], "attention": [...]}``."""
        layers: dict[str, list[dict[str, Any]]] = {}
        for router in self.routers:
            shares = asdict(router) | {
                "entropy_share": router.entropy_share,
                "load_max_over_mean": router.max_over_mean,
            }
            layers.setdefault(shares.pop("kind"), []).append(shares)
        return {"experts": self.experts, **layers}


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
    by_domain: dict[str, list[float]] = field(default_factory=dict)
    """``load`` within each domain that occurred."""

    @property
    def entropy_share(self) -> float:
        """``entropy`` as a share of its maximum, log E."""
        return self.entropy / math.log(len(self.load)) if len(self.load) > 1 else 1.0

    @property
    def max_over_mean(self) -> float:
        """The largest load, times E: 1 for perfect balance, E for a single expert."""
        return max(self.load) * len(self.load)


class _Kind:
    """The sums of all routers of one kind. All layers are counted together, in a few calls."""

    def __init__(self, name: str, output: str, top_k: int, num_layers: int, num_domains: int, num_experts: int):
        self.name = name
        self.output = output
        self.top_k = top_k
        self.num_experts = num_experts
        self._sums = DomainSums(num_domains, num_layers, num_experts + 2)

    @property
    def balanced(self) -> bool:
        """Whether a loss balances it, which soft routers do not have."""
        return self.top_k < self.num_experts

    @torch.no_grad()
    def add(self, output: Any, domain_B: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        """Add the logits of one forward pass."""
        logits_LSE = torch.stack([logits.detach() for logits in output[self.output]])
        logits_LBTE = logits_LSE.unflatten(1, (len(domain_B), -1))
        gates_LBTE = logits_LBTE.softmax(-1)
        # Computed from the logits rather than from the router's gates, which may be normalised.
        load_LBTE = load_of(gates_LBTE, gates_LBTE.topk(self.top_k, dim=-1).indices if self.balanced else None)
        # For each token: its load, its entropy, and a one that counts it.
        entropy_LBT1 = entropy_of(gates_LBTE).unsqueeze(-1)
        values_LBTX = torch.cat((load_LBTE, entropy_LBT1, torch.ones_like(entropy_LBT1)), dim=-1)
        if mask_BT is not None:
            values_LBTX = values_LBTX * mask_BT.to(values_LBTX).unsqueeze(-1)
        self._sums.add(domain_B, values_LBTX.sum(2).transpose(0, 1))

    def read(self, domains: list[str], device: torch.device | None) -> list[RouterShares]:
        """Return the shares of each layer over all processes since the last reading."""
        routers = []
        for layer, sums_DX in enumerate(self._sums.read(device).unbind(1)):
            total_X = sums_DX.sum(0)
            if total_X[-1] == 0:
                continue
            by_domain = {
                name: (sums_X[: self.num_experts] / sums_X[-1]).tolist()
                for name, sums_X in zip(domains, sums_DX, strict=True)
                if sums_X[-1] > 0
            }
            mean_X = (total_X / total_X[-1]).tolist()
            routers.append(RouterShares(self.name, layer, mean_X[: self.num_experts], mean_X[-2], by_domain))
        return routers
