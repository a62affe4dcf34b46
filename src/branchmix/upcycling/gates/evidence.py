"""What tokens say about domains: a table of evidence from counts, and how fast it adds up and is forgotten.

Shapes: V vocabulary, M domains, T tokens of a document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.signal import lfilter
from scipy.special import log_softmax

SMOOTHING = (500.0, 2000.0, 8000.0)
"""Tokens of the domains' mean that are added to each domain's counts."""
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Divide the evidence: neighbouring tokens repeat each other, so the product of their likelihoods is too sure."""
DECAYS = (1.0, 0.998, 0.995, 0.99, 0.98, 0.95)
"""Factors on the sum for each token."""


@dataclass(frozen=True)
class Posterior:
    """How counts become a posterior over domains."""

    smoothing: float
    temperature: float
    decay: float
    cross_entropy: float | None = None
    """Nats, of the true domain after each token, mean over domains; None where it was not measured."""
    accuracy: float | None = None
    """Share of tokens after which the true domain is the most probable, mean over domains."""


def evidence_table(counts_VM: np.ndarray, smoothing: float) -> np.ndarray:
    """``log p(token | domain)`` minus its mean over domains, [V, M]; probabilities smoothed with the domains' mean.

    Every domain weighs the same in that mean, whatever its size. A token that no domain has, such as one of a chat
    template, says nothing: smoothed alone, it would speak for the domain with the least text.
    """
    totals_M = np.maximum(counts_VM.sum(0), 1)
    background_V1 = (counts_VM / totals_M).mean(1, keepdims=True) + 0.5 / totals_M.sum()
    background_V1 /= background_V1.sum()
    log_VM = np.log((counts_VM + smoothing * background_V1) / (totals_M + smoothing))
    return (log_VM - log_VM.mean(1, keepdims=True)) * counts_VM.any(1, keepdims=True)


def decayed_sums(evidence_TM: np.ndarray, decay: float) -> np.ndarray:
    """``c_t = decay * c_(t-1) + evidence_t``, [T, M]."""
    return lfilter([1.0], [1.0, -decay], evidence_TM, axis=0)


def log_posterior(sums_TM: np.ndarray, temperature: float) -> np.ndarray:
    """``log softmax(c_t / temperature)``, [T, M]."""
    return log_softmax(sums_TM / temperature, axis=1)


def fit_posterior(counts_VM: np.ndarray, measured: Mapping[int, Sequence[np.ndarray]]) -> Posterior:
    """Smoothing, decay and temperature of the least cross-entropy of the domain.

    Half of the cross-entropy is that of documents alone, half that of the same documents one behind the other as if
    they were one, where the sum has to leave a domain: without it a fit would never forget.

    Args:
        counts_VM: of other documents.
        measured: documents of each domain, by its column.
    """
    rounds = range(max(len(texts) for texts in measured.values()))
    in_turn = [(m, texts[n]) for n in rounds for m, texts in measured.items() if n < len(texts)]
    joined = np.concatenate([tokens for _, tokens in in_turn])
    labels = np.concatenate([[m] * len(tokens) for m, tokens in in_turn])
    found: list[tuple[float, Posterior]] = []
    for smoothing, decay in product(SMOOTHING, DECAYS):
        table_VM = evidence_table(counts_VM, smoothing)
        alone = {m: [decayed_sums(table_VM[tokens], decay) for tokens in texts] for m, texts in measured.items()}
        together_TM = decayed_sums(table_VM[joined], decay)
        for temperature in TEMPERATURES:
            entropy, accuracy = _scores(alone, temperature)
            logp_TM = log_posterior(together_TM, temperature)
            switching = np.mean([-logp_TM[labels == m, m].mean() for m in measured])
            found.append((entropy + switching, Posterior(smoothing, temperature, decay, entropy, accuracy)))
    return min(found, key=lambda tried: tried[0])[1]


def _scores(sums: Mapping[int, Sequence[np.ndarray]], temperature: float) -> tuple[float, float]:
    entropies, hits = [], []
    for m, documents in sums.items():
        logp_TM = np.concatenate([log_posterior(sums_TM, temperature) for sums_TM in documents])
        entropies.append(-logp_TM[:, m].mean())
        hits.append((logp_TM.argmax(1) == m).mean())
    return float(np.mean(entropies)), float(np.mean(hits))
