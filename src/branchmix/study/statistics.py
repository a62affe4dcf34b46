"""What can be told apart: paired differences between models, over documents and over repetitions.

With two or more repetitions an interval is Student's over the repetitions' paired differences: it contains what random
seeds do. With one there is only the error over held-out documents, which does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from branchmix.evaluate.ratio import ratio

Documents = Mapping[str, Sequence[Sequence[float]]]
"""By domain, ``[nats, predicted tokens, bytes]`` of each document."""
LEVEL = 0.95
SEED_NOISE = 0.02
"""With one repetition, differences up to this are called none: an allowance for the random seed, not measured."""


@dataclass(frozen=True)
class Difference:
    """Of two models on the same documents, in nats a token."""

    value: float
    stderr: float


def difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Difference:
    """Mean difference of two models' loss on a domain, and its standard error over documents.

    Paired: what makes a document hard for both takes no part in it. The error is infinite for a single document.
    """
    pairs = [(a[0] - b[0], a[1]) for a, b in zip(ours, theirs, strict=True) if a[1]]
    value, stderr = ratio(pairs)
    return Difference(value, math.inf if stderr is None else stderr)


def log_perplexity(documents: Documents) -> dict[str, float]:
    """Nats a token of each domain."""
    return {
        domain: math.fsum(row[0] for row in rows) / sum(row[1] for row in rows) for domain, rows in documents.items()
    }


@dataclass(frozen=True)
class Interval:
    """A mean with what it may be off by."""

    value: float
    half_width: float | None
    """Of the 95 % interval; None where nothing is known of it."""
    n: int
    """Values it is the mean of."""

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side."""
        return self.half_width is not None and abs(self.value) > self.half_width

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"value": self.value, "half_width": self.half_width, "n": self.n}


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean of independent values, and half the width of Student's interval for it; None for a single one."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, n)
    from scipy import stats

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Interval(mean, float(stats.t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n), n)


@dataclass(frozen=True)
class Comparison:
    """Of one model with another: differences of log perplexity, so that negative is better."""

    mean: Interval
    """Of the mean over domains: of the logarithm of perplexities' geometric mean."""
    by_domain: dict[str, Interval]
    repetitions: list[float]
    """Of the mean, one by one."""
    over: str
    """``repetitions`` or ``documents``: what the intervals are over."""

    @property
    def significant(self) -> bool:
        """Whether the interval excludes no difference; with one repetition, a difference that no seed would make."""
        return self.mean.excludes_zero and (self.over == "repetitions" or abs(self.mean.value) > SEED_NOISE)

    @property
    def relative(self) -> float:
        """Relative difference of the geometric means of perplexity."""
        return math.expm1(self.mean.value)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "relative": self.relative,
            "log_perplexity": self.mean.as_dict(),
            "by_domain": {domain: interval.as_dict() for domain, interval in self.by_domain.items()},
            "repetitions": self.repetitions,
            "over": self.over,
            "significant": self.significant,
        }


def compare(ours: Sequence[Documents], theirs: Sequence[Documents]) -> Comparison:
    """Two models in the same repetitions, on the same documents.

    Args:
        ours: of each repetition.
        theirs: the same repetitions, in the same order.
    """
    domains = list(ours[0])
    if len(ours) == 1:
        errors = {domain: difference(ours[0][domain], theirs[0][domain]) for domain in domains}
        half = _twice(math.sqrt(math.fsum(error.stderr**2 for error in errors.values())) / len(domains))
        value = math.fsum(error.value for error in errors.values()) / len(domains)
        by_domain = {domain: Interval(error.value, _twice(error.stderr), 1) for domain, error in errors.items()}
        return Comparison(Interval(value, half, 1), by_domain, [value], "documents")
    pairs = [(log_perplexity(a), log_perplexity(b)) for a, b in zip(ours, theirs, strict=True)]
    by_domain = {domain: t_interval([a[domain] - b[domain] for a, b in pairs]) for domain in domains}
    means = [math.fsum(a[domain] - b[domain] for domain in domains) / len(domains) for a, b in pairs]
    return Comparison(t_interval(means), by_domain, means, "repetitions")


def _twice(stderr: float) -> float | None:
    return 2 * stderr if math.isfinite(stderr) else None
