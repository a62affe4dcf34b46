"""Several curves at once: many tasks, families side by side, official against fresh data, metrics that disagree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
from scipy import stats

from branchmix.scaling.trends.fit import between_variance, percentiles, theil_sen
from branchmix.scaling.trends.series import Series
from branchmix.scaling.trends.table import Row
from branchmix.scaling.trends.verdict import DIRECTED, Evidence, Limits, Verdict

Correction = Literal["bh", "holm", "none"]
CORRECTIONS: tuple[Correction, ...] = ("bh", "holm", "none")
_MIN_TO_COMPARE = 3
"""Sizes that a family needs for a slope with an error."""


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


def judge_together(tasks: Mapping[str, Evidence], *, correction: Correction, limits: Limits) -> dict[str, Verdict]:
    """Verdicts of tasks that were tested side by side: a metric of one family.

    Each task brings one p: that of the shape if the curve turns significantly by itself, else that of the trend. A
    shape that does not survive the correction leaves its place to the trend, and all are corrected again.
    """
    alone = {task: evidence.has_shape() for task, evidence in tasks.items()}
    as_shape = dict(alone)
    testable = [task for task, evidence in tasks.items() if evidence.is_testable]
    while True:
        raw = [tasks[task].p_of(as_shape=as_shape[task]) for task in testable]
        corrected = dict(zip(testable, adjusted([p for p in raw if p is not None], correction), strict=True))
        lost = [
            task
            for task in testable
            if as_shape[task] and corrected[task] >= limits.alpha and tasks[task].trend.p < limits.alpha
        ]
        if not lost:
            break
        for task in lost:
            as_shape[task] = False
    return {
        task: evidence.verdict(corrected.get(task), as_shape=as_shape[task], alone_as_shape=alone[task])
        for task, evidence in tasks.items()
    }


def compare_families(
    first: Series, second: Series, evidence: Mapping[Series, Evidence], *, axis: str, limits: Limits
) -> dict[str, Any] | None:
    """The interaction of family and scale: the difference of Theil-Sen slopes per decade, second minus first.

    The interval is over examples and jitter of both, drawn independently; None where a family has under three sizes.
    Below five it is described, never judged: of families that do not differ, 17 % with three sizes and a jitter of
    0.08 would be told apart, against 1 to 6 % with five or eight (400 simulated pairs each).
    """
    one, other = evidence[first], evidence[second]
    if min(one.curve.sizes, other.curve.sizes) < _MIN_TO_COMPARE:
        return None
    slopes_B, others_B = (theil_sen(c.x_K, np.vstack([c.y_K, c.draws_BK])) for c in (one.curve, other.curve))
    interval = percentiles(others_B[:0:-1] - slopes_B[1:], limits.alpha)
    is_testable = one.is_testable and other.is_testable
    return {
        "families": [first.family, second.family],
        "slopes_per_decade": [float(slopes_B[0]), float(others_B[0])],
        "difference": float(others_B[0] - slopes_B[0]),
        "interval": list(interval),
        "testable": is_testable,
        "differs": is_testable and not interval[0] <= 0 <= interval[1],
        "axis": axis,
    }


def contamination(official: Series, fresh: Series, *, limits: Limits) -> dict[str, Any] | None:
    """How much better models do on the official data than on fresh data of the same kind; None without common models.

    A difference alone proves nothing: fresh questions may be harder. It speaks where a model that cannot have seen the
    official data does not have it. Fresh questions are other questions, so the errors of a model's two results add up.
    The mean over models is a random-effects one, with an interval from t: models may differ in what they have seen.
    """
    sign = -1 if official.lower_is_better else 1
    models, differences, errors = [], [], []
    for name, row, stderr in zip(official.names, official.rows, official.stderr, strict=True):
        other = next((number for number, there in enumerate(fresh.rows) if _is_same_run(row, there)), None)
        if other is not None:
            models.append(name)
            differences.append(float(sign * (row.value - fresh.rows[other].value)))
            errors.append(float(np.hypot(stderr, fresh.stderr[other])))
    if not models:
        return None
    quantile = float(stats.norm.isf(limits.alpha / 2))
    y, e = np.array(differences), np.maximum(errors, 1e-9)
    variance = between_variance(y, np.ones((len(y), 1)), np.diag(e**2))
    weights = 1 / (e**2 + variance)
    mean = float(weights @ y / weights.sum())
    far = float(stats.t.isf(limits.alpha / 2, len(y) - 1)) if len(y) > 1 else quantile
    margin = far / float(np.sqrt(weights.sum()))
    return {
        "difference": mean,
        "interval": [mean - margin, mean + margin],
        "suspected": mean - margin > 0 and mean > limits.minimum_effect,
        "models": {
            model: {"difference": d, "interval": [d - quantile * s, d + quantile * s]}
            for model, d, s in zip(models, differences, errors, strict=True)
        },
    }


def _is_same_run(one: Row, other: Row) -> bool:
    """A name may stand for several places on an axis, such as the checkpoints of one run."""
    same_place = all(one.axes[axis] == other.axes[axis] for axis in one.axes.keys() & other.axes.keys())
    return (one.model, one.seed) == (other.model, other.seed) and same_place


def disagreements(metrics: Mapping[str, Verdict]) -> Iterator[tuple[str, str]]:
    """Pairs of metrics of one task whose verdicts cannot both be the story."""
    for (first, one), (second, other) in combinations(metrics.items(), 2):
        told = {one.label, other.label}
        if len(told) == 2 and told <= {*DIRECTED, "flat"}:
            yield first, second
