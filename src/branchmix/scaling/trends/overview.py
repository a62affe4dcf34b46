"""What a page or a sheet shows, in its order: tasks by cause, and for each metric and axis the curves of a task."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from branchmix.scaling.examples import Example
from branchmix.scaling.tasks import CAUSES, TASKS
from branchmix.scaling.trends.charts import Panel
from branchmix.scaling.trends.report import Judged, Report, cause_of
from branchmix.scaling.trends.series import Series

OTHER = "Other tasks"


@dataclass(frozen=True)
class Entry:
    """A task of the table."""

    name: str
    slug: str
    """For file names and anchors; no two tasks share one."""
    cause: str
    description: str
    example: Example | None
    """Of the official tasks, one that we made: the official data stay where they are."""
    metrics: tuple[str, ...]


class Overview:
    """The tasks of a table, from reports on it along one axis or several, of which the first is the one asked for."""

    def __init__(self, reports: Sequence[Report]):
        self.reports = [report for report in reports if report is reports[0] or _moves(report)]
        series = [one.series for one in self.reports[0].judged]
        names = list(dict.fromkeys(one.task for one in series))
        slugs: set[str] = set()
        entries = [_entry(name, [one for one in series if one.task == name], slugs) for name in names]
        known = list(TASKS)
        places = {name: known.index(name) if name in TASKS else len(known) for name in names}
        causes = [*CAUSES, *sorted({entry.cause for entry in entries} - {*CAUSES, ""}), ""]
        self.entries = sorted(entries, key=lambda entry: (causes.index(entry.cause), places[entry.name]))
        self.metrics = list(dict.fromkeys(one.metric for one in series))
        """In the table's order."""

    @property
    def groups(self) -> dict[str, list[Entry]]:
        """Tasks by cause, in the paper's order."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.cause, []).append(entry)
        return found

    @cached_property
    def models(self) -> int:
        """How many there are; several runs of one are one."""
        return len({(one.series.family, name) for one in self._all for name in (row.model for row in one.series.rows)})

    @property
    def main_metric(self) -> str:
        """Accuracy if most tasks have it, or else what most have."""
        counts = {metric: sum(metric in entry.metrics for entry in self.entries) for metric in self.metrics}
        most = counts.get("accuracy", 0) * 2 > len(self.entries)
        return "accuracy" if most else max(self.metrics, key=counts.__getitem__)

    @property
    def _all(self) -> list[Judged]:
        return self.reports[0].judged

    def reach(self, axis: str) -> tuple[float, float]:
        """The smallest and the largest place on an axis."""
        places = [row.axes[axis] for one in self._all for row in one.series.rows]
        return min(places), max(places)

    def metric_for(self, entry: Entry, wanted: str) -> str:
        """The metric that stands in where a task does not have the one the reader chose."""
        return wanted if wanted in entry.metrics else entry.metrics[0]

    def panel(self, entry: Entry, metric: str, report: Report) -> Panel:
        """The curves of a task by one of its metrics: official before fresh, long before short."""
        curves = [
            found for part in report.parts if (found := report.tasks(part).get(entry.name, {}).get(metric)) is not None
        ]
        rows = curves[0].series.rows
        chance = next((row.chance for row in rows if row.chance is not None), _known_chance(entry, metric))
        baselines = (
            {round(value, 4) for row in rows for value in row.constant_baselines} if metric == "accuracy" else ()
        )
        return Panel(curves, report.axis, report.limits.alpha, chance, tuple(sorted(baselines)))


def heading(cause: str) -> str:
    """Of a group of tasks."""
    return cause[:1].upper() + cause[1:] if cause else OTHER


def why(cause: str) -> str:
    """What the group of tasks has in common, in a sentence."""
    return next((text for name, text in CAUSES.items() if name == cause), "")


def _moves(report: Report) -> bool:
    """Whether any curve has more than one place on the axis."""
    return any(one.curve.sizes > 1 for one in report.judged)


def slug(name: str) -> str:
    """A name as it may stand in file names and anchors."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "x"


def _entry(name: str, series: Sequence[Series], slugs: set[str]) -> Entry:
    from branchmix.scaling.generate import make_examples

    task = TASKS.get(name)
    plain = slug(name)
    while plain in slugs:
        plain += "-2"
    slugs.add(plain)
    told = next((row.description for one in series for row in one.rows if row.description), "")
    return Entry(
        name=name,
        slug=plain,
        cause=cause_of(series[0]),
        description=told or (task.description if task else ""),
        example=make_examples(task, seed=0, num_examples=1)[0] if task else None,
        metrics=tuple(dict.fromkeys(one.metric for one in series)),
    )


def _known_chance(entry: Entry, metric: str) -> float | None:
    """What guessing scores on a task of the prize, all examples of which have as many classes as ours."""
    if entry.example is None or not entry.example.classes:
        return None
    return {"accuracy": 1 / len(entry.example.classes), "loss": math.log(len(entry.example.classes))}.get(metric)
