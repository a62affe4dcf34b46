"""A ratio of sums over independent documents, with its standard error. Shapes: N documents, X any further axes."""

from __future__ import annotations

from typing import Any

import numpy as np


def ratio(a_NX: Any, b_N: Any) -> tuple[Any, Any]:
    """``sum_i a_i / sum_i b_i``, such as of the bits and bytes of documents, and its standard error.

    The error is that of the delta method: ``sqrt(n / (n - 1) * sum_i (a_i - R b_i)^2) / sum_i b_i``; None for a single
    document.
    """
    a_NX, b_N = np.asarray(a_NX, dtype=np.float64), np.asarray(b_N, dtype=np.float64)
    count, size = len(b_N), b_N.sum()
    value_X = a_NX.sum(0) / size
    if count < 2:
        return value_X, None
    squares_X = ((a_NX - np.multiply.outer(b_N, value_X)) ** 2).sum(0)
    return value_X, np.sqrt(count / (count - 1) * squares_X) / size
