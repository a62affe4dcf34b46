"""What a page or a sheet shows, in its order: tasks by cause, and for each metric and axis the curves of a task."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from branchmix.pages.pictures import COLOURS
from branchmix.scaling.examples import Example
from branchmix.scaling.tasks import CAUSES, TASKS
from branchmix.scaling.trends.judge import Judged, Report, cause_of
from branchmix.scaling.trends.series import Series
from branchmix.scaling.trends.table import DATA, is_share
from branchmix.scaling.trends.verdict import WORDS


@dataclass(frozen=True)
class Panel:
    """One metric of one task along one axis: all its curves, and what they are compared with."""

    curves: Sequence[Judged]
    metric: str
    lower_is_better: bool
    axis: str
    alpha: float
    chance: float | None
    """What guessing scores."""
    baselines: list[float]
    """What constant answers score."""

    @property
    def is_share(self) -> bool:
        return is_share(self.metric)

    @property
    def official(self) -> Panel:
        """Without the curves of fresh data, where there are others."""
        return replace(self, curves=[one for one in self.curves if not is_fresh(one)] or self.curves)

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(one.series.family for one in self.curves))

    @property
    def names(self) -> list[str]:
        """What distinguishes each curve from the others: family, kind of questions; empty for a single curve."""
        series = [one.series for one in self.curves]
        has_families, has_kinds = len(self.families) > 1, len({one.data for one in series}) > 1
        return [
            ", ".join([(one.family or "no family")] * has_families + [f"{one.data} questions"] * has_kinds)
            for one in series
        ]

    @property
    def named(self) -> list[tuple[Judged, str]]:
        """The curves with their names."""
        return list(zip(self.curves, self.names, strict=True))

    def colour(self, one: Judged) -> str:
        """Families differ in colour, fresh data in the line's dashes."""
        return COLOURS[self.families.index(one.series.family) % (len(COLOURS) - 1)]

    def bars(self, one: Judged) -> tuple[np.ndarray, np.ndarray]:
        """[K] half widths of the intervals: over questions alone, and over models as well."""
        quantile = float(stats.norm.isf(self.alpha / 2))
        sampling_K = np.diag(one.curve.sampling_KK)
        return quantile * np.sqrt(sampling_K), quantile * np.sqrt(sampling_K + one.curve.jitter_K)


def is_fresh(one: Judged) -> bool:
    """Whether a curve is of questions made after the official ones."""
    return one.series.data != DATA[0]


@dataclass(frozen=True)
class Entry:
    """A task of the table."""

    name: str
    slug: str
    """For file names and anchors; no two tasks share one."""
    cause: str
    description: str
    example: Example | None
    """For an official task, an example that branchmix wrote: the official data are not shown."""
    metrics: tuple[str, ...]


class Overview:
    """The tasks of a table, from reports on it along one axis or several, of which the first is the one asked for."""

    def __init__(self, reports: Sequence[Report]):
        main = reports[0]
        self.reports = [one for one in reports if one is main or any(c.curve.sizes > 1 for c in one.judged)]
        self.axes = [report.axis for report in self.reports]
        series = [one.series for one in main.judged]
        by_task: dict[str, list[Series]] = {}
        for one in series:
            by_task.setdefault(one.task, []).append(one)
        slug_of = slugs(by_task)
        entries = [_entry(name, of_task, slug_of[name]) for name, of_task in by_task.items()]
        causes = [*CAUSES, *sorted({entry.cause for entry in entries} - {*CAUSES, ""}), ""]
        places = {name: number for number, name in enumerate(TASKS)}
        self.entries = sorted(entries, key=lambda e: (causes.index(e.cause), places.get(e.name, len(places))))
        self.metrics = list(dict.fromkeys(one.metric for one in series))
        """In the table's order."""
        self.models = len({(row.family, row.model) for one in series for row in one.rows})
        """How many there are; several runs of one are one."""
        self.groups = {cause: of for cause in causes if (of := [e for e in self.entries if e.cause == cause])}
        """Tasks by cause, in the paper's order."""

    @property
    def main_metric(self) -> str:
        """Accuracy if most tasks have it, or else what most have."""
        counts = {metric: sum(metric in entry.metrics for entry in self.entries) for metric in self.metrics}
        most = counts.get("accuracy", 0) * 2 > len(self.entries)
        return "accuracy" if most else max(self.metrics, key=counts.__getitem__)

    def metric_for(self, entry: Entry, wanted: str) -> str:
        """The metric to show for a task when the reader chose another, which the task may lack."""
        return wanted if wanted in entry.metrics else entry.metrics[0]

    def panel(self, entry: Entry, metric: str, report: Report) -> Panel:
        """The curves of a task by one of its metrics: official before fresh, long before short."""
        found = {one.series.part: one for one in report.judged if one.series.key == (entry.name, metric)}
        curves = [found[part] for part in report.parts if part in found]
        rows, lower_is_better = curves[0].series.rows, curves[0].series.lower_is_better
        chance = next((row.chance for row in rows if row.chance is not None), _known_chance(entry, metric))
        baselines = {round(value, 4) for row in rows for value in row.constant_baselines if metric == "accuracy"}
        return Panel(curves, metric, lower_is_better, report.axis, report.limits.alpha, chance, sorted(baselines))

    def tallies(self, metric: str, report: Report) -> list[tuple[str, dict[str, int]]]:
        """Each family, and how many tasks have which verdict; of the official data where there are any."""
        kinds = {data for _, data in report.parts}
        families = []
        for family, data in report.parts:
            if data == DATA[0] or DATA[0] not in kinds:
                wanted = {(entry.name, self.metric_for(entry, metric)) for entry in self.entries}
                shown = [one for one in report.judged if one.series.part == (family, data) and one.series.key in wanted]
                counts = Counter[str](one.verdict.label for one in shown)
                families.append((family or "no family", {label: counts[label] for label in WORDS if counts[label]}))
        return families


def heading(cause: str) -> str:
    """Title of a group of tasks."""
    return cause[:1].upper() + cause[1:] if cause else "Other tasks"


def slugs(names: Iterable[str]) -> dict[str, str]:
    """Names made fit for file names and anchors, all different."""
    found: dict[str, str] = {}
    for name in names:
        own = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "x"
        while own in found.values():
            own += "-2"
        found[name] = own
    return found


def _entry(name: str, series: Sequence[Series], slug: str) -> Entry:
    from branchmix.scaling.generate import make_examples

    task = TASKS.get(name)
    described = next((row.description for one in series for row in one.rows if row.description), "")
    return Entry(
        name=name,
        slug=slug,
        cause=cause_of(series[0]),
        description=described or (task.description if task else ""),
        example=make_examples(task, seed=0, num_examples=1)[0] if task else None,
        metrics=tuple(dict.fromkeys(one.metric for one in series)),
    )


def _known_chance(entry: Entry, metric: str) -> float | None:
    """What guessing scores on a task of the prize, all examples of which have as many classes as ours."""
    if entry.example is None or not entry.example.classes:
        return None
    return {"accuracy": 1 / len(entry.example.classes), "loss": math.log(len(entry.example.classes))}.get(metric)
