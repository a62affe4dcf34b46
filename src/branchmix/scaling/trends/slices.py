"""Questions by difficulty: curves of the hardest, ..., the easiest of them, so that opposite trends do not cancel.

Hard questions that are U-shaped and easy ones that are inverted-U add up to a flat curve (arXiv 2410.01692). Difficulty
is given with the questions, or is had from the runs themselves. Then it is cross-fitted: a run's slices come from the
other half of the runs. A run that sorted its own questions would put its bad luck among the hard ones and its good luck
among the easy ones, and the next run, without either, would look like a trend.

Letters: N runs, X questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import stats

from branchmix.scaling.trends.fit import NUM_DRAWS
from branchmix.scaling.trends.series import Series, deviations_of
from branchmix.scaling.trends.table import ResultsTable, Scores, is_share

MOST_SLICES = 5
_LEAST_QUESTIONS = 20
"""Fewer in a slice are no basis for an interval."""
_DIFFICULTY = "difficulty"
"""Field of the scores of examples: any number that is greater for harder questions."""
ALL = "all questions"


def with_slices(table: ResultsTable, series: Sequence[Series], axis: str, count: int, notes: list[str]) -> list[Series]:
    """Each curve, and its slices by difficulty where all runs have scores of single examples."""
    found: list[Series] = []
    for one in series:
        slices = _slices(table, one, axis, count, notes)
        found += [replace(one, family=_name(one, ALL), group=one.family, slice=ALL), *slices] if slices else [one]
    return found


def _slices(table: ResultsTable, one: Series, axis: str, count: int, notes: list[str]) -> list[Series]:
    what = f"{one.task}, {one.metric}"
    read = [table.scores(row) if table.scores is not None else None for row in one.rows]
    scores = [own for own in read if own is not None]
    if one.deviations_BN is None or len(scores) < len(one.rows):
        notes.append(f"{what}: no slices by difficulty, for models have no scores of single examples in common")
        return []
    keys = sorted(set.intersection(*map(set, scores)))
    if len(keys) < count * _LEAST_QUESTIONS:
        notes.append(f"{what}: {len(keys)} questions are too few for {count} slices of {_LEAST_QUESTIONS} or more")
        return []
    values_NX = np.array([[own[key][0] for key in keys] for own in scores])
    given_X = _given(table, one, keys)
    if given_X is not None:
        slice_NX = np.tile(_cut(given_X, count, tied=True), (len(scores), 1))
    else:
        if len(set(halves(one.x(axis)))) < 2:
            notes.append(
                f"{what}: no slices by difficulty: that takes two runs at least, or a difficulty that is given"
            )
            return []
        hard_NX = values_NX if one.lower_is_better else -values_NX
        slice_NX = cross_fitted(hard_NX, one.x(axis), count)
    clusters = [scores[0][key][1] for key in keys]
    slices = []
    for number, name in enumerate(names_of(count)):
        member_NX = slice_NX == number
        if member_NX.sum(1).min() < _LEAST_QUESTIONS:
            notes.append(f"{what}: the {name} has {member_NX.sum(1).min()} questions, too few: left out")
            continue
        slices.append(_slice(one, name, values_NX, member_NX, clusters))
    return slices


def _given(table: ResultsTable, one: Series, keys: Sequence[str]) -> np.ndarray | None:
    """The difficulty beside the scores of the first run that has it for all questions."""
    assert table.scores is not None
    for row in one.rows:
        told: Scores = table.scores(row.model_copy(update={"metric": _DIFFICULTY})) or {}
        if all(key in told for key in keys):
            return np.array([told[key][0] for key in keys])
    return None


def halves(x_N: np.ndarray) -> np.ndarray:
    """[N], 0 or 1: two halves of the runs that are alike in size.

    Where every size has two runs or more, each half has some of every size. Else sizes alternate as 0 1 1 0 0 1 1 0, so
    that a trend of single questions along the axis does not make a question look harder to one half than to the other.
    """
    places, place_N = np.unique(np.round(x_N, 6), return_inverse=True)
    if np.bincount(place_N).min() >= 2:
        return np.array([np.sum(place_N[:number] == place) % 2 for number, place in enumerate(place_N)])
    half_K = np.array([(number + 1) // 2 % 2 for number in range(len(places))])
    return np.asarray(half_K[place_N])


def cross_fitted(hard_NX: np.ndarray, x_N: np.ndarray, count: int) -> np.ndarray:
    """[N, X], the slice of each run's questions, 0 for the hardest, by the answers of the other half of the runs.

    Both halves sort by the same number of runs: fewer sort with more noise, so their hard questions would be less hard,
    and a curve would jump wherever the half changes. A larger half leaves out the runs that take its mean place
    furthest from the other's.

    Args:
        hard_NX: [N, X], greater where a run did worse.
        x_N: [N], places on the axis.
        count: number of slices.
    """
    half_N = halves(x_N)
    sorters = [list(np.flatnonzero(half_N == half)) for half in (0, 1)]
    fewer, more = sorted(sorters, key=len)
    while len(more) > len(fewer):
        sums, middle = sum(x_N[more]), np.mean(x_N[fewer])
        more.remove(min(more, key=lambda run: abs((sums - x_N[run]) / (len(more) - 1) - middle)))
    cut_2X = [_cut(hard_NX[runs].mean(0), count, tied=False) for runs in sorters]
    return np.array([cut_2X[1 - half] for half in half_N])


def _cut(difficulty_X: np.ndarray, count: int, *, tied: bool) -> np.ndarray:
    """[X], the slice of each question, 0 for the hardest. Ties stay together, or are broken at random."""
    if tied:
        rank_X = stats.rankdata(-difficulty_X, "average") - 0.5
    else:
        luck_X = np.random.default_rng(0).random(len(difficulty_X))
        rank_X = np.lexsort((luck_X, -difficulty_X)).argsort().astype(float)
    return np.minimum((count * rank_X / len(difficulty_X)).astype(int), count - 1)


def _slice(one: Series, name: str, values_NX: np.ndarray, member_NX: np.ndarray, clusters: Sequence[str]) -> Series:
    """A curve of some questions, which may be others for each run."""
    deviations_BN, stderr_N = deviations_of(values_NX, member_NX, clusters, num_draws=NUM_DRAWS)
    n_N = member_NX.sum(1)
    mean_N = (values_NX * member_NX).sum(1) / n_N
    for place in np.flatnonzero(stderr_N == 0):  # all right or all wrong: the error is half a question away from that
        inside = (0.5 + mean_N[place] * n_N[place]) / (n_N[place] + 1) if is_share(one.metric) else 0.5
        stderr_N[place] = math.sqrt(inside * (1 - inside) / (n_N[place] - 1))
        noise_B = np.random.default_rng(place).standard_normal(len(deviations_BN))
        deviations_BN[:, place] = stderr_N[place] * noise_B
    rows = [
        row.model_copy(update={"value": float(mean), "n": int(n), "stderr": float(stderr)})
        for row, mean, n, stderr in zip(one.rows, mean_N, n_N, stderr_N, strict=True)
    ]
    return replace(
        one,
        family=_name(one, name),
        group=one.family,
        rows=rows,
        stderr=stderr_N,
        deviations_BN=deviations_BN,
        slice=name,
    )


def _name(one: Series, name: str) -> str:
    return ", ".join(filter(None, [one.family, name]))


def names_of(count: int) -> list[str]:
    """What slices are called, the hardest first."""
    if count == 2:
        return ["harder half", "easier half"]
    if count == 3:
        return ["hardest third", "middle third", "easiest third"]
    part = {4: "quarter", 5: "fifth"}[count]
    middle = {4: ["harder", "easier"], 5: ["harder", "middle", "easier"]}[count]
    return [f"{word} {part}" for word in ("hardest", *middle, "easiest")]
