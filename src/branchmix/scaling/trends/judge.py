"""``branchmix scaling trends``: read a table, judge every curve, compare families, metrics, axes and kinds of data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from branchmix.likelihood.models import Progress
from branchmix.scaling.tasks import TASKS
from branchmix.scaling.trends.fit import Curve, between_variance, curve, percentiles, theil_sen
from branchmix.scaling.trends.series import (
    Series,
    all_series,
    chosen_metrics,
    flags_of,
    is_lower_better,
    known_metrics,
)
from branchmix.scaling.trends.slices import ALL, with_slices
from branchmix.scaling.trends.table import AXES, DATA, Measurement, ResultsTable, is_share, read_table
from branchmix.scaling.trends.verdict import DIRECTED, Evidence, Label, Limits, Verdict, judge_together
from branchmix.statistics import Correction

_MIN_TO_COMPARE = 3
"""Sizes that a family needs for a slope with an error."""


@dataclass
class Judged:
    """A curve and what was made of it."""

    series: Series
    curve: Curve
    verdict: Verdict


@dataclass(frozen=True)
class Caution:
    """Two verdicts on one curve, or on two metrics of a task, that cannot both be the story."""

    task: str
    who: str
    """Family and kind of data, as far as they need to be named."""
    metric: str
    """The metric, where two axes disagree; empty where two metrics do."""
    first: tuple[str, Label]
    """A metric or an axis, and the verdict by it."""
    second: tuple[str, Label]

    def __str__(self) -> str:
        (one, here), (other, label) = self.first, self.second
        where = f"{self.task} ({self.who})" if self.who else self.task
        if self.metric:
            return f"{where}: {self.metric} is {here} along {one}, but {label} along {other}"
        return f"{where}: by {one} it is {here}, by {other} {label}"


@dataclass
class Report:
    """Verdicts of a table on one axis."""

    axis: str
    limits: Limits
    correction: Correction
    judged: list[Judged]
    interactions: dict[str, dict[str, list[dict[str, Any]]]]
    """By task and metric: families compared in pairs."""
    contamination: dict[str, dict[str, dict[str, Any]]]
    """By task and metric: official minus fresh."""
    cautions: list[Caution]
    notes: list[str]
    is_within: bool = False
    """Whether the axis is one within models, and each curve is of a model."""

    @property
    def warnings(self) -> list[str]:
        return [str(caution) for caution in self.cautions]

    @property
    def parts(self) -> list[tuple[str, str]]:
        """Families and kinds of data, the one with the most sizes first, official before fresh."""
        sizes: dict[tuple[str, str], int] = {}
        for one in self.judged:
            sizes[one.series.part] = max(sizes.get(one.series.part, 0), one.verdict.sizes)
        return sorted(sizes, key=lambda part: (DATA.index(part[1]), -sizes[part]))

    def tasks(self, part: tuple[str, str]) -> dict[str, dict[str, Judged]]:
        """By task and metric."""
        tasks: dict[str, dict[str, Judged]] = {}
        for one in self.judged:
            if one.series.part == part:
                tasks.setdefault(one.series.task, {})[one.series.metric] = one
        return tasks

    def as_dict(self) -> dict[str, Any]:
        """`tasks` holds the first family's verdicts; where there are several, `series` holds those of all."""

        series: list[dict[str, Any]] = []
        for part in self.parts:
            tasks = {
                task: {metric: one.verdict.as_dict() for metric, one in metrics.items()}
                for task, metrics in self.tasks(part).items()
            }
            series.append({"family": part[0], "data": part[1], "tasks": tasks})
        content: dict[str, Any] = {"axis": self.axis, "tasks": series[0]["tasks"]}
        if len(series) > 1:
            content |= {**series[0], "series": series}
        compared = {"interactions": self.interactions, "contamination": self.contamination}
        content |= {name: value for name, value in compared.items() if value}
        content |= vars(self.limits)
        return {**content, "correction": self.correction, "warnings": self.warnings, "notes": self.notes}


def trends_by_axis(
    results: Path | ResultsTable,
    *,
    axis: str | None = None,
    metrics: Sequence[str] = (),
    limits: Limits | None = None,
    correction: Correction = "bh",
    lower_is_better: Sequence[str] = (),
    slices: int = 0,
    tell: Progress | None = None,
) -> list[Report]:
    """Judge every metric of every task of a table, a csv file, or a folder with `results.csv` and scores of examples.

    The first report is along ``axis``: training FLOPs if None, or the first column that has a value for every model.
    Then follow those along every other axis known by name that has a value for every model. With ``slices``, each curve
    is judged for as many slices of the questions by difficulty as well, and all are corrected together.

    Raises:
        DataError, RecipeError: the table cannot be read, or there is no such axis or metric.
    """
    limits = limits or Limits()
    table = results if isinstance(results, ResultsTable) else read_table(results)
    notes = list(table.notes)
    axis = table.choose_axis(axis, notes)
    wanted = chosen_metrics(table, metrics)
    named = (*known_metrics(table, lower_is_better), *table.lower_is_better)
    for metric in wanted:
        if not is_lower_better(metric, named) and not is_share(metric):
            notes.append(f"higher {metric} is taken to be better; if it is not: --lower-is-better {metric}")
            if max(abs(row.value) for row in table.rows if row.metric == metric) > 1:
                notes.append(f"{metric} is not a share of 1: set --minimum-effect to the smallest change that counts")
    series = all_series(table, axis, metrics=wanted, lower_is_better=named, notes=notes)
    notes += _mixed_axes(series, axis, table.axes)
    if slices:
        series = with_slices(table, series, axis, slices, notes)
    others = [name for name in table.axes if name in AXES and name != axis and axis not in table.within]
    pairs = [(name, one) for name in (axis, *others) for one in series if one.has(name)]
    evidence: dict[str, dict[Series, Evidence]] = {}
    for done, (name, one) in enumerate(pairs, start=1):
        evidence.setdefault(name, {})[one] = Evidence(
            curve(
                one.x(name),
                one.y,
                one.stderr,
                deviations_BN=one.deviations_BN,
                places_N=one.places(name),
                average=axis in table.within,
            ),
            runs=len(one.rows),
            lower_is_better=one.lower_is_better,
            paired=one.deviations_BN is not None,
            limits=limits,
            largest=1.0 if is_share(one.metric) else math.inf,
        )
        if tell is not None:
            tell("curves", done, len(pairs))
    judged = {name: _judge(of_axis, limits, correction) for name, of_axis in evidence.items()}
    differences = _contaminations(series, limits)
    return [
        Report(
            axis=name,
            limits=limits,
            correction=correction,
            judged=judged[name],
            interactions=_interactions(of_axis, name, limits),
            contamination=differences,
            cautions=[*_metric_cautions(judged[name]), *_axis_cautions(judged, name)],
            notes=list(dict.fromkeys(notes)),
            is_within=axis in table.within,
        )
        for name, of_axis in evidence.items()
        if len(of_axis) == len(series)
    ]


def cause_of(series: Series) -> str:
    """Why larger models may fail: as the table says, or as known of the task."""
    task = TASKS.get(series.task)
    return next((row.cause for row in series.rows if row.cause), (task.cause or "") if task else "")


def _judge(evidence: Mapping[Series, Evidence], limits: Limits, correction: Correction) -> list[Judged]:
    """All curves; tasks of one metric, family and kind of data, and their slices, share the correction."""
    groups: dict[Any, dict[Series, Evidence]] = {}
    for one, found in evidence.items():
        groups.setdefault(one.tested_with, {})[one] = found
    verdicts: dict[Series, Verdict] = {}
    for tasks in groups.values():
        verdicts |= judge_together(tasks, correction=correction, limits=limits)
    judged = [Judged(one, found.curve, verdicts[one]) for one, found in evidence.items()]
    for each in judged:
        each.verdict.flags = flags_of(each.series)
    return judged


# ---- families, and official against fresh data ----


def _interactions(
    evidence: Mapping[Series, Evidence], axis: str, limits: Limits
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By task and metric: the interaction of family and scale, the difference of Theil-Sen slopes, second minus first.

    The interval is over examples and jitter of both, drawn independently; a family needs three sizes. Below five it is
    described, never judged: of families that do not differ, 17 % with three sizes and a jitter of 0.08 would be told
    apart, against 1 to 6 % with five or eight (400 simulated pairs each).
    """
    pairs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for first, second in combinations(evidence, 2):
        one, other = evidence[first], evidence[second]
        same = (*first.key, first.data, first.slice) == (*second.key, second.data, second.slice)
        if not same or min(one.curve.sizes, other.curve.sizes) < _MIN_TO_COMPARE:
            continue
        slopes_B, others_B = (theil_sen(c.x_K, np.vstack([c.y_K, c.draws_BK])) for c in (one.curve, other.curve))
        interval = percentiles(others_B[:0:-1] - slopes_B[1:], limits.alpha)
        is_testable = one.turn is not None and other.turn is not None
        compared = {
            "families": [first.family, second.family],
            "slopes_per_decade": [float(slopes_B[0]), float(others_B[0])],
            "difference": float(others_B[0] - slopes_B[0]),
            "interval": list(interval),
            "testable": is_testable,
            "differs": is_testable and not interval[0] <= 0 <= interval[1],
            "axis": axis,
            "data": first.data,
        }
        pairs.setdefault(first.task, {}).setdefault(first.metric, []).append(compared)
    return pairs


def _contaminations(series: Sequence[Series], limits: Limits) -> dict[str, dict[str, dict[str, Any]]]:
    """All models together: who has seen the public files need not be a matter of family."""
    by_task: dict[str, dict[str, dict[str, Any]]] = {}
    for first, second in product(series, repeat=2):
        same = (first.task, first.metric, first.family) == (second.task, second.metric, second.family)
        is_whole = first.slice in ("", ALL)  # slices of different questions are not alike
        if (
            same
            and is_whole
            and (first.data, second.data) == DATA
            and (compared := _contamination(first, second, limits))
        ):
            by_metric = by_task.setdefault(first.task, {})
            name = f"{first.metric}, {first.family}" if first.metric in by_metric else first.metric
            by_metric[name] = compared | {"family": first.family}
    return by_task


def _contamination(official: Series, fresh: Series, limits: Limits) -> dict[str, Any]:
    """How much better models do on the official data than on fresh data of the same kind; empty without common models.

    A difference alone proves nothing: fresh questions may be harder. It speaks where a model that cannot have seen the
    official data does not have it. Fresh questions are other questions, so the errors of a model's two results add up.
    The mean over models is a random-effects one, with an interval from t: models may differ in what they have seen.
    """
    sign = -1 if official.lower_is_better else 1
    models: dict[str, tuple[float, float]] = {}
    for name, row, stderr in zip(official.names, official.rows, official.stderr, strict=True):
        other = next((number for number, there in enumerate(fresh.rows) if _is_same_run(row, there)), None)
        if other is not None:
            error = float(np.hypot(stderr, fresh.stderr[other]))
            models[name] = float(sign * (row.value - fresh.rows[other].value)), error
    if not models:
        return {}
    quantile = float(stats.norm.isf(limits.alpha / 2))
    y = np.array([difference for difference, _ in models.values()])
    e = np.maximum([error for _, error in models.values()], 1e-9)
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
            for model, (d, s) in models.items()
        },
    }


def _is_same_run(one: Measurement, other: Measurement) -> bool:
    """A name may stand for several places on an axis, such as the checkpoints of one run."""
    same_place = all(one.axes[axis] == other.axes[axis] for axis in one.axes.keys() & other.axes.keys())
    return (one.model, one.seed) == (other.model, other.seed) and same_place


# ---- what cannot both be the story ----


def _metric_cautions(judged: Sequence[Judged]) -> Iterator[Caution]:
    """Pairs of metrics of one task, for one family, whose verdicts disagree."""
    groups: dict[Any, list[Judged]] = {}
    for one in judged:
        groups.setdefault((one.series.task, one.series.part), []).append(one)
    for metrics in groups.values():
        for first, second in combinations(metrics, 2):
            labels = {first.verdict.label, second.verdict.label}
            if len(labels) == 2 and labels <= {*DIRECTED, "flat"}:
                told = [(one.series.metric, one.verdict.label) for one in (first, second)]
                yield Caution(first.series.task, _who(first.series), "", told[0], told[1])


def _axis_cautions(judged: Mapping[str, Sequence[Judged]], axis: str) -> Iterator[Caution]:
    """Where another axis known by name would change the verdict."""
    labels = {one.series: one.verdict.label for one in judged[axis]}
    for other in judged:
        for one in judged[other] if other != axis else ():
            label, here = one.verdict.label, labels[one.series]
            if label != here and "not-testable" not in (label, here):
                yield Caution(one.series.task, _who(one.series), one.series.metric, (axis, here), (other, label))


def _mixed_axes(series: Sequence[Series], axis: str, axes: Sequence[str]) -> list[str]:
    """A note if runs share a place on the axis but differ in another, so that they are not repetitions.

    Along an axis within models a curve is of one model, and along others settings are curves of their own.
    """
    for one, other in product(series, axes):
        places: dict[float, float] = {}
        for row in one.rows if other != axis and one.has(other) else ():
            if not math.isclose(places.setdefault(row.axes[axis], row.axes[other]), row.axes[other], rel_tol=0.05):
                place = row.source or f"line {row.line}"
                return [
                    f"models with the same {axis} differ in {other} (such as {row.model}, {place}): what that "
                    f"changes counts as jitter; --axis {other} looks along it"
                ]
    return []


def _who(series: Series) -> str:
    return ", ".join(part for part in (series.family, series.data if series.data != DATA[0] else "") if part)
