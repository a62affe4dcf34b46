"""Order-restricted tests: does a curve rise or fall, does it turn, and what does the change look like?

Letters: K sizes, B bootstrap draws, N curves at once, S splits between neighbouring sizes. Every fit here is a weighted
isotonic regression: it uses only the order of the sizes, so it follows a plateau, a floor or a jump as well as a
straight line. A parabola cannot, and bends.

- Trend: the best monotone fit against a constant (the E-bar-squared test of Barlow, Bartholomew, Bremner and Brunk
  1972). The statistic is a ratio of sums of squares, so an unknown jitter cancels, and p has a closed form.
- Turn: the best unimodal fit against the best monotone one by likelihood ratio, with a parametric bootstrap under the
  monotone curve that turns most easily. Each draw searches its own turning point, which is how the choice of the
  turning point is paid for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from branchmix.scaling.trends.fit import Curve, chi_squares, percentiles, smooth_variance, squares_about

Interval = tuple[float, float]
_ROUNDING = 1e-9
"""Relative difference of sums of squares that is rounding and nothing else."""
_STEP_COST = 2.0
"""What a step of a monotone fit must explain to be kept, in variances: what it costs by Akaike's criterion."""
_CAUTION = 2.0
"""The p of a turn is multiplied by 1 + this over the degrees of freedom behind the jitter. The bootstrap takes all
models for equally variable. Near 0 or 1, where shares are cut off, they are not: without the factor, 7 to 8 % of the
curves that rise to a ceiling turned at 5 sizes, 100 examples and a jitter of 0.08."""
_BATCH, _ENOUGH_HITS = 250, 50
"""Draws at a time, and how many with as large a gain show that p is not small (Besag and Clifford 1991)."""
_MUCH_CALMER = 0.25
"""Jitter variance about a monotone fit over that about a quadratic: below this it is no luck, the quadratic misfits."""
_LEVEL_SHARE = 0.1
"""The most that a plateau may hold of the whole change in the fit."""
_LEVEL_LENGTH, _LEVEL_SIZES = 0.25, 3
"""The least that a plateau covers, in shares of the axis and in sizes."""
_LEVEL_SLOPE = 2 / 3
"""How steep a plateau may be in draws, where a straight line from end to end has 1."""


# ---- isotonic regression of many curves at once ----


class Climb(NamedTuple):
    """Nondecreasing weighted fits to curves."""

    fit_NK: np.ndarray
    squares_NK: np.ndarray
    """Weighted sums of the squared fits to the first 1, 2, ..., K sizes alone."""


def climb(y_NK: np.ndarray, weight_K: np.ndarray) -> Climb:
    """Isotonic regression of all curves at once.

    The last block of a fit is the one of largest mean among those that end at the last size, and what is left of it is
    the fit to the sizes before.
    """
    num_curves, num_sizes = y_NK.shape
    every = np.arange(num_curves)
    sum_KN, weight = np.zeros((num_sizes + 1, num_curves)), np.concatenate([[0.0], np.cumsum(weight_K)])
    np.cumsum((y_NK * weight_K).T, axis=0, out=sum_KN[1:])
    squares_KN, last_KN = np.zeros((num_sizes + 1, num_curves)), np.empty((num_sizes, num_curves))
    start_KN = np.empty((num_sizes, num_curves), dtype=int)
    for end in range(1, num_sizes + 1):
        weight_S = weight[end] - weight[:end]
        mean_SN = (sum_KN[end] - sum_KN[:end]) / weight_S[:, None]
        start_KN[end - 1] = start_N = mean_SN.argmax(0)
        last_KN[end - 1] = last_N = mean_SN[start_N, every]
        squares_KN[end] = squares_KN[start_N, every] + weight_S[start_N] * last_N**2
    fit_KN, end_N = np.empty_like(last_KN), np.full(num_curves, num_sizes - 1)
    for size in reversed(range(num_sizes)):
        fit_KN[size] = last_KN[end_N, every]
        end_N = np.where(start_KN[end_N, every] == size, size - 1, end_N)
    return Climb(fit_KN.T, squares_KN[1:].T)


def _turned(y_NK: np.ndarray, weight_K: np.ndarray, split: int) -> np.ndarray:
    """[N, K], the best fits that rise up to a split and fall beyond it; either neighbour may be the turning point."""
    rise = climb(y_NK[:, : split + 1], weight_K[: split + 1])
    fall = climb(y_NK[:, :split:-1], weight_K[:split:-1])
    return np.hstack([rise.fit_NK, fall.fit_NK[:, ::-1]])


def _turned_squares(y_NK: np.ndarray, weight_K: np.ndarray) -> np.ndarray:
    """[N, K], weighted sums of the squares of fits that rise over the first 1, 2, ..., K sizes and fall over the rest;
    the last one only rises."""
    fall_NK = climb(y_NK[:, ::-1], weight_K[::-1]).squares_NK
    rest_NK = np.hstack([fall_NK[:, -2::-1], np.zeros((len(y_NK), 1))])
    return np.asarray(climb(y_NK, weight_K).squares_NK + rest_NK)


def turn_gain(y_NK: np.ndarray, weight_K: np.ndarray) -> np.ndarray:
    """[N], the squares that a turn, up or down, explains beyond both monotone fits."""
    y_NK = y_NK - (y_NK @ weight_K / weight_K.sum())[:, None]
    squares_NK = np.maximum(_turned_squares(y_NK, weight_K), _turned_squares(-y_NK, weight_K))
    turned_N = squares_NK[:, :-1].max(1)
    gain_N = turned_N - squares_NK[:, -1]
    return np.where(gain_N > _ROUNDING * turned_N, gain_N, 0.0)


def flattest(y_K: np.ndarray, weight_K: np.ndarray) -> np.ndarray:
    """The nondecreasing fit with as few steps as the data allow.

    The best fit follows the noise of a plateau upwards, and too little scatters about it. So neighbouring blocks are
    merged while that costs less than ``_STEP_COST`` variances, the cheapest first. The variance is what scatters about
    the fit, if that is more than the weights say.
    """
    fit_K = climb(y_K[None], weight_K).fit_NK[0]
    ends = [*(np.flatnonzero(np.diff(fit_K)) + 1), len(fit_K)]
    while True:
        starts = np.array([0, *ends[:-1]])
        weight = np.add.reduceat(weight_K, starts)
        mean = np.add.reduceat(weight_K * y_K, starts) / weight
        fit_K = np.repeat(mean, np.diff([0, *ends]))
        if len(ends) == 1:
            return fit_K
        costs = np.diff(mean) ** 2 * weight[:-1] * weight[1:] / (weight[:-1] + weight[1:])
        cheapest = int(costs.argmin())
        scatter = float(weight_K @ (y_K - fit_K) ** 2) / max(1, len(y_K) - len(ends))
        if costs[cheapest] >= _STEP_COST * max(1.0, scatter):
            return fit_K
        del ends[cheapest]


# ---- monotone or not ----


def weights(curve: Curve) -> np.ndarray:
    """[K], one over the variance of each average, without what all sizes share."""
    return 1 / (curve.own_K + curve.jitter_K)


@dataclass(frozen=True)
class Trend:
    """Whether the curve goes up or down, and by how much over the whole axis."""

    p: float
    move: float
    """From end to end of the best monotone fit."""
    change: float
    """From the smallest size to the largest, as in the data."""
    interval: Interval
    """The interval of ``change``."""


def trend(curve: Curve, *, alpha: float) -> Trend:
    """The best monotone fit, up or down, against a constant.

    The share of the squares about the mean that the fit explains has a closed form on curves that are flat except for
    their errors. Where several runs of a size tell how much models differ, their squares join the denominator.
    """
    weight_K = weights(curve)
    y_K = curve.y_K - curve.y_K @ weight_K / weight_K.sum()
    fits = climb(np.stack([y_K, -y_K]), weight_K)
    explained = fits.squares_NK[:, -1]
    total = float(y_K**2 @ weight_K) + curve.within
    share = float(explained.max()) / total if total > 0 else 0.0
    rise, fall = np.ptp(fits.fit_NK, axis=1)
    noise_BK = wide_noise(curve)
    return Trend(
        p=min(1.0, 2 * e_bar_squared_tail(share, curve.sizes, curve.within)),
        move=float(rise if explained[0] >= explained[1] else -fall),
        change=float(y_K[-1] - y_K[0]),
        interval=percentiles(y_K[-1] - y_K[0] + noise_BK[:, -1] - noise_BK[:, 0], alpha),
    )


def is_flat(curve: Curve, *, alpha: float, least: float) -> bool:
    """Whether every change between two sizes, the rise and the fall alike, is surely smaller than ``least``."""
    y_BK = curve.y_K + wide_noise(curve)
    if np.quantile(np.abs(y_BK[:, -1] - y_BK[:, 0]), 1 - alpha) >= least:
        return False  # the best monotone fits go at least as far
    fits = climb(np.concatenate([y_BK, -y_BK]), weights(curve))
    move_2B = np.ptp(fits.fit_NK, axis=1).reshape(2, -1)
    return bool(np.quantile(move_2B.max(0), 1 - alpha) < least)


def e_bar_squared_tail(share: float, sizes: int, within: int = 0) -> float:
    """How often a nondecreasing fit explains that share of the squares of a flat curve, or more.

    A mixture of beta distributions over the number of blocks in the fit (Barlow and others 1972). The
    chances of each number are those for equal weights, Stirling numbers over K!; unequal ones change p little
    (Robertson, Wright and Dykstra 1988), and flat curves have nearly equal ones.
    """
    chances = np.ones(1)
    for size in range(2, sizes + 1):
        chances = np.convolve(chances, [size - 1, 1]) / size
    if share <= _ROUNDING:
        return 1.0
    steps = np.arange(1, sizes)
    left = sizes - 1 - steps + within
    return float(
        chances[1:] @ np.where(left, special.betaincc(steps / 2, np.maximum(left, 1) / 2, min(share, 1.0)), 1.0)
    )


@dataclass(frozen=True)
class Turn:
    """The best unimodal fit, and whether each of its legs is more than chance."""

    p: float
    """Under the least favourable monotone curve; 1 if a leg is too short to be tested."""
    is_u: bool
    """Down, then up."""
    turning: float
    """The size at which the fit turns."""
    changes: list[float]
    """From the smallest size to the turning point, from there to the largest, and both together."""
    intervals: list[Interval]
    """An interval for each change; a point if the turn is not sure."""


def turn(curve: Curve, *, alpha: float, least: float) -> Turn:
    """Unimodal against monotone regression; a turn with a leg of no more than ``least`` is not tested (p = 1).

    The statistic is what the turn explains beyond a nondecreasing and beyond a nonincreasing fit, the smaller of the
    two, over the variance about a smooth curve. Without the fall a nondecreasing fit is as good, without the rise a
    nonincreasing one; so a curve that bends without turning has a statistic of 0, however precise its values are. p
    is from a parametric bootstrap under the monotone curve that turns most easily by chance. Two lines with Simonsohn's
    Robin Hood break were tried too: a line is as wrong about a bend as a parabola (docs/verdicts.md has the numbers).
    """
    weight_K = weights(curve)
    turns, dips = (_turned_squares(sign * curve.y_K[None], weight_K)[0, :-1] for sign in (1, -1))
    is_u = bool(dips.max() > turns.max())
    sign, split = (-1, int(dips.argmax())) if is_u else (1, int(turns.argmax()))
    fit_K = _turned(sign * curve.y_K[None], weight_K, split)[0]
    place = int(fit_K.argmax())
    first, second = (sign * float(fit_K[place] - fit_K[0]), sign * float(fit_K[-1] - fit_K[place]))
    p = _turn_p(curve, weight_K, (first, second)) if min(abs(first), abs(second)) > least else 1.0
    changes = [first, second, first + second]
    intervals: list[Interval] = [(change, change) for change in changes]
    if p < alpha:
        drawn_BK = _turned(fit_K + sign * wide_noise(curve), weight_K, split)
        first_B, peak_B, last_B = (sign * end_B for end_B in (drawn_BK[:, 0], drawn_BK.max(1), drawn_BK[:, -1]))
        draws = (peak_B - first_B, last_B - peak_B, last_B - first_B)
        intervals = [about(change, draws_B, alpha) for change, draws_B in zip(changes, draws, strict=True)]
    return Turn(p, is_u, float(curve.places_K[place]), changes, intervals)


def _turn_p(curve: Curve, weight_K: np.ndarray, legs: Interval) -> float:
    """How often the least favourable monotone curve gains as much by a turn, over its variance about a smooth curve.

    It has the direction of the longer leg, and its plateau is where the shorter one is. No variance counts as smaller
    than what examples alone cause. Their share of all scatter depends on the jitter, which looks small if a turn lies
    close to a quadratic by chance; so the share is taken of the scatter about a monotone fit, if that is more.
    """
    (gain,) = turn_gain(curve.y_K[None], weight_K)
    if gain == 0:
        return 1.0
    is_first_longer = abs(legs[0]) > abs(legs[1])
    sign = np.sign(legs[0] if is_first_longer else legs[1])
    fit_K = sign * flattest(sign * curve.y_K, weight_K)
    free = curve.sizes - len(np.unique(fit_K)) + curve.within
    scale = max(1.0, (float(squares_about(curve, curve.y_K - fit_K)) + curve.within) / free)

    noise_BK = curve.draws_BK - curve.y_K
    scatter = float(noise_BK.var(1, ddof=1).mean())
    known = float(curve.sampling_BK.var(1, ddof=1).mean()) / scatter
    null_K = np.sqrt(scatter) * least_favourable(curve.sizes)
    y_BK = noise_BK + (sign * null_K if is_first_longer else -sign * null_K[::-1])
    within_B = chi_squares(1, curve.within, len(y_BK))
    variance = max(smooth_variance(curve, curve.y_K[None], np.array([curve.within]))[0], known)
    hits = drawn = 0
    while drawn < len(y_BK) and hits < _ENOUGH_HITS:
        part = slice(drawn, drawn + _BATCH)
        variance_B = np.maximum(smooth_variance(curve, y_BK[part], within_B[part]), known / scale)
        hits += int(np.sum(turn_gain(y_BK[part], weight_K) >= gain / variance * variance_B))
        drawn += len(variance_B)
    caution = 1 + _CAUTION / (curve.sizes - 3 + curve.within)
    return min(1.0, caution * (1 + hits) / (1 + drawn))


def least_favourable(sizes: int) -> np.ndarray:
    """[K], in standard deviations: of the monotone curves, the one that turns most easily by chance.

    A rise of three over the first quarter of the sizes, then a plateau. A larger rise is off every smooth curve, which
    raises the variance; a smaller rise or a shorter plateau makes a leg by chance less likely. A simulation of jumps
    and ramps of all lengths and heights at 5 to 12 sizes led to it; a test repeats that.
    """
    return 3 * np.minimum(np.arange(sizes) / max(1, round((sizes - 1) / 4)), 1)


def about(value: float, draws_B: np.ndarray, alpha: float) -> Interval:
    """The basic bootstrap interval from draws about a fit, which corrects for isotonic fits that end too far out."""
    low, high = percentiles(draws_B, alpha)
    return 2 * value - high, 2 * value - low


def wide_noise(curve: Curve, calmer: float = 1.0) -> np.ndarray:
    """[B, K], noise for intervals: the jitter too is drawn anew, as it is known with few degrees of freedom."""
    jitter_BK = curve.draws_BK - curve.y_K - curve.sampling_BK
    if curve.degrees:
        squares_B = chi_squares(2, curve.degrees, len(jitter_BK))
        jitter_BK = jitter_BK * np.sqrt(curve.degrees / squares_B)[:, None]
    return curve.sampling_BK + calmer * jitter_BK


# ---- what a curve that only rises or only falls looks like: jumps, ceilings, floors ----


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
    along_K = (curve.x_K - curve.x_K[0]) / np.ptp(curve.x_K)
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
        start, end = (float(place) for place in curve.places_K[step : step + 2])
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
    return {"axis": float(curve.places_K[edge]), "value": float(mean_N[0]), "interval": interval}
