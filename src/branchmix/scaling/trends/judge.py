"""``branchmix scaling trends``: read a table, judge every curve, compare families, metrics, axes and kinds of data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

from branchmix.checkpoint.families import nearest
from branchmix.errors import DataError
from branchmix.scaling.tasks import TASKS
from branchmix.scaling.trends.fit import Curve, curve
from branchmix.scaling.trends.multiple import Correction, compare_families, contamination, disagreements, judge_together
from branchmix.scaling.trends.series import NOT_JUDGED, Series, all_series, flags_of, is_lower_better
from branchmix.scaling.trends.table import AXES, DATA, ResultsTable, is_share, read_table
from branchmix.scaling.trends.verdict import Evidence, Label, Limits, Verdict


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

    @property
    def warnings(self) -> list[str]:
        return [str(caution) for caution in self.cautions]

    @property
    def parts(self) -> list[tuple[str, str]]:
        """Families and kinds of data, the one with the most sizes first, official before fresh."""
        sizes: dict[tuple[str, str], int] = {}
        for one in self.judged:
            part = (one.series.family, one.series.data)
            sizes[part] = max(sizes.get(part, 0), one.verdict.sizes)
        return sorted(sizes, key=lambda part: (DATA.index(part[1]), -sizes[part]))

    def tasks(self, part: tuple[str, str]) -> dict[str, dict[str, Judged]]:
        """By task and metric."""
        tasks: dict[str, dict[str, Judged]] = {}
        for one in self.judged:
            if (one.series.family, one.series.data) == part:
                tasks.setdefault(one.series.task, {})[one.series.metric] = one
        return tasks

    def as_dict(self) -> dict[str, Any]:
        """`tasks` holds the first family's verdicts; where there are several, `series` holds those of all."""

        def verdicts(part: tuple[str, str]) -> dict[str, dict[str, Any]]:
            return {
                task: {metric: one.verdict.as_dict() for metric, one in metrics.items()}
                for task, metrics in self.tasks(part).items()
            }

        main, *others = self.parts
        content: dict[str, Any] = {"axis": self.axis, "tasks": verdicts(main)}
        if others:
            content |= {"family": main[0], "data": main[1]}
            content["series"] = [{"family": part[0], "data": part[1], "tasks": verdicts(part)} for part in self.parts]
        compared = {"interactions": self.interactions, "contamination": self.contamination}
        content |= {name: value for name, value in compared.items() if value}
        settings = {"alpha": self.limits.alpha, "minimum_effect": self.limits.minimum_effect}
        return {**content, **settings, "correction": self.correction, "warnings": self.warnings, "notes": self.notes}


Tell = Callable[[str, int, int], None]
"""Receives progress: a step, how much of it is done, and how much there is."""


def trends(path: Path, **options: Any) -> Report:
    """The report along the axis asked for alone; options as for ``trends_by_axis``."""
    return trends_by_axis(path, **options)[0]


def trends_by_axis(
    path: Path,
    *,
    axis: str | None = None,
    metrics: Sequence[str] = (),
    limits: Limits | None = None,
    correction: Correction = "bh",
    lower_is_better: Sequence[str] = (),
    tell: Tell | None = None,
) -> list[Report]:
    """Judge every metric of every task of a csv table, or of a folder with `results.csv` and scores of examples.

    The first report is along ``axis``: training FLOPs if None, or the first column that has a value for every model.
    Then follow those along every other axis known by name that has a value for every model.

    Raises:
        DataError: the table cannot be read, or there is no such axis or metric.
    """
    limits = limits or Limits()
    table = read_table(path)
    notes: list[str] = []
    axis = table.choose_axis(axis, notes)
    there = list(dict.fromkeys(row.metric for row in table.rows))
    wanted = _known(table, there, metrics) or [metric for metric in there if metric not in NOT_JUDGED]
    if not wanted:
        raise DataError(
            f"{table.path}: has only {', '.join(there)}, which does not measure performance: name a metric to judge"
        )
    named = tuple(_known(table, there, lower_is_better))
    for metric in wanted:
        if not is_lower_better(metric, named) and not is_share(metric):
            notes.append(f"higher {metric} is taken to be better; if it is not: --lower-is-better {metric}")
            if max(abs(row.value) for row in table.rows if row.metric == metric) > 1:
                notes.append(f"{metric} is not a share of 1: set --minimum-effect to the smallest change that counts")
    series = all_series(table, metrics=wanted, lower_is_better=named, notes=notes)
    notes += _mixed_axes(series, axis, table.axes)
    axes = [axis, *(name for name in table.axes if name in AXES and name != axis)]
    usable = {name: [one for one in series if one.has(name)] for name in axes}
    done, total = 0, sum(map(len, usable.values()))
    evidence: dict[str, dict[Series, Evidence]] = {name: {} for name in axes}
    for name in axes:
        for one in usable[name]:
            evidence[name][one] = Evidence(
                curve(one.x(name), one.y, one.stderr, deviations_BN=one.deviations_BN),
                runs=len(one.rows),
                lower_is_better=one.lower_is_better,
                paired=one.deviations_BN is not None,
                limits=limits,
                largest=1.0 if is_share(one.metric) else math.inf,
            )
            done += 1
            if tell is not None:
                tell("curves", done, total)
    judged = {name: _judge(evidence[name], limits, correction) for name in axes}
    differences = _contaminations(series, limits)
    return [
        Report(
            axis=name,
            limits=limits,
            correction=correction,
            judged=judged[name],
            interactions=_interactions(evidence[name], name, limits),
            contamination=differences,
            cautions=[*_metric_cautions(judged[name]), *_axis_cautions(judged, name)],
            notes=list(dict.fromkeys(notes)),
        )
        for name in axes
        if len(usable[name]) == len(series)
    ]


def cause_of(series: Series) -> str:
    """Why larger models may fail: as the table says, or as known of the task."""
    task = TASKS.get(series.task)
    return next((row.cause for row in series.rows if row.cause), (task.cause or "") if task else "")


def _known(table: ResultsTable, there: list[str], asked: Sequence[str]) -> list[str]:
    for metric in asked:
        if metric.lower() not in there:
            hint = nearest(metric.lower(), there)
            raise DataError(f"{table.path}: there is no metric {metric!r}{hint}; metrics: {', '.join(there)}")
    return list(dict.fromkeys(metric.lower() for metric in asked))


def _judge(evidence: Mapping[Series, Evidence], limits: Limits, correction: Correction) -> list[Judged]:
    """All curves; tasks of one metric, family and kind of data share the correction."""
    groups: dict[tuple[str, str, str], dict[str, Evidence]] = {}
    for one in evidence:
        groups.setdefault((one.metric, one.family, one.data), {})[one.task] = evidence[one]
    verdicts = {key: judge_together(tasks, correction=correction, limits=limits) for key, tasks in groups.items()}
    judged = []
    for one in evidence:
        verdict = verdicts[one.metric, one.family, one.data][one.task]
        verdict.flags = flags_of(one)
        judged.append(Judged(one, evidence[one].curve, verdict))
    return judged


def _interactions(
    evidence: Mapping[Series, Evidence], axis: str, limits: Limits
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    pairs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for first, second in combinations(evidence, 2):
        same = (first.task, first.metric, first.data) == (second.task, second.metric, second.data)
        if same and first.family != second.family:
            compared = compare_families(first, second, evidence, axis=axis, limits=limits)
            if compared is not None:
                pairs.setdefault(first.task, {}).setdefault(first.metric, []).append({**compared, "data": first.data})
    return pairs


def _contaminations(series: Sequence[Series], limits: Limits) -> dict[str, dict[str, dict[str, Any]]]:
    """All models together: who has seen the public files need not be a matter of family."""
    by_task: dict[str, dict[str, dict[str, Any]]] = {}
    for first, second in product(series, repeat=2):
        same = (first.task, first.metric, first.family) == (second.task, second.metric, second.family)
        if same and (first.data, second.data) == DATA:
            compared = contamination(first, second, limits=limits)
            if compared is not None:
                by_metric = by_task.setdefault(first.task, {})
                name = f"{first.metric}, {first.family}" if first.metric in by_metric else first.metric
                by_metric[name] = compared | {"family": first.family}
    return by_task


def _metric_cautions(judged: Sequence[Judged]) -> Iterator[Caution]:
    groups: dict[tuple[str, str, str], dict[str, Judged]] = {}
    for one in judged:
        key = (one.series.task, one.series.family, one.series.data)
        groups.setdefault(key, {})[one.series.metric] = one
    for metrics in groups.values():
        verdicts = {metric: one.verdict for metric, one in metrics.items()}
        for first, second in disagreements(verdicts):
            series = metrics[first].series
            labels = [(metric, verdicts[metric].label) for metric in (first, second)]
            yield Caution(series.task, _who(series), "", labels[0], labels[1])


def _axis_cautions(judged: Mapping[str, Sequence[Judged]], axis: str) -> Iterator[Caution]:
    """Where another axis known by name would change the verdict."""
    labels = {one.series: one.verdict.label for one in judged[axis]}
    for other in judged:
        for one in judged[other] if other != axis else ():
            label, here = one.verdict.label, labels[one.series]
            if label != here and "not-testable" not in (label, here):
                yield Caution(one.series.task, _who(one.series), one.series.metric, (axis, here), (other, label))


def _mixed_axes(series: Sequence[Series], axis: str, axes: Sequence[str]) -> list[str]:
    """A note if runs share a place on the axis but differ in another, so that they are not repetitions."""
    for one, other in product(series, axes):
        places: dict[float, float] = {}
        for row in one.rows if other != axis and one.has(other) else ():
            if abs(places.setdefault(row.axes[axis], row.axes[other]) / row.axes[other] - 1) > 0.05:
                return [
                    f"models with the same {axis} differ in {other} (such as {row.model}, line {row.line}): what that "
                    f"changes counts as jitter; --axis {other} looks along it"
                ]
    return []


def _who(series: Series) -> str:
    return ", ".join(part for part in (series.family, series.data if series.data != DATA[0] else "") if part)
