"""Which differences are significant: paired differences between models, over documents and over repetitions.

With two or more repetitions an interval is Student's over the repetitions' paired differences: it contains what random
seeds do. With one there is only the error over held-out documents, which does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from branchmix.evaluate.ratio import ratio

Documents = Mapping[str, Sequence[Sequence[float]]]
"""By domain, ``[nats, predicted tokens, bytes]`` of each document."""
LEVEL = 0.95
SEED_NOISE = 0.02
"""With one repetition, smaller differences are not significant: an allowance for the random seed, not measured."""


def mean(values: Sequence[float]) -> float:
    """Their mean, summed exactly."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; None for a single value."""
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


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
    """Half the width of the 95 % interval; None where nothing is known of it."""
    n: int
    """Values it is the mean of."""

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side."""
        return self.half_width is not None and abs(self.value) > self.half_width

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values with Student's interval for it, which is unknown for a single one."""
    n, spread = len(values), deviation(values)
    if spread is None:
        return Interval(mean(values), None, n)
    from scipy import stats

    return Interval(mean(values), float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * spread / math.sqrt(n), n)


def difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Interval:
    """Mean difference of two models' loss on a domain, in nats a token, with twice its standard error over documents.

    Paired: what makes a document hard for both takes no part in it. The error of a single document is unknown.
    """
    pairs = [(a[0] - b[0], a[1]) for a, b in zip(ours, theirs, strict=True) if a[1]]
    value, stderr = ratio(*zip(*pairs, strict=True))
    return Interval(float(value), None if stderr is None else 2 * float(stderr), 1)


@dataclass(frozen=True)
class Comparison:
    """How one model differs from another: differences of log perplexity, so that negative is better."""

    mean: Interval
    """Mean over domains: difference of the logarithms of perplexities' geometric means."""
    by_domain: dict[str, Interval]
    repetitions: list[float]
    """The mean over domains of each repetition."""
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
        return {
            "relative": self.relative,
            "log_perplexity": self.mean.as_dict(),
            "by_domain": {domain: interval.as_dict() for domain, interval in self.by_domain.items()},
            "repetitions": self.repetitions,
            "over": self.over,
            "significant": self.significant,
        }


def compare(ours: Sequence[Documents], theirs: Sequence[Documents]) -> Comparison:
    """Two models on the same documents, in the same repetitions in the same order."""
    domains = list(ours[0])
    if len(ours) == 1:
        by_domain = {domain: difference(ours[0][domain], theirs[0][domain]) for domain in domains}
        value = mean([interval.value for interval in by_domain.values()])
        widths = [interval.half_width for interval in by_domain.values()]
        known = [width for width in widths if width is not None]
        half = math.sqrt(math.fsum(w**2 for w in known)) / len(domains) if len(known) == len(widths) else None
        return Comparison(Interval(value, half, 1), by_domain, [value], "documents")
    pairs = [(log_perplexity(a), log_perplexity(b)) for a, b in zip(ours, theirs, strict=True)]
    by_domain = {domain: t_interval([a[domain] - b[domain] for a, b in pairs]) for domain in domains}
    means = [mean([a[domain] - b[domain] for domain in domains]) for a, b in pairs]
    return Comparison(t_interval(means), by_domain, means, "repetitions")
