"""What the routers of a mixture do while it trains: load, entropy, who serves which domain, and whether one collapsed.

Shapes: L layers, B sequences, T tokens of each, D domains, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from branchmix.models.routers import entropy_of, load_of, mixture_routers
from branchmix.models.routing_branchmix import BranchMixRouter

STARVED = 0.01
"""An expert with less than this part of its fair share 1 / E is not used any more."""

DOMINANT = 0.95
"""With more than this share of the load, an expert leaves the others nothing to learn from."""

PATIENCE = 5
"""Readings in a row before a collapse is told: a single batch may well have nothing for an expert."""


class RouterMonitor:
    """Follows all routers of a mixture, of both kinds, through forward hooks.

    ``set_batch`` before each forward pass that is to count, ``read`` every so many steps. Between the two nothing waits
    for the device. Passes without ``set_batch`` (evaluation, generation) count nothing, and each router counts once for
    each ``set_batch``: with gradient checkpointing the backward pass computes it a second time.
    A dense model has no routers; nothing then costs anything, and readings are empty.

    Args:
        model: the mixture itself, not a wrapper around it.
        domains: their names, by the numbers that ``set_batch`` gets.
    """

    def __init__(self, model: nn.Module, domains: Sequence[str]):
        config: Any = getattr(model, "config", None)
        self.domains = list(domains)
        self._kinds: list[_Kind] = []
        self._hooks = []
        self._batch: _Batch | None = None
        self._last = RouterReading([], [])
        self._streaks: dict[tuple[str, int, str], int] = {}
        self._told: set[tuple[str, int, str]] = set()
        found = mixture_routers(model)
        self._kinds += [_Kind(kind, found[kind], len(self.domains)) for kind in ("attention", "ffn") if kind in found]
        if self._kinds:
            num_experts = self._kinds[0].num_experts
            self._experts = list(getattr(config, "expert_names", None) or map(str, range(num_experts)))
            self._hooks = [
                router.register_forward_hook(self._recorder(kind, layer))
                for kind in self._kinds
                for layer, router in enumerate(kind.routers)
            ]

    def set_batch(self, domain_B: torch.Tensor, sequence_length: int, *, mask_BT: torch.Tensor | None = None) -> None:
        """Count the next forward pass.

        Args:
            domain_B: number of each sequence's domain.
            sequence_length: T.
            mask_BT: 1 for tokens that count, 0 for padding; all of them if not given.
        """
        if self._kinds:
            self._batch = _Batch(domain_B, sequence_length, mask_BT)
            for kind in self._kinds:
                kind.logits = [None] * len(kind.routers)

    def read(self) -> RouterReading:
        """Everything counted since the last reading, of all processes; then starts from zero.

        With more than one process all have to call it. Sums are added over all processes and divided afterwards. Where
        several processes see the same tokens (expert parallelism), these are counted several times in both, which
        changes no share and no mean.
        """
        routers = [router for kind in self._kinds for router in kind.read(self.domains)]
        reading = RouterReading(self._experts if self._kinds else [], routers)
        for key, load, fair in reading.loads():
            if fair < 1 and (load < STARVED * fair or load > DOMINANT):
                self._streaks[key] = self._streaks.get(key, 0) + 1
            else:
                self._streaks.pop(key, None)
                self._told.discard(key)
        self._last = reading
        return reading

    def collapsed(self) -> list[str]:
        """As of the last reading, one line for each router that collapsed and stayed so for some readings in a row.

        Each collapse is told once, and again only if the expert recovered in between.
        """
        found: dict[tuple[str, int], list[str]] = {}
        for key, load, _ in self._last.loads():
            if self._streaks.get(key, 0) >= PATIENCE and key not in self._told:
                self._told.add(key)
                kind, layer, expert = key
                found.setdefault((kind, layer), []).append(f"expert {expert} gets {100 * load:.1f} %")
        fair = f"fair: {100 / max(1, len(self._last.experts)):.0f} %"
        balanced = {kind.name for kind in self._kinds if kind.balanced}
        return [
            f"layer {layer} {kind} router: {', '.join(experts)} of the load ({fair}), for {PATIENCE} readings: "
            + ("raise router_aux_loss_coef or " if kind in balanced else "")
            + "lower the learning rate"
            for (kind, layer), experts in found.items()
        ]

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _recorder(self, kind: _Kind, layer: int) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
            if self._batch is None or kind.logits[layer] is not None:
                return
            kind.logits[layer] = output[0].detach()
            if all(logits is not None for kind in self._kinds for logits in kind.logits):
                for kind_ in self._kinds:
                    kind_.count(self._batch)
                self._batch = None

        return record


@dataclass(frozen=True)
class RouterReading:
    """What all routers did since the last reading; without routers, or when nothing was counted, of none."""

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
            layers.setdefault(router.kind, []).append(
                {
                    "layer": router.layer,
                    "load": router.load,
                    "entropy": router.entropy,
                    "entropy_share": router.entropy_share,
                    "load_max_over_mean": router.max_over_mean,
                    "by_domain": router.by_domain,
                }
            )
        return {"experts": self.experts, **layers}


@dataclass(frozen=True)
class RouterShares:
    """One router."""

    kind: str
    """``attention`` or ``ffn``."""
    layer: int
    load: list[float]
    """Share of each expert, summing to 1: of the top-k choices, or of the gates where all experts are chosen."""
    entropy: float
    """Of the gates before top-k, mean over tokens, in nats; log E is uniform, 0 is always one expert alone."""
    by_domain: dict[str, list[float]] = field(default_factory=dict)
    """``load`` within each domain that occurred."""

    @property
    def entropy_share(self) -> float:
        """``entropy`` as a share of the greatest possible one, log E."""
        return self.entropy / math.log(len(self.load)) if len(self.load) > 1 else 1.0

    @property
    def max_over_mean(self) -> float:
        """The greatest load, times E: 1 is perfect balance, E is one expert alone."""
        return max(self.load) * len(self.load)


# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Batch:
    domains: torch.Tensor
    """[B]"""
    sequence_length: int
    mask: torch.Tensor | None
    """[B, T]"""


class _Kind:
    """All routers of one kind, whose sums stand in one tensor.

    Layers are counted together at the end of a forward pass: a handful of calls in all, rather than for each layer.
    """

    def __init__(self, name: str, routers: list[BranchMixRouter], num_domains: int):
        self.name = name
        self.routers = routers
        self.top_k = routers[0].top_k
        self.num_experts = routers[0].weight.shape[0]
        self.num_domains = num_domains
        self.logits: list[torch.Tensor | None] = [None] * len(routers)
        self._sums_LDX: torch.Tensor | None = None

    @property
    def balanced(self) -> bool:
        """Whether a loss balances it: soft routers have none."""
        return self.top_k < self.num_experts

    @torch.no_grad()
    def count(self, batch: _Batch) -> None:
        """Add the recorded logits of one forward pass."""
        size, experts = (len(batch.domains), batch.sequence_length), self.num_experts
        logits_LBTE = torch.stack([logits.reshape(*size, experts) for logits in self.logits if logits is not None])
        gates_LBTE = logits_LBTE.softmax(-1)
        # By softmax and top-k anew rather than from the router's gates, which may be normalised.
        load_LBTE = load_of(gates_LBTE, gates_LBTE.topk(self.top_k, dim=-1).indices if self.balanced else None)
        # For each token: its load, its entropy, and a one that counts it.
        entropy_LBT1 = entropy_of(gates_LBTE).unsqueeze(-1)
        values_LBTX = torch.cat((load_LBTE, entropy_LBT1, torch.ones_like(entropy_LBT1)), dim=-1)
        if batch.mask is not None:
            values_LBTX = values_LBTX * batch.mask.to(values_LBTX).unsqueeze(-1)
        sums = self._sums(values_LBTX.device)
        domain_B = batch.domains.to(sums.device, non_blocking=True)
        sums.index_add_(1, domain_B, values_LBTX.sum(2).to(sums.dtype))
        self.logits = [None] * len(self.routers)

    def read(self, domains: list[str]) -> list[RouterShares]:
        """Shares of all processes since the last time, by layer."""
        sums = self._sums(self.routers[0].weight.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        self._sums_LDX = None
        routers = []
        for layer, sums_DX in enumerate(sums.cpu().double()):
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

    def _sums(self, device: torch.device) -> torch.Tensor:
        """[L, D, E loads + entropy + tokens]. fp64, as fp32 cannot count beyond 2^24, where the device has it."""
        if self._sums_LDX is None:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            size = (len(self.routers), self.num_domains, self.num_experts + 2)
            self._sums_LDX = torch.zeros(size, dtype=dtype, device=device)
        return self._sums_LDX
