"""Ensembles of experts by their outputs (Branch-Train-Merge, arXiv 2208.03306, section 2.2).

``p(x_t | x_<t) = sum_i w_i,t p_i(x_t | x_<t)``, where ``w_i,t`` is the posterior of the domain of expert i after the
text before t: ``w_i,t`` is proportional to ``prior_i * prod_(s<t) p_i(x_s | x_<s)``. The probability of a text needs no
more than each member's probabilities of the text's own tokens, which are on record.
Shapes: E members, T predicted tokens of one document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from branchmix.evaluate.perplexity import ScoredDocument


def mixed(
    members: Sequence[ScoredDocument], *, prior_E: Sequence[float] | None = None, posterior: bool = True
) -> ScoredDocument:
    """A document under an ensemble; arguments as for ``ensemble_log_probs``."""
    logp_ET = np.stack([member.log_probs for member in members])
    return ScoredDocument(ensemble_log_probs(logp_ET, prior_E=prior_E, posterior=posterior), members[0].bytes)


def ensemble_log_probs(
    logp_ET: np.ndarray, *, prior_E: Sequence[float] | None = None, posterior: bool = True
) -> np.ndarray:
    """Log-probabilities [T] (nats) of a document's tokens under an ensemble.

    Args:
        logp_ET: of each member, for the same tokens.
        prior_E: weights before the first token, which sum to 1; equal ones if not given.
        posterior: learn from the text so far which member to trust; otherwise the prior stays.
    """
    logp_ET = np.asarray(logp_ET, dtype=np.float64)
    num_members = len(logp_ET)
    prior = np.full(num_members, 1 / num_members) if prior_E is None else np.asarray(prior_E, dtype=np.float64)
    with np.errstate(divide="ignore"):
        logw_ET = np.repeat(np.log(prior)[:, None], logp_ET.shape[1], axis=1)
    if posterior:
        logw_ET[:, 1:] += np.cumsum(logp_ET, axis=1)[:, :-1]
        logw_ET -= np.logaddexp.reduce(logw_ET, axis=0)
    mixed_T: np.ndarray = np.logaddexp.reduce(logw_ET + logp_ET, axis=0)
    return mixed_T
