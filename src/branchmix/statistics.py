"""Statistics that several parts share: rates, two models on the same questions, p-values of many tests.

Letters: N questions, C clusters of questions.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from scipy import stats

Key = TypeVar("Key", bound=Hashable)
Correction = Literal["bh", "holm", "none"]
POWER = 0.8
"""How often ``detectable`` differences are found."""


def ratio(a_NX: Any, b_N: Any) -> tuple[Any, Any]:
    """``sum_i a_i / sum_i b_i``, such as of the bits and bytes of documents, and its standard error.

    The error is that of the delta method for independent documents:
    ``sqrt(n / (n - 1) * sum_i (a_i - R b_i)^2) / sum_i b_i``; None for a single document.
    """
    a_NX, b_N = np.asarray(a_NX, dtype=np.float64), np.asarray(b_N, dtype=np.float64)
    count, size = len(b_N), b_N.sum()
    value_X = a_NX.sum(0) / size
    if count < 2:
        return value_X, None
    squares_X = ((a_NX - np.multiply.outer(b_N, value_X)) ** 2).sum(0)
    return value_X, np.sqrt(count / (count - 1) * squares_X) / size


def adjusted_of(p: Mapping[Key, float | None], correction: Correction) -> dict[Key, float | None]:
    """``adjusted`` by key; what has no p stays without, and does not count."""
    tested = {key: value for key, value in p.items() if value is not None}
    return {**p, **dict(zip(tested, adjusted(list(tested.values()), correction), strict=True))}


def adjusted(p: Sequence[float], correction: Correction) -> list[float]:
    """p after Benjamini and Hochberg (1995) or Holm (1979)."""
    if correction == "none" or len(p) < 2:
        return list(p)
    values = np.asarray(p, dtype=float)
    if correction == "bh":
        return [float(value) for value in stats.false_discovery_control(values, method="bh")]
    order = np.argsort(values)
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    return [float(value) for value in np.minimum(stepped, 1)[np.argsort(order)]]


# ---- two models on the same questions ----


@dataclass(frozen=True)
class PairedDifference:
    """How a second model's scores differ from a first one's on the same questions."""

    first: float
    """Mean score of the first model."""
    second: float
    difference: float
    """Second minus first."""
    interval: tuple[float, float] | None
    """None where all differences are the same number: then the scores do not tell how sure it is."""
    p: float | None
    """How often chance alone makes a difference of this size, either way, between two models that are alike; None where
    ``interval`` is."""
    n: int
    """Questions that both answered."""
    detectable: float | None
    """The smallest true difference that this many questions show in 80 % of cases, at this ``alpha``; None where
    ``interval`` is."""

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "interval": None if self.interval is None else list(self.interval)}


def paired_difference(
    first_N: Sequence[float], second_N: Sequence[float], clusters_N: Sequence[Any] | None = None, *, alpha: float = 0.05
) -> PairedDifference | None:
    """The mean of the differences between two models' scores, question by question; None for fewer than two questions.

    Scores of 0 and 1 are counts of the questions that one of the two alone gets right: p is McNemar's exact one, and
    the interval is Bonett and Price's (2012), a Wald interval after one more question of either kind, which never has a
    width of 0. Other scores have Student's interval and p. Questions of one of the ``clusters_N``, such as a template,
    are not independent: then the error is that over clusters, for scores of all kinds, and of 0 and 1 it is no smaller
    than Bonett and Price's. Other scores that all differ by the same number have no error, and so no interval and no p.

    ``detectable`` is ``(z_(1 - alpha / 2) + z_0.8)`` standard errors, as in Miller (arXiv 2411.00640, section 5).
    """
    first, second = np.asarray(first_N, dtype=float), np.asarray(second_N, dtype=float)
    n, change_N = len(first), second - first
    if n < 2:
        return None
    names, cluster_N = np.unique([str(name) for name in clusters_N or ()], return_inverse=True)
    has_clusters = 1 < len(names) < n
    quantile = float(stats.norm.isf(alpha / 2))
    middle = float(change_N.mean())
    is_right_or_wrong = np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()
    gained, lost = int((change_N > 0).sum()), int((change_N < 0).sum())
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    stderr, centre = math.sqrt((up + down - (up - down) ** 2) / (n + 2)), up - down
    interval: tuple[float, float]
    if is_right_or_wrong and not has_clusters:
        p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
        interval = max(centre - quantile * stderr, -1.0), min(centre + quantile * stderr, 1.0)
    else:
        if not has_clusters:
            names, cluster_N = np.arange(n), np.arange(n)
        _, error = ratio(np.bincount(cluster_N, change_N), np.bincount(cluster_N))
        stderr, freedom = max(float(error), stderr if is_right_or_wrong else 0.0), len(names) - 1
        if stderr <= 1e-12 * abs(change_N).max():  # 0 except for rounding
            return PairedDifference(float(first.mean()), float(second.mean()), middle, None, None, n, None)
        far = float(stats.t.isf(alpha / 2, freedom))
        interval = middle - far * stderr, middle + far * stderr
        if is_right_or_wrong:
            interval = max(interval[0], -1.0), min(interval[1], 1.0)
        p = float(2 * stats.t.sf(abs(middle) / stderr, freedom))
    detectable = (quantile + float(stats.norm.ppf(POWER))) * stderr
    return PairedDifference(float(first.mean()), float(second.mean()), middle, interval, p, n, detectable)
