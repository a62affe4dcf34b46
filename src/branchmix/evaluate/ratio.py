"""A ratio of sums over independent documents, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Iterable


def ratio(pairs: Iterable[tuple[float, float]]) -> tuple[float, float | None]:
    """``sum(a) / sum(b)`` of pairs ``(a, b)``, such as bits and bytes of documents, and its standard error.

    The error is that of the delta method: ``sqrt(n / (n - 1) * sum_i (a_i - R b_i)^2) / sum_i b_i``; None for a single
    pair.
    """
    pairs = list(pairs)
    count, size = len(pairs), math.fsum(b for _, b in pairs)
    value = math.fsum(a for a, _ in pairs) / size
    if count < 2:
        return value, None
    squares = math.fsum((a - value * b) ** 2 for a, b in pairs)
    return value, math.sqrt(count / (count - 1) * squares) / size
