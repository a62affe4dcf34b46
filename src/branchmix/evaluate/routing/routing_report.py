"""What the routers of a model do with texts, as numbers: one dictionary, and a table of shares as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from branchmix.evaluate.routing.count import ModelCounts, RouterCounts
from branchmix.evaluate.routing.statistics import (
    chance_of_agreement,
    entropy_bits,
    mutual_information,
    mutual_information_bias,
    typical_tokens,
)
from branchmix.models.routers import KINDS


@dataclass(frozen=True)
class LayerRouting:
    """One router. Shares sum to 1 over experts; entropies and information are in bits."""

    layer: int
    """Number of the block, from 0, as in the names of tensors."""
    module: str
    load: list[float]
    """Share of each expert of all tokens: of the top-k choices, or of the gates where all experts are chosen."""
    gate: list[float]
    """Mean probability of each expert before top-k, all tokens."""
    by_domain: dict[str, list[float]]
    """``load`` of each domain's tokens."""
    gate_by_domain: dict[str, list[float]]
    load_entropy: float
    """Entropy of ``load``: log2 E if all experts do as much, 0 if one does all."""
    token_entropy: float
    """Entropy of a token's probabilities before top-k, mean over tokens: how undecided the router is."""
    token_entropy_by_domain: dict[str, float]
    mutual_information: float | None
    """Between expert and domain, in bits (see ``statistics.mutual_information``); None for one domain."""
    mutual_information_corrected: float | None
    """Without what a sample of documents gives too much (``statistics.mutual_information_bias``), 0 at least."""
    typical: list[list[dict[str, Any]]]
    """For each expert: tokens that it gets more of than others, the most telling first, with the share of their
    occurrences that go to it and their count."""


@dataclass(frozen=True)
class LayerAgreement:
    """FFN router and attention gate of one layer."""

    layer: int
    same: float
    """Share of tokens for which both prefer the same expert."""
    same_by_chance: float
    """What that would be if neither knew of the other."""
    overlap: float
    """Sum over experts of the smaller of both probabilities, mean over tokens: 1 if they are equal."""


@dataclass(frozen=True)
class RoutingReport:
    """All routers of a model on the texts of one or more domains."""

    model: str
    experts: list[str]
    domains: dict[str, dict[str, int]]
    """Documents and tokens of each."""
    max_length: int
    dtype: str
    routers: dict[str, dict[str, Any]]
    """By kind, ``ffn`` or ``attention``: experts, top_k, whether it is soft, score function, what weights are."""
    layers: dict[str, list[LayerRouting]]
    agreement: list[LayerAgreement]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; ``docs/routing.md`` describes it."""
        return {
            "model": self.model,
            "experts": self.experts,
            "domains": self.domains,
            "max_length": self.max_length,
            "dtype": self.dtype,
            "routers": self.routers,
            # Not ``asdict``: that copies every number of the lists.
            **{kind: [dict(vars(layer)) for layer in layers] for kind, layers in self.layers.items()},
            "agreement": [dict(vars(layer)) for layer in self.agreement],
        }

    def names(self, kind: str) -> list[str]:
        """Names of the experts of a kind of router."""
        return self.experts[: self.routers[kind]["experts"]]

    def as_csv(self) -> str:
        """Shares by kind, layer, domain and expert: a row each."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["router", "layer", "domain", "expert", "load", "gate"])
        rows.writerows(self._rows())
        return text.getvalue()

    def _rows(self) -> Iterator[list[Any]]:
        for kind, layers in self.layers.items():
            for layer in layers:
                for domain in self.domains:
                    both = zip(layer.by_domain[domain], layer.gate_by_domain[domain], strict=True)
                    for name, (load, gate) in zip(self.names(kind), both, strict=True):
                        yield [kind, layer.layer, domain, name, f"{load:.6f}", f"{gate:.6f}"]


def report(
    counts: ModelCounts,
    tokenizer: Any,
    *,
    model: str,
    expert_names: list[str] | None,
    domains: dict[str, int],
    max_length: int,
    dtype: str,
) -> RoutingReport:
    """Numbers of what was counted, domain after domain; ``domains`` says how many documents each has.

    The tokenizer writes the typical tokens. Experts without names are numbered.
    """
    domain_N = np.repeat(np.arange(len(domains)), list(domains.values()))
    sizes = {
        name: {"documents": documents, "tokens": int(counts.tokens_N[domain_N == number].sum())}
        for number, (name, documents) in enumerate(domains.items())
    }
    most = max(router.experts for router in counts.routers)
    names = expert_names if expert_names and len(expert_names) == most else [str(number) for number in range(most)]
    layers: dict[str, list[LayerRouting]] = {}
    routers: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    total = counts.tokens_N.sum()
    tokens = [shown_token(tokenizer, int(kind)) for kind in counts.kinds_V]
    for kind in KINDS:
        of_kind = [router for router in counts.routers if router.place.kind == kind]
        if of_kind:
            routers[kind] = _facts(of_kind)
            notes += _notes(kind, routers[kind])
            layers[kind] = [_layer(router, counts, domain_N, list(domains), tokens) for router in of_kind]
    first_of = {(r.place.kind, r.place.layer): r for r in reversed(counts.routers)}
    agreement = []
    for pair in counts.agreement:
        ffn, attention = first_of["ffn", pair.layer], first_of["attention", pair.layer]
        if ffn.experts != attention.experts:
            continue
        strongest = [router.strongest_NE.sum(0).numpy() / total for router in (ffn, attention)]
        same, overlap = (float(sums_N.sum()) / total for sums_N in (pair.same_N, pair.overlap_N))
        agreement.append(LayerAgreement(pair.layer, same, chance_of_agreement(*strongest), overlap))
    if len(domains) > 1 and min(domains.values()) == 1:
        alone = ", ".join(name for name, documents in domains.items() if documents == 1)
        notes.append(
            f"one document only of {alone}: how much of the mutual information is chance is judged by its tokens, as "
            "if they were independent, which is too little"
        )
    return RoutingReport(model, names, sizes, max_length, dtype, routers, layers, agreement, notes)


def _facts(routers: list[RouterCounts]) -> dict[str, Any]:
    """What all routers of a kind have in common."""
    first = routers[0]
    assert first.rule is not None
    return {
        "experts": max(router.experts for router in routers),
        "top_k": first.top_k,
        "soft": first.top_k == first.experts,
        "score": first.rule.score,
        "score_found": first.rule.found,
        "weights": first.rule.weights,
    }


def _notes(kind: str, facts: dict[str, Any]) -> list[str]:
    if not facts["score_found"] and not facts["soft"]:
        return [f"{kind}: this router does not say what makes weights of its logits: softmax is assumed"]
    if facts["score"] not in ("softmax", "probabilities"):
        return [f"{kind}: scores are {facts['score']} of the logits; shown divided by their sum over all experts"]
    return []


def _layer(
    router: RouterCounts, counts: ModelCounts, domain_N: np.ndarray, domains: list[str], tokens: list[str]
) -> LayerRouting:
    load_NE, gates_NE, entropy_N = (
        sums.numpy() for sums in (router.load_NE, router.gates_NE, router.entropy_N / math.log(2))
    )
    total = counts.tokens_N.sum()

    def by_domain(sums_NX: np.ndarray) -> dict[str, Any]:
        return {
            name: (sums_NX[domain_N == number].sum(0) / counts.tokens_N[domain_N == number].sum()).tolist()
            for number, name in enumerate(domains)
        }

    loads = by_domain(load_NE)
    load_E = load_NE.sum(0) / total
    information = corrected = None
    if len(domains) > 1:
        information = max(0.0, mutual_information(np.array(list(loads.values()))))
        corrected = max(0.0, information - mutual_information_bias(load_NE, counts.tokens_N, domain_N))
    load_VE = router.load_VE.numpy()
    typical = [
        [
            {"token": tokens[v], "share": round(share, 4), "count": int(counts.count_V[v])}
            for v, share in typical_tokens(load_VE, counts.count_V, expert)
        ]
        for expert in range(router.experts)
    ]
    return LayerRouting(
        layer=router.place.layer,
        module=router.place.name,
        load=load_E.tolist(),
        gate=(gates_NE.sum(0) / total).tolist(),
        by_domain=loads,
        gate_by_domain=by_domain(gates_NE),
        load_entropy=entropy_bits(load_E),
        token_entropy=float(entropy_N.sum() / total),
        token_entropy_by_domain=by_domain(entropy_N),
        mutual_information=information,
        mutual_information_corrected=corrected,
        typical=typical,
    )


def shown_token(tokenizer: Any, token: int) -> str:
    """A token as it is written in a text, or by its name in the vocabulary where it is only a part of a character."""
    text = str(tokenizer.decode([token]))
    return str(tokenizer.convert_ids_to_tokens(token)) if not text or "�" in text else text
