"""What a curve that only rises or only falls looks like: does it jump, saturate, or sit on a floor or a ceiling?

Letters as in ``order``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from branchmix.scaling.trends.fit import Curve, percentiles
from branchmix.scaling.trends.order import Interval, about, climb, flattest, weights, wide_noise

_MUCH_CALMER = 0.25
"""Jitter variance about a monotone fit over that about a quadratic: below this it is no luck, the quadratic misfits."""
_LEVEL_SHARE = 0.1
"""The most that a plateau may hold of the whole change in the fit."""
_LEVEL_LENGTH, _LEVEL_SIZES = 0.25, 3
"""The least that a plateau covers, in shares of the axis and in sizes."""
_LEVEL_SLOPE = 2 / 3
"""How steep a plateau may be in draws, where a straight line from end to end has 1."""


def form(curve: Curve, *, rises: bool, alpha: float) -> tuple[float, Interval, dict[str, dict[str, Any]]]:
    """What the best monotone fit changes by from end to end, with the interval, and what else there is to say of it.

    Each part is there only if all but ``alpha`` of the draws agree on it. ``jump`` is a step between two neighbouring
    sizes, of more than half of the change, and more than twice what a straight line would have there. ``level_until``
    and ``level_from`` are plateaus at the small and at the large end, with the interval of their mean; they hold at
    most a tenth of the change in the fit, and in the draws at most two thirds of what a straight line would.
    Jitter is here what scatters about the monotone fit, where that is less: a jump is far off every quadratic.
    """
    sign, weight_K = (1 if rises else -1), weights(curve)
    calmer = _calmer(curve, sign * flattest(sign * curve.y_K, weight_K))
    best_K = sign * climb(sign * curve.y_K[None], weight_K).fit_NK[0]
    y_NK = np.vstack([best_K, best_K + wide_noise(curve, calmer)])
    fit_NK = sign * climb(sign * y_NK, weight_K).fit_NK
    range_N = fit_NK[:, -1] - fit_NK[:, 0]
    share_NK = (fit_NK - fit_NK[:, :1]) / np.where(range_N == 0, 1, range_N)[:, None]
    along_K = (curve.x_K - curve.x_K[0]) / curve.span
    steps_NK = np.diff(share_NK, axis=1)
    step = int(steps_NK[0].argmax())

    def change_of(change_N: np.ndarray) -> tuple[float, Interval]:
        """With its interval. The direction is what the trend's test has established; the interval is about the size."""
        low, high = about(float(change_N[0]), change_N[1:], alpha)
        return float(change_N[0]), (max(low, 0.0), high) if rises else (low, min(high, 0.0))

    levels = {
        "level_until": _level(curve, y_NK, share_NK, along_K, alpha=alpha),
        "level_from": _level(curve, y_NK, 1 - share_NK, 1 - along_K, alpha=alpha),
    }
    parts = {name: level for name, level in levels.items() if level is not None}
    if np.quantile(steps_NK[1:, step], alpha) > max(0.5, 2 * (along_K[step + 1] - along_K[step])):
        start, end = (10 ** float(x) for x in curve.x_K[step : step + 2])
        change, interval = change_of(fit_NK[:, step + 1] - fit_NK[:, step])
        parts["jump"] = {"from": start, "to": end, "effect": change, "interval": list(interval)}
    return *change_of(range_N), parts


def _calmer(curve: Curve, fit_K: np.ndarray) -> float:
    """How much smaller the jitter about a monotone fit is than about a quadratic; 1 unless it is much smaller.

    A monotone fit of so many blocks uses up about 1.5 degrees of freedom for each (Meyer and Woodroofe 2000).
    """
    free = curve.sizes - 1.5 * len(np.unique(fit_K))
    jitter = float(np.mean(curve.jitter_K))
    if free < 1 or jitter == 0:
        return 1.0
    excess = float(np.sum((curve.y_K - fit_K) ** 2)) / free - float(np.mean(np.diag(curve.sampling_KK)))
    ratio = max(excess / jitter, 0.0)
    return float(np.sqrt(ratio)) if ratio < _MUCH_CALMER else 1.0


def _level(
    curve: Curve, y_NK: np.ndarray, share_NK: np.ndarray, along_K: np.ndarray, *, alpha: float
) -> dict[str, Any] | None:
    """The plateau at the end at which ``along_K`` is 0, if there is one; ``share_NK`` is the change since that end."""
    members = np.flatnonzero(share_NK[0] <= _LEVEL_SHARE)
    edge = members[along_K[members].argmax()]
    length = along_K[edge]
    if len(members) < _LEVEL_SIZES or length < _LEVEL_LENGTH:
        return None
    if np.quantile(share_NK[1:, edge], 1 - alpha) > _LEVEL_SLOPE * length:
        return None
    weight_K = weights(curve)[members]
    mean_N = y_NK[:, members] @ weight_K / weight_K.sum()
    interval = list(percentiles(mean_N[1:], alpha))
    return {"axis": 10 ** float(curve.x_K[edge]), "value": float(mean_N[0]), "interval": interval}
