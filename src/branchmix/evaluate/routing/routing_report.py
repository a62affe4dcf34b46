"""What the routers of a model do with texts, as numbers: one dictionary, and a table of shares as CSV.

Shapes: N documents, n documents of one domain, D domains, E experts, V kinds of tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.stats import entropy

from branchmix.evaluate.routing.count import ModelCounts, RouterCounts
from branchmix.models.routers import KINDS, bias_spread, dead_experts, max_violation
from branchmix.pages.table import Table
from branchmix.statistics import ratio

Layer = dict[str, Any]
"""Numbers of one router, by the names that ``docs/routing.md`` describes.

Shares sum to 1 over experts; entropies and information are in bits; ``layer`` counts blocks from 0, as tensors' names.
"""


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
    layers: dict[str, list[Layer]]
    """By kind, one entry for each router."""
    agreement: list[dict[str, Any]]
    """For each layer with both kinds: how often they prefer the same expert, and that by chance."""
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; ``docs/routing.md`` describes it."""
        content = asdict(self)
        layers, agreement, _ = (content.pop(name) for name in ("layers", "agreement", "notes"))
        return {**content, **layers, "agreement": agreement}

    def names(self, kind: str) -> list[str]:
        """Names of the experts of a kind of router."""
        return self.experts[: self.routers[kind]["experts"]]

    def as_csv(self) -> str:
        """Shares by kind, layer, domain and expert: a row each."""
        head = ["router", "layer", "domain", "expert", "load", "gate"]
        rows = [
            [kind, str(layer["layer"]), domain, name, f"{load:.6f}", f"{gate:.6f}"]
            for kind, layers in self.layers.items()
            for layer in layers
            for domain in self.domains
            for name, load, gate in zip(
                self.names(kind), layer["by_domain"][domain], layer["gate_by_domain"][domain], strict=True
            )
        ]
        return Table(head, rows).csv()


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
    tokens = [shown_token(tokenizer, int(kind)) for kind in counts.kinds_V]
    every = {kind: [router for router in counts.routers if router.place.kind == kind] for kind in KINDS}
    by_kind = {kind: of_kind for kind, of_kind in every.items() if of_kind}
    routers = {kind: _facts(of_kind) for kind, of_kind in by_kind.items()}
    notes = [note for kind, facts in routers.items() for note in _notes(kind, facts)]
    layers = {
        kind: [_layer(router, counts, domain_N, list(domains), tokens) for router in of_kind]
        for kind, of_kind in by_kind.items()
    }
    first_of = {(r.place.kind, r.place.layer): r for r in reversed(counts.routers)}
    agreement = []
    total = float(counts.tokens_N.sum())
    for layer, (same, overlap) in counts.agreement.items():
        ffn_E, attention_E = (first_of[kind, layer].strongest_E.numpy() / total for kind in ("ffn", "attention"))
        if len(ffn_E) == len(attention_E):
            by_chance = float(ffn_E @ attention_E)  # how often they would agree if neither knew of the other
            shares = {"same": same / total, "same_by_chance": by_chance, "overlap": overlap / total}
            agreement.append({"layer": layer, **shares})
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
) -> Layer:
    load_NE, gates_NE, load_VE = router.load_NE.numpy(), router.gates_NE.numpy(), router.load_VE.numpy()
    entropy_N = router.entropy_N.numpy() / math.log(2)
    total = counts.tokens_N.sum()

    def by_domain(sums_NX: np.ndarray) -> dict[str, Any]:
        parts = [domain_N == number for number in range(len(domains))]
        means = ((sums_NX[part].sum(0) / counts.tokens_N[part].sum()).tolist() for part in parts)
        return dict(zip(domains, means, strict=True))

    loads = by_domain(load_NE)
    load_E = load_NE.sum(0) / total
    information = corrected = None
    if len(domains) > 1:
        information = max(0.0, mutual_information(np.array(list(loads.values()))))
        corrected = max(0.0, information - mutual_information_bias(load_NE, counts.tokens_N, domain_N))
    typical = [
        [
            {"token": tokens[v], "share": round(share, 4), "count": int(counts.count_V[v])}
            for v, share in typical_tokens(load_VE, counts.count_V, expert)
        ]
        for expert in range(router.experts)
    ]
    return {
        "layer": router.place.layer,
        "module": router.place.name,
        "load": load_E.tolist(),
        "gate": (gates_NE.sum(0) / total).tolist(),
        "by_domain": loads,
        "gate_by_domain": by_domain(gates_NE),
        "max_violation": max_violation(load_E.tolist()),
        "dead_experts": dead_experts(load_E.tolist()),
        "bias_spread": bias_spread(router.place.module),
        "load_entropy": float(entropy(load_E, base=2)) + 0.0,  # not -0.0
        "token_entropy": float(entropy_N.sum() / total),
        "token_entropy_by_domain": by_domain(entropy_N),
        "mutual_information": information,
        "mutual_information_corrected": corrected,
        "typical": typical,
    }


def shown_token(tokenizer: Any, token: int) -> str:
    """A token as it is written in a text, or by its name in the vocabulary where it is only a part of a character."""
    text = str(tokenizer.decode([token]))
    return str(tokenizer.convert_ids_to_tokens(token)) if not text or "�" in text else text


# ---- what shares of experts say ----


def mutual_information(shares_DE: np.ndarray) -> float:
    """Mutual information of expert and domain in bits, domains weighing alike:

        I = 1/D sum_d sum_e p(e|d) log2( p(e|d) / p(e) ),    p(e) = 1/D sum_d p(e|d)

    0 if every domain uses the experts alike; log2 D, its greatest value, if no two domains share an expert. It is also
    the Jensen-Shannon divergence of the domains' shares, which are the rows of ``shares_DE``. As computed from a sample
    it is too large on average; see ``mutual_information_bias``.
    """
    return float(entropy(shares_DE.mean(0), base=2) - entropy(shares_DE, base=2, axis=1).mean())


def mutual_information_bias(load_NE: np.ndarray, tokens_N: np.ndarray, domain_N: np.ndarray) -> float:
    """About how much too large ``mutual_information`` comes out of a sample of documents, in bits.

    Second order of a Taylor series in the errors of the shares, as in the Miller-Madow correction of entropies:

        bias = 1 / (2 ln 2) * ( 1/D sum_d sum_e v(e|d) / p(e|d)  -  1/D^2 sum_d sum_e v(e|d) / p(e) )

    ``v(e|d)`` is the squared standard error of ``p(e|d)``, a ratio of sums over documents, which are independent where
    their tokens are not. Of a domain with a single document nothing is known but its tokens: then ``p (1 - p) /
    tokens``, as if those were independent, which is too little. It assumes that errors are small beside the shares.

    Args:
        load_NE: of each document, the sum over its tokens of what they give to each expert (1 for each token).
        tokens_N: tokens of each document, none of them 0.
        domain_N: number of each document's domain, from 0.
    """
    shares, variances = [], []
    for domain in range(int(domain_N.max()) + 1):
        load_nE, tokens_n = load_NE[domain_N == domain], tokens_N[domain_N == domain]
        shares_E, errors_E = ratio(load_nE, tokens_n)
        shares.append(shares_E)
        variances.append(shares_E * (1 - shares_E) / tokens_n.sum() if errors_E is None else errors_E**2)
    shares_DE, variances_DE = np.array(shares), np.array(variances)
    within = _divided(variances_DE, shares_DE).sum() / len(shares)
    between = _divided(variances_DE.sum(0), shares_DE.mean(0)).sum() / len(shares) ** 2
    return float((within - between) / (2 * math.log(2)))


def _divided(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.divide(values, by, out=np.zeros_like(values), where=by > 0)


def typical_tokens(load_VE: np.ndarray, count_V: np.ndarray, expert: int, *, most: int = 12) -> list[tuple[int, float]]:
    """The most telling kinds of tokens of an expert, best first, each with the share of its occurrences that go there.

    A kind's score is ``p(v|e) log2( p(v|e) / p(v) )``, its part of how the expert's tokens differ from all tokens:
    often used there, and more often than elsewhere. Kinds that the expert gets no more of than others are left out.
    ``load_VE`` is what all tokens of a kind give to each expert, ``count_V`` how many there are.
    """
    load_V = load_VE[:, expert]
    if not (total := load_V.sum()) > 0:
        return []
    of_expert_V, of_all_V = load_V / total, count_V / count_V.sum()
    ratio_V = _divided(of_expert_V, of_all_V)
    score_V = of_expert_V * np.log2(np.maximum(ratio_V, 1e-30))
    order = np.argsort(-score_V, kind="stable")[:most]
    return [(int(v), float(load_V[v] / count_V[v])) for v in order if ratio_V[v] > 1 + 1e-9]
