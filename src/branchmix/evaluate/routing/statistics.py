"""What shares of experts say: entropy, specialisation, agreement. Plain numpy, no model.

Shapes: N documents, n documents of one domain, D domains, E experts, V kinds of tokens.
"""

from __future__ import annotations

import math

import numpy as np

from branchmix.evaluate.ratio import ratio


def entropy_bits(shares_E: np.ndarray) -> float:
    """``- sum_e p_e log2 p_e`` of shares that sum to 1, in bits: log2 E if all are alike, 0 for one expert alone."""
    positive = shares_E[shares_E > 0]
    return float(-(positive * np.log2(positive)).sum()) + 0.0


def mutual_information(shares_DE: np.ndarray) -> float:
    """Mutual information of expert and domain in bits, domains weighing alike:

        I = 1/D sum_d sum_e p(e|d) log2( p(e|d) / p(e) ),    p(e) = 1/D sum_d p(e|d)

    0 if every domain uses the experts alike; log2 D, its greatest value, if no two domains share an expert. It is also
    the Jensen-Shannon divergence of the domains' shares, which are the rows of ``shares_DE``. As computed from a sample
    it is too large on average; see ``mutual_information_bias``.
    """
    return entropy_bits(shares_DE.mean(0)) - float(np.mean([entropy_bits(shares_E) for shares_E in shares_DE]))


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


def chance_of_agreement(first_E: np.ndarray, second_E: np.ndarray) -> float:
    """How often two routers would choose the same expert if neither knew of the other: ``sum_e a_e b_e``.

    Both are the shares of tokens whose strongest expert is e.
    """
    return float((first_E * second_E).sum())


def typical_tokens(load_VE: np.ndarray, count_V: np.ndarray, expert: int, *, most: int = 12) -> list[tuple[int, float]]:
    """The most telling kinds of tokens of an expert, best first, each with the share of its occurrences that go there.

    A kind's score is ``p(v|e) log2( p(v|e) / p(v) )``, its part of how the expert's tokens differ from all tokens:
    often used there, and more often than elsewhere. Kinds that the expert gets no more of than others are left out.

    Args:
        load_VE: what all tokens of a kind give to each expert.
        count_V: tokens of a kind.
        expert: which one.
        most: tokens at most.
    """
    load_V = load_VE[:, expert]
    if not (total := load_V.sum()) > 0:
        return []
    of_expert_V, of_all_V = load_V / total, count_V / count_V.sum()
    ratio_V = _divided(of_expert_V, of_all_V)
    score_V = of_expert_V * np.log2(np.maximum(ratio_V, 1e-30))
    order = np.argsort(-score_V, kind="stable")[:most]
    return [(int(v), float(load_V[v] / count_V[v])) for v in order if ratio_V[v] > 1 + 1e-9]
